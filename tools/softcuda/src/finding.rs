//! What is wrong with a launch, in words.

use std::sync::{Mutex, PoisonError};

use crate::driver::error as code;
use crate::memory::{Memory, Wrong};
use crate::ptx::{Module, Statement};
use crate::run::{Fault, FaultKind};

/// A line for the log about a fault of a kernel whose text is `ptx`.
pub(crate) fn describe(kernel: &str, fault: &Fault, ptx: &str, module: &Module, memory: &Memory) -> String {
    let text = ptx.lines().nth((fault.line as usize).saturating_sub(1)).unwrap_or("").trim();
    let [bx, by, bz] = fault.block;
    let [x, y, z] = fault.thread;
    let source = source(module, kernel, fault.line).unwrap_or_default();
    format!(
        "kernel `{kernel}`: {}; block ({bx}, {by}, {bz}), thread ({x}, {y}, {z}), PTX line {} `{text}`{source}",
        what(fault, ptx, memory),
        fault.line
    )
}

fn what(fault: &Fault, ptx: &str, memory: &Memory) -> String {
    match &fault.kind {
        FaultKind::Access { wrong, access, address, size } => {
            format!(
                "{} {} of {size} bytes of global memory at {address:#x}, {}",
                adjective(wrong),
                noun(*access),
                memory.whereabouts(*address)
            )
        }
        FaultKind::Shared { wrong, access, at, size, whole } => {
            format!(
                "{} {} of {size} bytes at byte {at} of {whole} bytes of shared memory",
                adjective(wrong),
                noun(*access)
            )
        }
        FaultKind::Local { wrong, access, size } => {
            format!("{} {} of {size} bytes of local memory", adjective(wrong), noun(*access))
        }
        FaultKind::Race { access, address, size, shared, other, other_line } => {
            let place = match shared {
                Some(at) => format!("byte {at} of shared memory"),
                None => format!("global memory at {address:#x}, {}", memory.whereabouts(*address)),
            };
            let line = ptx.lines().nth((*other_line as usize).saturating_sub(1)).unwrap_or("").trim();
            format!("race: {} of {size} bytes, {place}, after {other} (PTX line {other_line} `{line}`)", noun(*access))
        }
        FaultKind::Barrier(text) => text.clone(),
        FaultKind::Undefined(what) => format!("{what} a value that is computed from memory that was not written"),
        FaultKind::Timeout => "the kernel does not end".into(),
        FaultKind::Unknown(text) => format!("not supported: {text}"),
    }
}

fn adjective(wrong: &Wrong) -> &'static str {
    match wrong {
        Wrong::OutOfBounds => "out-of-bounds",
        Wrong::AfterFree => "use after free:",
        Wrong::Uninitialized => "uninitialized",
        Wrong::Misaligned => "misaligned",
    }
}

fn noun(access: u32) -> &'static str {
    match access & 3 {
        0 => "read",
        1 => "write",
        _ => "atomic operation",
    }
}

/// What was read first of what is not defined, by launches that wrote values computed from it.
static ORIGINS: Mutex<[Option<String>; 128]> = Mutex::new([const { None }; 128]);

/// Remembers the first read of a launch for the state that it writes.
pub(crate) fn remember(state: u32, origin: String) {
    if let Some(entry) = ORIGINS.lock().unwrap_or_else(PoisonError::into_inner).get_mut(state as usize) {
        *entry = Some(origin);
    }
}

/// What is known of how a byte of that state was written.
pub(crate) fn origin(state: u8) -> String {
    let origins = ORIGINS.lock().unwrap_or_else(PoisonError::into_inner);
    match origins.get(usize::from(state)).and_then(Option::as_ref) {
        Some(origin) => format!(
            ", written with a value computed from memory that was not written; the first such read was: {origin}"
        ),
        None => String::new(),
    }
}

/// The error that a program sees.
pub(crate) fn result(fault: &Fault) -> i32 {
    match &fault.kind {
        FaultKind::Access { wrong: Wrong::Misaligned, .. }
        | FaultKind::Shared { wrong: Wrong::Misaligned, .. }
        | FaultKind::Local { wrong: Wrong::Misaligned, .. } => code::MISALIGNED_ADDRESS,
        FaultKind::Access { wrong: Wrong::OutOfBounds | Wrong::AfterFree, .. }
        | FaultKind::Shared { wrong: Wrong::OutOfBounds, .. }
        | FaultKind::Local { .. } => code::ILLEGAL_ADDRESS,
        FaultKind::Timeout => code::LAUNCH_TIMEOUT,
        FaultKind::Unknown(_) => code::NOT_SUPPORTED,
        // A device would not notice.
        _ => code::LAUNCH_FAILED,
    }
}

/// File and line of the source, where the compiler has left them.
fn source(module: &Module, kernel: &str, line: u32) -> Option<String> {
    let function = module.functions.iter().find(|function| function.name == kernel)?;
    let (file, number) = function.body.iter().find_map(|statement| match statement {
        Statement::Instruction(instruction) if instruction.line == line => instruction.source,
        _ => None,
    })?;
    let name = module.files.iter().find(|(number, _)| *number == file).map_or("?", |(_, name)| name);
    Some(format!(", source {name}:{number}"))
}
