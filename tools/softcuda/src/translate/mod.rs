//! Translates PTX to C, which a compiler of the host turns into code that threads of the host run.
//!
//! Each register becomes a variable, each instruction a statement. Accesses to memory are preceded by their checks; what
//! several threads do together (barriers, shuffles, products of matrices) is a call of the functions in `run`.

mod arithmetic;
mod bits;
mod control;
mod convert;
mod kernel;
mod matrix;
mod memory;
mod operand;
mod undefined;
mod unset;
mod warp;

use std::fmt::Write;

use crate::counts::Kind;
use crate::memory::{BASE, SHADOW, TOUCHED};
use crate::ptx::{Array, Module, Space};

pub use kernel::Kernel;
pub(crate) use kernel::symbol;

/// What is compiled into a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Follow values that are not defined, and report where they matter.
    pub uninitialized: bool,
    /// Report each read of memory that was not written.
    pub strict: bool,
    /// Report accesses of two threads that no barrier orders.
    pub races: bool,
    /// Count the sectors that a launch touches.
    pub distinct: bool,
}

/// A module as C.
#[derive(Debug)]
pub struct Translation {
    /// The text.
    pub source: String,
    /// Its kernels.
    pub kernels: Vec<Kernel>,
    /// Variables that the module needs in device memory, in the order of `Thread::globals`.
    pub globals: Vec<Array>,
}

const PRELUDE: [&str; 4] = [
    include_str!("c/thread.h"),
    include_str!("c/numbers.h"),
    include_str!("c/integers.h"),
    include_str!("c/atomics.h"),
];

/// Translates a module. An instruction that is not known becomes a call that fails the launch which reaches it.
pub fn translate(module: &Module, options: Options) -> Translation {
    let mut source = String::new();
    let _ = writeln!(source, "#define PTX_SHADOW {SHADOW:#x}ull");
    let _ = writeln!(
        source,
        "#define PTX_STRICT {}\n#define PTX_TRACK {}",
        u8::from(options.strict),
        u8::from(options.uninitialized)
    );
    let _ = writeln!(source, "#define PTX_RACES {}", u8::from(options.races));
    // The kind of count, or 0.
    let distinct = if options.distinct { Kind::DistinctRead as usize } else { 0 };
    let _ = writeln!(source, "#define PTX_DISTINCT {distinct}");
    let _ = writeln!(source, "#define PTX_BASE {BASE:#x}ull\n#define PTX_TOUCHED {TOUCHED:#x}ull");
    for part in PRELUDE {
        source.push_str(part);
    }
    let globals: Vec<Array> = module
        .arrays
        .iter()
        .chain(module.functions.iter().flat_map(|function| &function.arrays))
        .filter(|array| matches!(array.space, Space::Global | Space::Const))
        .cloned()
        .collect();
    let mut kernels = Vec::new();
    for function in module.functions.iter().filter(|function| function.entry) {
        kernels.push(kernel::write(module, function, &globals, options, &mut source));
    }
    Translation { source, kernels, globals }
}
