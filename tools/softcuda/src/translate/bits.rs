//! Bits, comparisons and selection.

use crate::ptx::{Instruction, Operand, Type};

use super::kernel::{Unknown, Writer};

impl Writer<'_> {
    pub(super) fn bits(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let to = self.operand(i, 0)?;
        let wide = ty.bits();
        let raw = |at| Ok::<_, Unknown>(self.raw(self.operand(i, at)?)?.0);
        let get = |at, ty| self.get(self.operand(i, at)?, ty);
        let value = match i.name.as_str() {
            "and" => format!("({}) & ({})", raw(1)?, raw(2)?),
            "or" => format!("({}) | ({})", raw(1)?, raw(2)?),
            "xor" => format!("({}) ^ ({})", raw(1)?, raw(2)?),
            "not" if ty == Type::Pred => format!("!{}", raw(1)?),
            "not" => format!("~(uint64_t){}", raw(1)?),
            "cnot" => format!("({} == 0)", get(1, ty)?),
            "lop3" if !i.has("BoolOp") && ty == Type::B32 => {
                let mut parts = Vec::new();
                for at in 1..5 {
                    parts.push(raw(at)?);
                }
                format!("ptx_lop3({})", parts.join(", "))
            }
            "shl" => format!("ptx_shl({}, {}, {wide})", get(1, ty)?, get(2, Type::U32)?),
            "shr" if ty.is_signed() => format!("ptx_sar({}, {}, {wide})", get(1, ty)?, get(2, Type::U32)?),
            "shr" => format!("ptx_shr({}, {}, {wide})", get(1, ty)?, get(2, Type::U32)?),
            "shf" => {
                let side = if i.has("l") { "l" } else { "r" };
                let args = [get(1, Type::U32)?, get(2, Type::U32)?, get(3, Type::U32)?].join(", ");
                format!("ptx_shf_{side}({args}, {})", u8::from(i.has("wrap")))
            }
            "bfe" => format!("ptx_bfe_{}({}, {}, {})", ty.name(), get(1, ty)?, get(2, Type::U32)?, get(3, Type::U32)?),
            "bfi" => {
                format!(
                    "ptx_bfi({}, {}, {}, {}, {wide})",
                    get(1, ty)?,
                    get(2, ty)?,
                    get(3, Type::U32)?,
                    get(4, Type::U32)?
                )
            }
            "prmt" if i.modifiers.len() == 1 => {
                format!("ptx_prmt({}, {}, {})", get(1, Type::U32)?, get(2, Type::U32)?, get(3, Type::U32)?)
            }
            "popc" => return self.put(to, Type::U32, &format!("__builtin_popcountll({})", get(1, ty)?)),
            "clz" => return self.put(to, Type::U32, &format!("ptx_clz({}, {wide})", get(1, ty)?)),
            "brev" => format!("ptx_brev({}, {wide})", get(1, ty)?),
            "bfind" => {
                let value = get(1, ty.unsigned())?;
                // Of a negative number the highest bit that differs from the sign.
                let value = if ty.is_signed() {
                    let signed = get(1, ty)?;
                    format!("(({signed}) < 0 ? ({})~({value}) : {value})", ty.unsigned().c())
                } else {
                    value
                };
                let left = u8::from(i.has("shiftamt"));
                return self.put(to, Type::U32, &format!("ptx_bfind({value}, {left}, {wide})"));
            }
            _ => return Err("the form is not known".into()),
        };
        self.put(to, ty, &value)
    }

    pub(super) fn setp(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let test = i.modifiers.first().ok_or("the comparison is missing")?;
        let value = self.compare(self.operand(i, 1)?, self.operand(i, 2)?, ty, test, i.has("ftz"))?;
        let join = i.modifiers[1..].iter().find_map(|m| match m.as_str() {
            "and" => Some("&"),
            "or" => Some("|"),
            "xor" => Some("^"),
            _ => None,
        });
        let joined = |value: String| match join {
            Some(sign) => Ok(format!("({value} {sign} {})", self.raw(self.operand(i, 3)?)?.0)),
            None => Ok::<_, Unknown>(value),
        };
        match self.operand(i, 0)? {
            Operand::Pair(yes, no) => {
                let (yes, no) = (self.put(yes, Type::Pred, "p")?, self.put(no, Type::Pred, "q")?);
                let (p, q) = (joined(value.clone())?, joined(format!("(!{value})"))?);
                Ok(format!("{{ uint8_t p = {p}, q = {q}; {yes} {no} }}"))
            }
            to => self.put(to, Type::Pred, &joined(value)?),
        }
    }

    pub(super) fn set(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let types = i.types();
        let (&[to, from], Some(test)) = (types.as_slice(), i.modifiers.first()) else {
            return Err("two types are expected".into());
        };
        if i.operands.len() != 3 {
            return Err("the form is not known".into());
        }
        let value = self.compare(&i.operands[1], &i.operands[2], from, test, i.has("ftz"))?;
        let value = if to.is_float() { format!("{value} ? 1 : 0") } else { format!("{value} ? -1 : 0") };
        self.put(&i.operands[0], to, &value)
    }

    pub(super) fn selp(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let ty = if ty == Type::Pred { ty } else { Type::untyped(ty.bits()) };
        let (a, b) = (self.raw(self.operand(i, 1)?)?.0, self.raw(self.operand(i, 2)?)?.0);
        let (p, _) = self.raw(self.operand(i, 3)?)?;
        self.put(self.operand(i, 0)?, ty, &format!("{p} ? ({a}) : ({b})"))
    }

    pub(super) fn slct(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let types = i.types();
        let &[ty, by] = types.as_slice() else { return Err("two types are expected".into()) };
        let (a, b) = (self.raw(self.operand(i, 1)?)?.0, self.raw(self.operand(i, 2)?)?.0);
        let c = self.get(self.operand(i, 3)?, by)?;
        self.put(self.operand(i, 0)?, Type::untyped(ty.bits()), &format!("({c} >= 0) ? ({a}) : ({b})"))
    }
}
