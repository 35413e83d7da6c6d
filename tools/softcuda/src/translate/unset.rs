//! Registers that are read although no path to the reading writes them: an accumulator that was forgotten to be set.
//!
//! A `mov` that packs several into one is no such reading: LLVM keeps a pair with one half set. Whether the other one is
//! used is followed by the bits of `undefined`.

use std::collections::HashMap;

use crate::ptx::{Function, Instruction, Operand, Statement};

/// Lines and names, by the first reading of each.
pub(super) fn find(function: &Function) -> Vec<(u32, String)> {
    let index: HashMap<&str, usize> =
        function.registers.iter().enumerate().map(|(i, register)| (register.name.as_str(), i)).collect();
    let blocks = blocks(&function.body);
    let labels: HashMap<&str, usize> =
        blocks.iter().enumerate().flat_map(|(i, block)| block.labels.iter().map(move |&l| (l, i))).collect();
    let words = index.len().div_ceil(64);
    let mut entry = vec![vec![0_u64; words]; blocks.len()];
    let mut reached = vec![false; blocks.len()];
    let mut queue = vec![0];
    if let Some(first) = reached.first_mut() {
        *first = true;
    }
    while let Some(at) = queue.pop() {
        let Some(block) = blocks.get(at) else { continue };
        let mut set = entry[at].clone();
        for instruction in &block.instructions {
            each(instruction, &mut |name, written| {
                if let (true, Some(&i)) = (written, index.get(name)) {
                    set[i / 64] |= 1 << (i % 64);
                }
            });
        }
        let targets = block.targets.iter().filter_map(|label| labels.get(label).copied());
        for next in targets.chain(block.falls.then_some(at + 1)).filter(|&next| next < blocks.len()) {
            let mut changed = !reached[next];
            reached[next] = true;
            for (word, more) in entry[next].iter_mut().zip(&set) {
                changed |= *more & !*word != 0;
                *word |= more;
            }
            if changed {
                queue.push(next);
            }
        }
    }
    let mut found: Vec<(u32, String)> = Vec::new();
    for ((block, set), _) in blocks.iter().zip(&mut entry).zip(&reached).filter(|(_, reached)| **reached) {
        for instruction in &block.instructions {
            let packs = instruction.name == "mov" && matches!(instruction.operands.get(1), Some(Operand::Vector(_)));
            for write in [false, true] {
                each(instruction, &mut |name, written| {
                    let Some(&i) = index.get(name) else { return };
                    if written && write {
                        set[i / 64] |= 1 << (i % 64);
                    } else if !packs && !written && !write && set[i / 64] >> (i % 64) & 1 == 0 {
                        set[i / 64] |= 1 << (i % 64);
                        found.push((instruction.line, name.to_owned()));
                    }
                });
            }
        }
    }
    found
}

#[derive(Default)]
struct Block<'a> {
    labels: Vec<&'a str>,
    instructions: Vec<&'a Instruction>,
    targets: Vec<&'a str>,
    falls: bool,
}

fn blocks(body: &[Statement]) -> Vec<Block<'_>> {
    let mut out = vec![Block { falls: true, ..Block::default() }];
    for statement in body {
        let last = out.len() - 1;
        match statement {
            Statement::Label(name) => {
                if !out[last].instructions.is_empty() {
                    out.push(Block { falls: true, ..Block::default() });
                }
                let last = out.len() - 1;
                out[last].labels.push(name);
            }
            Statement::Instruction(instruction) => {
                out[last].instructions.push(instruction);
                let leaves = matches!(instruction.name.as_str(), "bra" | "ret" | "exit" | "trap");
                if leaves {
                    out[last].falls = instruction.guard.is_some();
                    if let (true, Some(Operand::Symbol(label))) =
                        (instruction.name == "bra", instruction.operands.first())
                    {
                        out[last].targets.push(label);
                    }
                    out.push(Block { falls: true, ..Block::default() });
                }
            }
        }
    }
    out
}

/// Calls `visit` with each register of an instruction and whether it is written.
pub(super) fn each(instruction: &Instruction, visit: &mut impl FnMut(&str, bool)) {
    if let Some((register, _)) = &instruction.guard {
        visit(register, false);
    }
    let reads_only = match instruction.name.as_str() {
        "st" | "red" | "bra" | "cp" | "prefetch" | "prefetchu" | "stmatrix" | "nanosleep" | "call" => true,
        "bar" | "barrier" => !instruction.has("red"),
        "wmma" => instruction.has("store"),
        _ => false,
    };
    for (at, operand) in instruction.operands.iter().enumerate() {
        registers(operand, at == 0 && !reads_only, visit);
    }
}

fn registers(operand: &Operand, written: bool, visit: &mut impl FnMut(&str, bool)) {
    match operand {
        Operand::Register(name) => visit(name, written),
        Operand::Address(base, _) => registers(base, false, visit),
        Operand::Vector(parts) => parts.iter().for_each(|part| registers(part, written, visit)),
        Operand::Pair(a, b) => {
            registers(a, written, visit);
            registers(b, written, visit);
        }
        Operand::Not(inner) => registers(inner, written, visit),
        _ => {}
    }
}
