//! What the threads of a warp do together.

use crate::ptx::{Instruction, Operand, Type};
use crate::run::warp::How;

use super::kernel::{Unknown, Writer};

impl Writer<'_> {
    /// A call that all threads of `mask` make, with what follows it.
    fn together(&mut self, i: &Instruction, how: How, mask: &str, given: &[String], then: &str) -> String {
        self.sync = true;
        let given = if given.is_empty() { "0".to_owned() } else { given.join(", ") };
        let (how, line) = (how as u32, i.line);
        let (mut before, mut after) = (String::new(), String::new());
        if self.track {
            let source = i.operands.get(1).map_or_else(|| "0".into(), |operand| self.flags(operand));
            before = format!("t->flags[0] = {source};");
            let results = match i.operands.first() {
                Some(Operand::Pair(a, b)) => vec![&**a, &**b],
                Some(other) => vec![other],
                None => Vec::new(),
            };
            after = results.iter().map(|to| self.put_flags(to, "t->flags[3]")).collect();
        }
        format!(
            "{{ uint32_t in[] = {{ {given} }}, out[2]; {before} if (!t->run->warp(t, {how}, {mask}, in, out, {line})) goto done; \
             {then} {after} }}"
        )
    }

    pub(super) fn shuffle(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let how = [("up", How::Up), ("down", How::Down), ("bfly", How::Butterfly), ("idx", How::Index)];
        let (_, how) = how.into_iter().find(|(name, _)| i.has(name)).ok_or("the mode is not known")?;
        let mut given = Vec::new();
        for at in 1..4 {
            given.push(self.get(self.operand(i, at)?, Type::U32)?);
        }
        let mask = self.get(self.operand(i, 4)?, Type::U32)?;
        let then = match self.operand(i, 0)? {
            Operand::Pair(value, inside) => {
                self.put(value, Type::B32, "out[0]")? + &self.put(inside, Type::Pred, "out[1]")?
            }
            value => self.put(value, Type::B32, "out[0]")?,
        };
        Ok(self.together(i, how, &mask, &given, &then))
    }

    pub(super) fn vote(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let (value, _) = self.raw(self.operand(i, 1)?)?;
        let mask = self.get(self.operand(i, 2)?, Type::U32)?;
        let to = self.operand(i, 0)?;
        let then = if i.has("ballot") {
            self.put(to, Type::B32, "out[0]")?
        } else {
            let test =
                match i.modifiers.iter().find(|m| matches!(m.as_str(), "all" | "any" | "uni")).map(String::as_str) {
                    Some("all") => "out[0] == out[1]",
                    Some("any") => "out[0] != 0",
                    Some(_) => "out[0] == 0 || out[0] == out[1]",
                    None => return Err("the mode is not known".into()),
                };
            self.put(to, Type::Pred, test)?
        };
        Ok(self.together(i, How::Ballot, &mask, &[format!("({value}) != 0")], &then))
    }

    pub(super) fn activemask(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let then = self.put(self.operand(i, 0)?, Type::B32, "out[0]")?;
        Ok(self.together(i, How::Active, "0", &[], &then))
    }

    pub(super) fn matching(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let value = self.get(self.operand(i, 1)?, Type::untyped(ty.bits()))?;
        let mask = self.get(self.operand(i, 2)?, Type::U32)?;
        let given = [format!("(uint32_t)({value})"), format!("(uint32_t)((uint64_t)({value}) >> 32)")];
        let how = if i.has("all") { How::MatchAll } else { How::MatchAny };
        let then = match self.operand(i, 0)? {
            Operand::Pair(value, all) => {
                self.put(value, Type::B32, "out[0]")? + &self.put(all, Type::Pred, "out[0] != 0")?
            }
            value => self.put(value, Type::B32, "out[0]")?,
        };
        Ok(self.together(i, how, &mask, &given, &then))
    }

    pub(super) fn redux(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let how = match i.modifiers.iter().find(|m| m.as_str() != "sync").map(String::as_str) {
            Some("add") => How::Add,
            Some("and") => How::And,
            Some("or") => How::Or,
            Some("xor") => How::Xor,
            Some("min") if ty == Type::S32 => How::MinSigned,
            Some("max") if ty == Type::S32 => How::MaxSigned,
            Some("min") if ty == Type::U32 => How::Min,
            Some("max") if ty == Type::U32 => How::Max,
            _ => return Err("the reduction is not known".into()),
        };
        let value = self.get(self.operand(i, 1)?, Type::U32)?;
        let mask = self.get(self.operand(i, 2)?, Type::U32)?;
        let then = self.put(self.operand(i, 0)?, Type::B32, "out[0]")?;
        Ok(self.together(i, how, &mask, &[value], &then))
    }

    /// One thread of the mask, here the first.
    pub(super) fn elect(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let mask = self.get(self.operand(i, 1)?, Type::U32)?;
        let Operand::Pair(lane, chosen) = self.operand(i, 0)? else { return Err("two results are expected".into()) };
        let then =
            self.put(lane, Type::B32, "out[0]")? + &self.put(chosen, Type::Pred, "out[0] == (t->linear & 31)")?;
        Ok(self.together(i, How::Elect, &mask, &[], &then))
    }
}
