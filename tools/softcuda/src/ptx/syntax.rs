//! What a module consists of.

use super::Type;

/// A module: variables and functions.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// The version of PTX, as written: `8.6`.
    pub version: String,
    /// The architecture, as written: `sm_90a`.
    pub target: String,
    /// Variables outside functions.
    pub arrays: Vec<Array>,
    /// Kernels and device functions.
    pub functions: Vec<Function>,
    /// Files that `.loc` numbers.
    pub files: Vec<(u32, String)>,
}

/// Where a variable is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are PTX's")]
pub enum Space {
    Global,
    Const,
    Shared,
    Local,
    Param,
    /// Found out by the address.
    Generic,
}

/// A variable in memory.
#[derive(Clone, Debug)]
pub struct Array {
    /// Where it is.
    pub space: Space,
    /// Alignment in bytes.
    pub align: u32,
    /// Size in bytes; 0 for shared memory whose size the launch gives.
    pub size: u32,
    /// Its name, unique in its function.
    pub name: String,
    /// What it contains at first; shorter than `size` where the rest is zero.
    pub bytes: Vec<u8>,
}

/// A kernel (`.entry`) or a device function (`.func`).
#[derive(Clone, Debug)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Whether the host launches it.
    pub entry: bool,
    /// What it takes.
    pub parameters: Vec<Parameter>,
    /// Its registers.
    pub registers: Vec<Register>,
    /// Shared and local memory that it declares.
    pub arrays: Vec<Array>,
    /// Instructions and labels in order; empty for a declaration.
    pub body: Vec<Statement>,
    /// The block that `.reqntid` demands.
    pub required_block: Option<[u32; 3]>,
    /// The most threads of a block by `.maxntid`.
    pub most_threads: Option<u32>,
    /// The line of its name.
    pub line: u32,
}

/// A parameter of a kernel.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Size in bytes.
    pub size: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// A register.
#[derive(Clone, Debug)]
pub struct Register {
    /// Its name without `%`, unique in its function.
    pub name: String,
    /// Its type.
    pub ty: Type,
}

/// A part of a function's body.
#[derive(Clone, Debug)]
pub enum Statement {
    /// A place to branch to.
    Label(String),
    /// Something to do.
    Instruction(Instruction),
}

/// An instruction.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// The predicate, and whether it must be false.
    pub guard: Option<(String, bool)>,
    /// The name: `ld`.
    pub name: String,
    /// What follows the name: `["global", "v4", "b32"]`.
    pub modifiers: Vec<String>,
    /// What it works on.
    pub operands: Vec<Operand>,
    /// The line in the text.
    pub line: u32,
    /// File and line of the source, by the last `.loc`.
    pub source: Option<(u32, u32)>,
}

impl Instruction {
    /// Whether one of the modifiers has that name.
    pub fn has(&self, modifier: &str) -> bool {
        self.modifiers.iter().any(|m| m == modifier)
    }

    /// The types among the modifiers, in order.
    pub fn types(&self) -> Vec<Type> {
        self.modifiers.iter().filter_map(|m| Type::from_name(m)).collect()
    }

    /// Name and modifiers as they are written.
    pub fn opcode(&self) -> String {
        let mut out = self.name.clone();
        for modifier in &self.modifiers {
            out.push('.');
            out.push_str(modifier);
        }
        out
    }
}

/// What an instruction works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operand {
    /// A register of the function.
    Register(String),
    /// A register of the device: `tid.x`.
    Special(String),
    /// An integer, as its bits.
    Integer(u64),
    /// A number in single precision, as its bits.
    F32(u32),
    /// A number in double precision, as its bits.
    F64(u64),
    /// A variable, parameter, label or function.
    Symbol(String),
    /// `[base + offset]`.
    Address(Box<Operand>, i64),
    /// `{a, b}`, and the lists of a call.
    Vector(Vec<Operand>),
    /// `a|b`.
    Pair(Box<Operand>, Box<Operand>),
    /// `!a`.
    Not(Box<Operand>),
    /// `_`, a result that is not used.
    Sink,
}
