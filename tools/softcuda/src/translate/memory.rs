//! Loads, stores and atomic operations.

use crate::counts::Kind;
use crate::ptx::{Instruction, Operand, Space, Type};

use super::kernel::{Place, Unknown, Writer};
use super::undefined::{ADDRESS, ATOMIC};

fn space(i: &Instruction) -> Space {
    for modifier in &i.modifiers {
        match modifier.as_str() {
            "global" => return Space::Global,
            "shared" | "shared::cta" => return Space::Shared,
            "local" => return Space::Local,
            "const" => return Space::Const,
            "param" | "param::entry" => return Space::Param,
            _ => {}
        }
    }
    Space::Generic
}

/// How many numbers an access takes: `.v4`.
fn lanes(i: &Instruction) -> u32 {
    if i.has("v8") {
        8
    } else if i.has("v4") {
        4
    } else if i.has("v2") {
        2
    } else {
        1
    }
}

fn strong(i: &Instruction) -> bool {
    i.modifiers
        .iter()
        .any(|m| matches!(m.as_str(), "volatile" | "relaxed" | "acquire" | "release" | "acq_rel" | "mmio"))
}

/// The names of the operands of a vector, or the operand itself.
pub(super) fn parts(operand: &Operand) -> &[Operand] {
    match operand {
        Operand::Vector(parts) => parts,
        other => std::slice::from_ref(other),
    }
}

impl Writer<'_> {
    /// The statement that checks an access, where `a` is its address.
    pub(super) fn check(&mut self, i: &Instruction, space: Space, size: u32, access: &str) -> String {
        let space = match space {
            Space::Shared => "SHARED",
            Space::Local => "LOCAL",
            Space::Generic => "GENERIC",
            _ => "GLOBAL",
        };
        let strong = if strong(i) { " | PTX_STRONG" } else { "" };
        format!("PTX_CHECK_{space}(a, {size}, {size}, PTX_{access}{strong}, {}) ", i.line)
    }

    fn count_access(&mut self, space: Space, size: u32, write: bool) {
        let kind = match (space, write) {
            (Space::Shared, false) => Kind::SharedRead,
            (Space::Shared, true) => Kind::SharedWritten,
            (Space::Local | Space::Param, _) => return,
            (_, false) => Kind::GlobalRead,
            (_, true) => Kind::GlobalWritten,
        };
        self.count(kind, size.into());
    }

    pub(super) fn load(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let space = space(i);
        let (to, from) = (self.operand(i, 0)?, self.operand(i, 1)?);
        let count = lanes(i);
        let size = ty.bytes() * count;
        if ty == Type::B128 || parts(to).len() != count as usize {
            return Err("the form of the load is not known".into());
        }
        let mut out = self.defined(i, from, ADDRESS) + &format!("{{ uint64_t a = {}; ", self.address(from)?);
        // The place of a parameter is known, so that its bounds are checked here.
        let mut checked = false;
        if let (Space::Param, Operand::Address(base, offset)) = (space, from)
            && let Operand::Symbol(name) = &**base
            && let Some(Place::Param(_, whole)) = self.places.get(name.as_str())
        {
            if *offset < 0 || *offset as u32 + size > *whole {
                return Err(format!("the parameter `{name}` has {whole} bytes"));
            }
            checked = true;
        }
        if !checked {
            out += &self.check(i, space, size, "READ");
            self.count_access(space, size, false);
        }
        let each = if ty.is_signed() { ty } else { Type::untyped(ty.bits()) };
        let volatile = if strong(i) { "volatile " } else { "" };
        for (at, part) in parts(to).iter().enumerate() {
            let value = format!("*({volatile}{} *)(a + {})", each.c(), at as u32 * ty.bytes());
            out += &self.put(part, each, &value)?;
            out += &match checked {
                false => self.load_flags(i, space, at as u32 * ty.bytes(), ty, part),
                true if self.track => self.put_flags(part, "0"),
                true => String::new(),
            };
        }
        Ok(out + " }")
    }

    pub(super) fn store(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let space = space(i);
        let (to, from) = (self.operand(i, 0)?, self.operand(i, 1)?);
        let count = lanes(i);
        let size = ty.bytes() * count;
        if ty == Type::B128 || space == Space::Param || parts(from).len() != count as usize {
            return Err("the form of the store is not known".into());
        }
        let mut out = self.defined(i, to, ADDRESS) + &format!("{{ uint64_t a = {}; ", self.address(to)?);
        out += &self.check(i, space, size, "WRITE");
        self.count_access(space, size, true);
        let each = Type::untyped(ty.bits()).c();
        let volatile = if strong(i) { "volatile " } else { "" };
        for (at, part) in parts(from).iter().enumerate() {
            let (bits, _) = self.raw(part)?;
            out += &format!("*({volatile}{each} *)(a + {}) = ({each}){bits};", at as u32 * ty.bytes());
            out += &self.store_flags(space, at as u32 * ty.bytes(), ty.bytes(), part);
        }
        Ok(out + " }")
    }

    pub(super) fn atomic(&mut self, i: &Instruction, result: bool) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let space = space(i);
        let operations = ["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"];
        let how = i.modifiers.iter().find(|m| operations.contains(&m.as_str())).ok_or("the operation is not known")?;
        let first = usize::from(result);
        let (at, values) = (self.operand(i, first)?, self.operand(i, first + 1)?);
        let count = lanes(i);
        let float = ty.is_float() || ty.half().is_some();
        let bits = Type::untyped(ty.bits());
        let known = match how.as_str() {
            "add" => ty != Type::F32x2,
            "min" | "max" => !matches!(ty, Type::F32 | Type::F64 | Type::F32x2),
            "exch" | "cas" => ty != Type::B128,
            _ => !float,
        };
        if !known || parts(values).len() != count as usize || ty.bits() < 16 {
            return Err("the form of the atomic operation is not known".into());
        }
        let mut out = self.defined(i, at, ADDRESS);
        for operand in &i.operands[first + 1..] {
            for part in parts(operand) {
                out += &self.defined(i, part, ATOMIC);
            }
        }
        out += &format!("{{ uint64_t a = {}; ", self.address(at)?);
        out += &self.check(i, space, ty.bytes() * count, "ATOMIC");
        match space {
            Space::Shared => self.count_access(space, ty.bytes() * count, true),
            _ => self.count(Kind::GlobalAtomic, (ty.bytes() * count).into()),
        }
        if float && how == "add" {
            self.count_flops(ty, count.into());
        }
        let to = if result { parts(self.operand(i, 0)?) } else { &[] };
        for (lane, value) in parts(values).iter().enumerate() {
            let address = format!("a + {}", lane as u32 * ty.bytes());
            let whole = if ty.is_signed() { ty } else { ty.unsigned() };
            let call = if float && how != "exch" && how != "cas" {
                format!("ptx_bits_{how}_{}({address}, ({}){})", ty.name(), bits.c(), self.raw(value)?.0)
            } else {
                let mut call = format!("ptx_atom_{how}_{}({address}, {}", whole.name(), self.get(value, whole)?);
                if how == "cas" {
                    call += &format!(", {}", self.get(self.operand(i, first + 2)?, whole)?);
                }
                call + ")"
            };
            out += &match to.get(lane) {
                Some(to) => {
                    let put = self.put(to, if float { bits } else { whole }, &call)?;
                    put + &if self.track { self.put_flags(to, "0") } else { String::new() }
                }
                None => format!("{call};"),
            };
        }
        Ok(out + " }")
    }

    /// `cp.async`: copies from global to shared memory that are complete when the thread waits for them.
    pub(super) fn copy(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let first = i.modifiers.first().map(String::as_str);
        if first != Some("async") || i.has("bulk") || i.has("mbarrier") || i.has("reduce") {
            return Err("copies by the tensor memory accelerator and their barriers are not known".into());
        }
        let how = match i.modifiers.get(1).map(String::as_str) {
            Some("commit_group") => Some((0, "0".to_owned())),
            Some("wait_group") => Some((1, self.get(self.operand(i, 0)?, Type::U32)?)),
            Some("wait_all") => Some((1, "0".to_owned())),
            _ => None,
        };
        if let Some((how, left)) = how {
            return Ok(format!("if (!t->run->copies(t, {}, {left})) goto done;", how + i32::from(i.has("wait_all"))));
        }
        let size = self.get(self.operand(i, 2)?, Type::U32)?;
        let given = match i.operands.get(3) {
            Some(operand) if !i.has("L2::cache_hint") || i.operands.len() > 4 => self.get(operand, Type::U32)?,
            _ => size.clone(),
        };
        let Operand::Integer(bytes) = self.operand(i, 2)? else {
            return Err("the size of a copy is a constant".into());
        };
        self.count(Kind::GlobalRead, *bytes);
        self.count(Kind::SharedWritten, *bytes);
        let (to, from) = (self.address(&i.operands[0])?, self.address(&i.operands[1])?);
        let checks = self.defined(i, &i.operands[0], ADDRESS) + &self.defined(i, &i.operands[1], ADDRESS);
        Ok(format!("{checks}if (!t->run->copy(t, {to}, {from}, {size}, {given}, {})) goto done;", i.line))
    }
}
