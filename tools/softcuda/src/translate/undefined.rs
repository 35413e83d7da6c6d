//! Values that are not defined, because they were computed from memory or registers that were not written. Each register has
//! a bit for each of its bytes; arithmetic spreads them, selection takes those of what it selects. They matter where a program
//! branches by them, accesses memory by them, or copies them to the host.

use std::collections::HashSet;

use crate::ptx::{Function, Instruction, Operand, Space, Statement, Type};

use super::kernel::Writer;
use super::memory::parts;
use super::unset;

/// What a value that is not defined decides, as in `run::check`.
pub(super) const ADDRESS: u32 = 1;
pub(super) const ATOMIC: u32 = 2;

/// Registers that may have a value that is not defined: those that are not computed from constants, parameters and numbers of
/// threads alone. The others, most of what addresses are computed with, need no bits.
pub(super) fn doubtful(function: &Function) -> HashSet<&str> {
    let instructions: Vec<&Instruction> = function
        .body
        .iter()
        .filter_map(|statement| match statement {
            Statement::Instruction(instruction) => Some(instruction),
            Statement::Label(_) => None,
        })
        .collect();
    let mut known: HashSet<String> = HashSet::new();
    for instruction in &instructions {
        unset::each(instruction, &mut |name, written| {
            if written {
                known.insert(name.to_owned());
            }
        });
    }
    // What is never written is not defined.
    let names = function.registers.iter().map(|register| register.name.as_str());
    let mut out: HashSet<&str> = names.clone().filter(|name| !known.contains(*name)).collect();
    loop {
        let mut found: HashSet<String> = HashSet::new();
        for instruction in &instructions {
            let mut doubt = SOURCES.contains(&instruction.name.as_str()) && !instruction.has("param");
            unset::each(instruction, &mut |name, written| doubt |= !written && out.contains(name));
            if doubt {
                unset::each(instruction, &mut |name, written| {
                    if written && !out.contains(name) {
                        found.insert(name.to_owned());
                    }
                });
            }
        }
        if found.is_empty() {
            return out;
        }
        out.extend(names.clone().filter(|name| found.contains(*name)));
    }
}

/// Instructions whose results may not be defined although all of their operands are.
const SOURCES: [&str; 8] = ["ld", "ldu", "shfl", "vote", "redux", "match", "wmma", "ldmatrix"];

/// The bits of so many bytes.
fn low(bytes: u32) -> u32 {
    if bytes >= 8 { 0xff } else { (1 << bytes) - 1 }
}

impl Writer<'_> {
    fn bytes(&self, name: &str) -> u32 {
        self.registers.get(name).map_or(8, |ty| ty.bytes())
    }

    /// The bits of an operand: 0 for what is always defined.
    pub(super) fn flags(&self, operand: &Operand) -> String {
        match operand {
            Operand::Register(name) if self.doubtful.contains(name.as_str()) => format!("U_{name}"),
            Operand::Not(inner) => self.flags(inner),
            Operand::Address(base, _) => self.flags(base),
            _ => "0".into(),
        }
    }

    /// Gives a register its bits.
    pub(super) fn put_flags(&self, operand: &Operand, flags: &str) -> String {
        match operand {
            Operand::Register(name) if self.doubtful.contains(name.as_str()) => {
                format!("U_{name} = ({flags}) & {};", low(self.bytes(name)))
            }
            _ => String::new(),
        }
    }

    /// Gives a register all of its bits if there is one in `flags`.
    fn put_any(&self, operand: &Operand, flags: &str) -> String {
        self.put_flags(operand, &format!("({flags}) ? 0xff : 0"))
    }

    /// A check that an address, or the value of an atomic operation, is defined.
    pub(super) fn defined(&self, i: &Instruction, operand: &Operand, what: u32) -> String {
        let flags = self.flags(operand);
        if self.track && flags != "0" { format!("PTX_DERIVED({flags}, {what}, {}) ", i.line) } else { String::new() }
    }

    /// The bits of `size` bytes of memory at `a + at`, to a register.
    pub(super) fn load_flags(&self, i: &Instruction, space: Space, at: u32, ty: Type, to: &Operand) -> String {
        if !self.track {
            return String::new();
        }
        let size = ty.bytes();
        let state = state(space);
        let put = if ty.is_signed() { self.put_any(to, "u") } else { self.put_flags(to, "u") };
        format!(
            "{{ uint32_t u = ptx_undefined({state}(a + {at}), {size}); if (u) t->run->undefined(t, a + {at}, {size}, {}); {put} }}",
            i.line
        )
    }

    /// Marks memory at `a + at` that a value that is not defined was written to.
    pub(super) fn store_flags(&self, space: Space, at: u32, size: u32, from: &Operand) -> String {
        let flags = self.flags(from);
        if !self.track || flags == "0" {
            return String::new();
        }
        format!("if ({flags}) ptx_spoil(t, {}(a + {at}), {flags}, {size});", state(space))
    }

    /// Bits of registers, one for each, for `Thread::flags`.
    pub(super) fn flags_of(&self, operand: &Operand) -> String {
        let each = parts(operand).iter().enumerate().map(|(i, part)| format!("({} != 0) << {i}", self.flags(part)));
        each.collect::<Vec<_>>().join(" | ")
    }

    /// Gives registers all of their bits by one bit each.
    pub(super) fn put_flags_of(&self, operand: &Operand, from: &str) -> String {
        if !self.track {
            return String::new();
        }
        parts(operand).iter().enumerate().map(|(i, part)| self.put_any(part, &format!("{from} >> {i} & 1"))).collect()
    }

    /// The code of an instruction, with what it does to the bits of its registers.
    pub(super) fn followed(&self, i: &Instruction, code: String) -> String {
        let elsewhere = [
            "ld", "ldu", "st", "atom", "red", "cp", "shfl", "vote", "match", "redux", "wmma", "mma", "ldmatrix",
            "stmatrix",
        ];
        if !self.track || elsewhere.contains(&i.name.as_str()) || i.operands.is_empty() {
            return code;
        }
        let to = &i.operands[0];
        let results: Vec<&Operand> = match to {
            Operand::Pair(a, b) => vec![a, b],
            Operand::Vector(parts) => parts.iter().collect(),
            other => vec![other],
        };
        let mut written = false;
        let mut sources = Vec::new();
        unset::each(i, &mut |name, write| {
            written |= write && self.doubtful.contains(name);
            if !write && self.doubtful.contains(name) && i.guard.as_ref().is_none_or(|(guard, _)| guard != name) {
                sources.push(format!("U_{name}"));
            }
        });
        if !written {
            return code;
        }
        let any = if sources.is_empty() { "0".to_owned() } else { sources.join(" | ") };
        let after: String = match i.name.as_str() {
            "mov" if matches!(to, Operand::Vector(_)) => {
                let step = self.bytes_of(i) / results.len() as u32;
                let part = |(at, to): (usize, &&Operand)| self.put_flags(to, &format!("u >> {}", step * at as u32));
                results.iter().enumerate().map(part).collect()
            }
            "mov" if matches!(i.operands.get(1), Some(Operand::Vector(_))) => {
                let given = parts(&i.operands[1]);
                let step = self.bytes_of(i) / given.len() as u32;
                let all: Vec<String> = given
                    .iter()
                    .enumerate()
                    .map(|(at, part)| format!("({} & {}) << {}", self.flags(part), low(step), step * at as u32))
                    .collect();
                return format!("{{ uint32_t u = {}; {code} {} }}", all.join(" | "), self.put_flags(to, "u"));
            }
            "mov" | "and" | "or" | "xor" | "not" | "cvta" | "lop3" => self.put_flags(to, "u"),
            "selp" if i.operands.len() == 4 => {
                let [a, b, p] = [1, 2, 3].map(|at| self.flags(&i.operands[at]));
                let chosen = self.raw(&i.operands[3]).map_or_else(|_| "1".into(), |(bits, _)| bits);
                let u = format!("{p} ? 0xff : {chosen} ? {a} : {b}");
                return format!("{{ uint32_t u = {u}; {code} {} }}", self.put_flags(to, "u"));
            }
            "shr" | "shl" if self.whole_bytes(i).is_some() && !self.ty(i).is_ok_and(Type::is_signed) => {
                let sign = if i.name == "shr" { ">>" } else { "<<" };
                self.put_flags(
                    to,
                    &format!("(u & {}) {sign} {}", low(self.bytes_of(i)), self.whole_bytes(i).unwrap_or(0)),
                )
            }
            "cvt" => {
                let bytes = i.types().last().map_or(8, |ty| ty.bytes());
                results.iter().map(|to| self.put_any(to, &format!("u & {}", low(bytes)))).collect()
            }
            _ => results.iter().map(|to| self.put_any(to, "u")).collect(),
        };
        format!("{{ uint32_t u = {any}; {code} {after} }}")
    }

    fn bytes_of(&self, i: &Instruction) -> u32 {
        self.ty(i).map_or(4, Type::bytes)
    }

    /// By how many bytes a shift shifts, if it is a constant.
    fn whole_bytes(&self, i: &Instruction) -> Option<u64> {
        match i.operands.get(2) {
            Some(Operand::Integer(bits)) if bits % 8 == 0 && *bits < 64 => Some(bits / 8),
            _ => None,
        }
    }
}

fn state(space: Space) -> &'static str {
    match space {
        Space::Shared => "PTX_STATE_SHARED",
        Space::Local => "PTX_STATE_LOCAL",
        Space::Generic => "PTX_STATE_GENERIC",
        _ => "PTX_STATE_GLOBAL",
    }
}
