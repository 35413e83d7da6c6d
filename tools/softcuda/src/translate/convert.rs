//! `cvt`.

use crate::ptx::{Instruction, Type};

use super::kernel::{Unknown, Writer};

impl Writer<'_> {
    pub(super) fn cvt(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let types = i.types();
        let &[to, from] = types.as_slice() else { return Err("conversions of these types are not known".into()) };
        let target = self.operand(i, 0)?;
        if to == Type::Tf32 {
            // `.rna` rounds ties away from zero, `.rn` to even.
            let how = if i.has("rn") { "ptx_tf32_even" } else { "ptx_tf32" };
            if i.has("rz") || i.has("relu") || i.has("satfinite") {
                return Err("the form is not known".into());
            }
            return self.put(target, Type::B32, &format!("{how}({})", self.get(self.operand(i, 1)?, Type::U32)?));
        }
        if let Some(half) = to.half() {
            if from != Type::F32 || half == Type::F32 || i.has("satfinite") || i.has("rs") {
                return Err("the form is not known".into());
            }
            let mut parts = Vec::new();
            for at in [1, 2] {
                let value = self.get(self.operand(i, at)?, Type::F32)?;
                let value = if i.has("relu") { format!("ptx_relu({value})") } else { value };
                parts.push(match i.has("rz") {
                    true => format!("(uint32_t)ptx_narrow_{}(PTX_RZ, {value})", half.name()),
                    false => format!("(uint32_t)ptx_to_{}({value})", half.name()),
                });
            }
            return self.put(target, Type::B32, &format!("{} << 16 | {}", parts[0], parts[1]));
        }
        if from.half().is_some() {
            return Err("the form is not known".into());
        }
        let value = self.get(self.operand(i, 1)?, from)?;
        let ftz = i.has("ftz");
        let whole = i.modifiers.iter().find_map(|m| match m.as_str() {
            "rni" => Some("rint"),
            "rzi" => Some("trunc"),
            "rmi" => Some("floor"),
            "rpi" => Some("ceil"),
            _ => None,
        });
        let mode = i.modifiers.iter().find_map(|m| match m.as_str() {
            "rz" => Some("PTX_RZ"),
            "rm" => Some("PTX_RM"),
            "rp" => Some("PTX_RP"),
            _ => None,
        });
        match (from.is_float(), to.is_float()) {
            (true, true) => {
                let value = if ftz && from == Type::F32 { format!("ptx_ftz({value})") } else { value };
                let value = match whole {
                    Some(function) => format!("{function}({value})"),
                    None => value,
                };
                let value = if i.has("relu") { format!("ptx_relu({value})") } else { value };
                if i.has("satfinite") {
                    return Err("the form is not known".into());
                }
                if let Some(mode) = mode {
                    let bits = Type::untyped(to.bits());
                    return self.put(target, bits, &format!("ptx_narrow_{}({mode}, {value})", to.name()));
                }
                let mut value =
                    format!("({})({value})", if from == Type::F64 && to != Type::F32 { "double" } else { to.c() });
                if i.has("sat") {
                    value = format!("ptx_sat({value})");
                }
                if ftz && to == Type::F32 {
                    value = format!("ptx_ftz({value})");
                }
                self.put(target, to, &value)
            }
            (true, false) => {
                let value = if ftz && from == Type::F32 { format!("ptx_ftz({value})") } else { value };
                self.put(target, to, &format!("ptx_to_{}({}({value}))", to.name(), whole.unwrap_or("trunc")))
            }
            (false, true) => match mode {
                Some(mode) => {
                    let bits = Type::untyped(to.bits());
                    self.put(target, bits, &format!("ptx_narrow_{}({mode}, {value})", to.name()))
                }
                None => {
                    self.put(target, to, &format!("({})({value})", if to == Type::F32 { "float" } else { "double" }))
                }
            },
            (false, false) if i.has("sat") => self.put(target, to, &format!("ptx_clamp_{}({value})", to.name())),
            // A narrow result is widened to its register by its own sign.
            (false, false) => self.put(target, to, &value),
        }
    }
}
