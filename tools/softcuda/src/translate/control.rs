//! Branches and barriers of a block.

use crate::ptx::{Instruction, Operand, Type};

use super::kernel::{Unknown, Writer, label};

impl Writer<'_> {
    pub(super) fn bra(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let Operand::Symbol(name) = self.operand(i, 0)? else { return Err("a label is expected".into()) };
        let name = label(name);
        let tick = if self.seen.contains(&name) { format!("PTX_TICK({}) ", i.line) } else { String::new() };
        Ok(format!("{tick}goto {name};"))
    }

    pub(super) fn fence(&mut self, i: &Instruction) -> Result<String, Unknown> {
        if i.modifiers.iter().any(|m| m.starts_with("proxy") || m.starts_with("mbarrier")) {
            return Err("fences of proxies are not known".into());
        }
        Ok("__atomic_thread_fence(__ATOMIC_SEQ_CST);".into())
    }

    pub(super) fn barrier(&mut self, i: &Instruction) -> Result<String, Unknown> {
        self.sync = true;
        if i.has("cluster") {
            return Err("clusters are not known".into());
        }
        if i.has("warp") {
            let mask = self.get(self.operand(i, 0)?, Type::U32)?;
            return Ok(format!("if (!t->run->warp(t, 0, {mask}, 0, 0, {})) goto done;", i.line));
        }
        if i.has("red") {
            let how = ["popc", "and", "or"].iter().position(|how| i.has(how)).ok_or("the reduction is not known")?;
            let last = i.operands.len() - 1;
            let id = self.get(self.operand(i, 1)?, Type::U32)?;
            let count = if last > 2 { self.get(&i.operands[2], Type::U32)? } else { "0".into() };
            let (value, _) = self.raw(self.operand(i, last)?)?;
            let ty = if how == 0 { Type::U32 } else { Type::Pred };
            let put = self.put(&i.operands[0], ty, "v")?;
            return Ok(format!(
                "{{ uint32_t v = {value}; if (!t->run->barrier(t, {id}, {count}, {}, &v, {})) goto done; {put} }}",
                how + 2,
                i.line
            ));
        }
        let how = if i.has("arrive") { 1 } else { 0 };
        let mut args = Vec::new();
        for at in 0..2 {
            args.push(match i.operands.get(at) {
                Some(operand) => self.get(operand, Type::U32)?,
                None => "0".into(),
            });
        }
        Ok(format!("if (!t->run->barrier(t, {}, {how}, 0, {})) goto done;", args.join(", "), i.line))
    }
}
