//! Reads PTX: the text that LLVM and NVRTC write for a kernel.

mod parse;
mod parse_body;
mod syntax;
mod token;
mod types;

use std::fmt;

pub use syntax::{Array, Function, Instruction, Module, Operand, Parameter, Register, Space, Statement};
pub use types::Type;

/// Why a text is not PTX that this crate reads.
#[derive(Debug, PartialEq, Eq)]
pub struct Error {
    /// The line in the text, from 1.
    pub line: u32,
    /// What was found there.
    pub what: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for Error {}

impl Error {
    fn new(line: u32, what: impl Into<String>) -> Self {
        Self { line, what: what.into() }
    }
}

impl Module {
    /// Reads the text of a module.
    ///
    /// # Errors
    ///
    /// Fails with the line of the first directive or token that is not known. Instructions are read by their form only: one
    /// with an unknown name is an error of the launch that reaches it.
    pub fn parse(text: &str) -> Result<Self, Error> {
        parse::module(text)
    }
}
