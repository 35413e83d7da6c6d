//! Operands as expressions of C.

use crate::ptx::{Instruction, Operand, Type};

use super::kernel::{Place, Unknown, Writer};

impl Writer<'_> {
    /// The bits of an operand, and how many where that is known.
    pub(super) fn raw(&self, operand: &Operand) -> Result<(String, Option<u32>), Unknown> {
        Ok(match operand {
            Operand::Register(name) => {
                let ty = self.registers.get(name.as_str()).ok_or_else(|| format!("unknown register `{name}`"))?;
                (format!("R_{name}"), Some(ty.bits()))
            }
            Operand::Special(name) => self.special(name)?,
            Operand::Integer(value) => (format!("{value}ull"), None),
            Operand::F32(bits) => (format!("{bits:#x}u"), Some(32)),
            Operand::F64(bits) => (format!("{bits:#x}ull"), Some(64)),
            Operand::Symbol(name) => (self.place(name)?, Some(64)),
            Operand::Not(inner) => (format!("(!{})", self.raw(inner)?.0), Some(8)),
            Operand::Address(base, offset) => {
                // Of a variable: its address and something.
                let (base, _) = self.raw(base)?;
                (format!("((uint64_t){base} + {offset}ll)"), Some(64))
            }
            _ => return Err(format!("unexpected operand {operand:?}")),
        })
    }

    fn special(&self, name: &str) -> Result<(String, Option<u32>), Unknown> {
        let text = match name {
            "laneid" => "(t->linear & 31)",
            "warpid" => "(t->linear >> 5)",
            "nwarpid" => "((t->ntid[0] * t->ntid[1] * t->ntid[2] + 31) >> 5)",
            "smid" => "0u",
            "nsmid" => "1u",
            "lanemask_eq" => "(1u << (t->linear & 31))",
            "lanemask_lt" => "((1u << (t->linear & 31)) - 1)",
            "lanemask_le" => "((2u << (t->linear & 31)) - 1)",
            "lanemask_gt" => "~((2u << (t->linear & 31)) - 1)",
            "lanemask_ge" => "~((1u << (t->linear & 31)) - 1)",
            "dynamic_smem_size" => "t->dynamic",
            "total_smem_size" => "(uint32_t)t->shared_size",
            "clock" | "clock_hi" => "(uint32_t)__rdtsc()",
            "clock64" | "globaltimer" => return Ok(("(uint64_t)__rdtsc()".into(), Some(64))),
            _ => {
                let (what, axis) = name.split_once('.').unwrap_or((name, ""));
                let axis = "xyz".find(axis).filter(|_| axis.len() == 1);
                return match (what, axis) {
                    ("tid" | "ntid" | "ctaid" | "nctaid", Some(axis)) => Ok((format!("t->{what}[{axis}]"), Some(32))),
                    _ => Err(format!("unknown register `%{name}`")),
                };
            }
        };
        Ok((text.to_owned(), Some(32)))
    }

    fn place(&self, name: &str) -> Result<String, Unknown> {
        // Declarations replace characters that C does not have.
        let plain = name.trim_start_matches('%').replace(['$', '.', '%'], "_");
        let place = self.places.get(name).or_else(|| self.places.get(plain.as_str()));
        Ok(match place.ok_or_else(|| format!("unknown name `{name}`"))? {
            Place::Param(at, _) => format!("(t->params + {at})"),
            Place::Shared(at) => format!("(t->shared + {at})"),
            Place::Dynamic => "(t->shared + t->shared_size - t->dynamic)".into(),
            Place::Local(at) => format!("((uint64_t)locals + {at})"),
            Place::Global(i) => format!("t->globals[{i}]"),
        })
    }

    /// The address that an operand in brackets names.
    pub(super) fn address(&self, operand: &Operand) -> Result<String, Unknown> {
        match operand {
            Operand::Address(..) => Ok(self.raw(operand)?.0),
            _ => Err("an address is expected".into()),
        }
    }

    /// An operand as a value of the type.
    pub(super) fn get(&self, operand: &Operand, ty: Type) -> Result<String, Unknown> {
        let (bits, _) = self.raw(operand)?;
        Ok(match ty {
            Type::Pred => bits,
            Type::F32 | Type::Tf32 => format!("ptx_f32((uint32_t){bits})"),
            Type::F64 => format!("ptx_f64((uint64_t){bits})"),
            Type::F16 => format!("ptx_f16((uint16_t){bits})"),
            Type::Bf16 => format!("ptx_bf16((uint16_t){bits})"),
            _ => format!("({}){bits}", ty.c()),
        })
    }

    /// A statement that gives a register a value of the type.
    pub(super) fn put(&self, operand: &Operand, ty: Type, value: &str) -> Result<String, Unknown> {
        let name = match operand {
            Operand::Register(name) => name,
            Operand::Sink => return Ok(format!("(void)({value});")),
            _ => return Err("a register is expected".into()),
        };
        let wide = self.registers.get(name.as_str()).ok_or_else(|| format!("unknown register `{name}`"))?;
        let to = Type::untyped(wide.bits()).c();
        Ok(match ty {
            Type::F32 | Type::Tf32 => format!("R_{name} = ptx_bits32({value});"),
            Type::F64 => format!("R_{name} = ptx_bits64({value});"),
            Type::F16 => format!("R_{name} = ptx_to_f16({value});"),
            Type::Bf16 => format!("R_{name} = ptx_to_bf16({value});"),
            Type::Pred => format!("R_{name} = ({value}) & 1;"),
            _ => format!("R_{name} = ({to})({})({value});", ty.c()),
        })
    }

    /// The last type of an instruction.
    pub(super) fn ty(&self, i: &Instruction) -> Result<Type, Unknown> {
        i.types().last().copied().ok_or_else(|| "the instruction has no type".to_owned())
    }

    pub(super) fn operand<'i>(&self, i: &'i Instruction, at: usize) -> Result<&'i Operand, Unknown> {
        i.operands.get(at).ok_or_else(|| format!("operand {} is missing", at + 1))
    }

    /// `mov`, also of pairs.
    pub(super) fn mov(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let (to, from) = (self.operand(i, 0)?, self.operand(i, 1)?);
        if let Operand::Vector(names) = to {
            let step = ty.bits() / names.len() as u32;
            let (bits, _) = self.raw(from)?;
            let mut out = format!("{{ uint64_t v = (uint64_t){bits};");
            for (at, name) in names.iter().enumerate() {
                out += &self.put(name, Type::untyped(step), &format!("v >> {}", step * at as u32))?;
            }
            return Ok(out + " }");
        }
        if let Operand::Vector(names) = from {
            let step = ty.bits() / names.len() as u32;
            let mut parts = Vec::new();
            for (at, name) in names.iter().enumerate() {
                parts.push(format!("(uint64_t)({}) << {}", self.get(name, Type::untyped(step))?, step * at as u32));
            }
            return self.put(to, Type::untyped(ty.bits()), &parts.join(" | "));
        }
        let (bits, _) = self.raw(from)?;
        self.put(to, if ty == Type::Pred { ty } else { Type::untyped(ty.bits()) }, &bits)
    }

    /// Conversions between generic addresses and those of a space, which are the same here.
    pub(super) fn cvta(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let ty = self.ty(i)?;
        let (bits, _) = self.raw(self.operand(i, 1)?)?;
        self.put(self.operand(i, 0)?, ty, &bits)
    }

    /// In which space an address is.
    pub(super) fn isspacep(&mut self, i: &Instruction) -> Result<String, Unknown> {
        let (bits, _) = self.raw(self.operand(i, 1)?)?;
        let test = match i.modifiers.first().map(String::as_str) {
            Some("shared" | "shared::cta") => format!("((uint64_t){bits} - t->shared < (1u << 20))"),
            Some("global") => format!("((uint64_t){bits} - t->base < t->span)"),
            Some("local") => format!("((uint64_t){bits} - (uint64_t)locals < sizeof locals)"),
            _ => return Err("the space is not known".into()),
        };
        self.put(self.operand(i, 0)?, Type::Pred, &test)
    }
}
