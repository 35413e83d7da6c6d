//! What generated code has of a thread. The layout is that of `translate/c/thread.h`.

use std::ffi::{c_char, c_int, c_void};

use super::{barrier, block, check, copies, matrix, moves, race, warp};

/// A thread of a block.
#[repr(C)]
pub(crate) struct Thread {
    pub(super) tid: [u32; 3],
    pub(super) ntid: [u32; 3],
    pub(super) ctaid: [u32; 3],
    pub(super) nctaid: [u32; 3],
    pub(super) linear: u32,
    pub(super) dynamic: u32,
    pub(super) launch: u32,
    /// The state of what is written with a value that is not defined.
    pub(super) spoiled: u32,
    /// Which of the registers of an instruction of a warp are not defined: of three operands, and of the result.
    pub(super) flags: [u32; 4],
    pub(super) params: u64,
    pub(super) base: u64,
    pub(super) span: u64,
    pub(super) shared: u64,
    pub(super) shared_size: u64,
    pub(super) shared_state: *mut u8,
    pub(super) globals: *const u64,
    pub(super) counts: *mut u64,
    pub(super) run: *const Runtime,
    pub(super) block: *mut c_void,
}

/// A kernel of a compiled library.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(super) body: unsafe extern "C" fn(*mut Thread),
    /// Whether threads wait for each other, so that each needs a stack.
    pub(super) sync: u32,
}

// SAFETY: the table is never written.
unsafe impl Sync for Runtime {}

/// What generated code calls. Functions that return 0 want the thread to end.
#[repr(C)]
pub(super) struct Runtime {
    fault: unsafe extern "C" fn(*mut Thread, u32, u64, u32, u32),
    race: unsafe extern "C" fn(*mut Thread, u32, u64, u32, u32) -> c_int,
    unknown: unsafe extern "C" fn(*mut Thread, *const c_char, u32),
    tick: unsafe extern "C" fn(*mut Thread, u32) -> c_int,
    barrier: unsafe extern "C" fn(*mut Thread, u32, u32, u32, *mut u32, u32) -> c_int,
    warp: unsafe extern "C" fn(*mut Thread, u32, u32, *const u32, *mut u32, u32) -> c_int,
    matrix: unsafe extern "C" fn(*mut Thread, *const u32, *const u32, *const u32, *const u32, *mut u32, u32) -> c_int,
    moves: unsafe extern "C" fn(*mut Thread, *const u32, u64, u32, *mut u32, u32) -> c_int,
    copy: unsafe extern "C" fn(*mut Thread, u64, u64, u32, u32, u32) -> c_int,
    copies: unsafe extern "C" fn(*mut Thread, u32, u32) -> c_int,
    undefined: unsafe extern "C" fn(*mut Thread, u64, u32, u32),
    derived: unsafe extern "C" fn(*mut Thread, u32, u32),
}

pub(super) static RUNTIME: Runtime = Runtime {
    fault: check::fault,
    race: race::race,
    unknown: check::unknown,
    tick: block::tick,
    barrier: barrier::barrier,
    warp: warp::warp,
    matrix: matrix::matrix,
    moves: moves::moves,
    copy: copies::copy,
    copies: copies::copies,
    undefined: check::undefined,
    derived: check::derived,
};
