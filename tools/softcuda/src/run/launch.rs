//! A launch: blocks on threads of the host.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::counts::KINDS;

use super::block::{Block, Fault};
use super::thread::Entry;

/// What is launched.
pub(crate) struct Launch<'a> {
    pub(crate) entry: Entry,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    /// Bytes of shared memory, and how many of them the launch gives.
    pub(crate) shared: u32,
    pub(crate) dynamic: u32,
    /// The address of the parameters.
    pub(crate) params: u64,
    pub(crate) base: u64,
    pub(crate) span: u64,
    /// Addresses of the module's variables.
    pub(crate) globals: &'a [u64],
    /// The number of the launch, from 1.
    pub(crate) number: u32,
    pub(crate) deadline: Instant,
    pub(crate) races: bool,
    pub(crate) exits_allowed: bool,
    /// Whether sectors are counted.
    pub(crate) distinct: bool,
    pub(crate) threads: usize,
    /// The state of what is written with a value that is not defined.
    pub(crate) spoiled: u32,
}

/// Blocks that are not in use. In boxes, because threads have the address of their block.
#[allow(clippy::vec_box, reason = "as above")]
static IDLE: Mutex<Vec<Box<Block>>> = Mutex::new(Vec::new());

#[allow(clippy::vec_box, reason = "as above")]
fn idle() -> std::sync::MutexGuard<'static, Vec<Box<Block>>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs all blocks. Returns what was counted, the first fault, and the first read of what is not defined.
pub(crate) fn run(launch: &Launch<'_>) -> ([u64; KINDS], Option<Fault>, Option<Fault>) {
    let blocks: u64 = launch.grid.iter().map(|&size| u64::from(size)).product();
    let per_block: u64 = launch.block.iter().map(|&size| u64::from(size)).product();
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let result = Mutex::new(([0; KINDS], None, None));
    let some = || {
        let mut block = idle().pop().unwrap_or_else(Block::new);
        block.begin(launch);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= blocks || failed.load(Ordering::Relaxed) {
                break;
            }
            block.run(launch.entry, launch.grid, index);
            if block.fault.is_some() {
                failed.store(true, Ordering::Relaxed);
                break;
            }
        }
        let mut result = result.lock().unwrap_or_else(PoisonError::into_inner);
        for (sum, more) in result.0.iter_mut().zip(&block.counts) {
            *sum += more;
        }
        if result.1.is_none() {
            result.1 = block.fault.take();
        }
        if result.2.is_none() {
            result.2 = block.origin.take();
        }
        idle().push(block);
    };
    // Threads of the host cost more than a small launch.
    let others =
        if blocks > 1 && blocks * per_block >= 2048 { (launch.threads - 1).min(blocks as usize - 1) } else { 0 };
    if others == 0 {
        some();
    } else {
        std::thread::scope(|scope| {
            for _ in 0..others {
                scope.spawn(some);
            }
            some();
        });
    }
    result.into_inner().unwrap_or_else(PoisonError::into_inner)
}
