//! A block: its threads, what they wait for, and what went wrong.

use std::ffi::c_int;
use std::time::Instant;

use crate::counts::KINDS;
use crate::memory::{Mapping, Wrong};

use super::barrier::Barrier;
use super::copies::Copies;
use super::fiber::{MOST, Stacks, switch};
use super::launch::Launch;
use super::thread::{Entry, Thread};
use super::warp::Warp;

/// The most shared memory of a block.
pub(super) const SHARED: usize = 1 << 20;

/// What a thread did that a program must not do.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    /// What it was.
    pub kind: FaultKind,
    /// The block.
    pub block: [u32; 3],
    /// The thread.
    pub thread: [u32; 3],
    /// The line of the PTX.
    pub line: u32,
}

/// What can be wrong.
#[derive(Clone, Debug)]

pub(crate) enum FaultKind {
    Access {
        wrong: Wrong,
        access: u32,
        address: u64,
        size: u32,
    },
    Shared {
        wrong: Wrong,
        access: u32,
        at: i64,
        size: u32,
        whole: u32,
    },
    Local {
        wrong: Wrong,
        access: u32,
        size: u32,
    },
    Race {
        access: u32,
        address: u64,
        size: u32,
        shared: Option<u32>,
        other: String,
        other_line: u32,
    },
    Barrier(String),
    /// What a value that is not defined decides.
    Undefined(&'static str),
    Timeout,
    Unknown(String),
}

pub(super) const WRITE: u32 = 1;
pub(super) const ATOMIC: u32 = 2;
pub(super) const STRONG: u32 = 4;
pub(super) const GLOBAL: u32 = 0;
pub(super) const IN_SHARED: u32 = 16;
pub(super) const IN_LOCAL: u32 = 32;

pub(super) struct Block {
    pub(super) threads: Vec<Thread>,
    fibers: Vec<*mut u8>,
    pub(super) warps: Vec<Warp>,
    pub(super) barriers: [Barrier; 16],
    pub(super) copies: Vec<Copies>,
    scheduler: *mut u8,
    stacks: Stacks,
    shared: Mapping,
    shared_state: Vec<u8>,
    /// The last accesses to shared memory; only if races are looked for.
    pub(super) last: Vec<[super::race::Last; 2]>,
    pub(super) alive: u32,
    pub(super) count: u32,
    pub(super) index: u64,
    pub(super) launch: u32,
    /// Counts barriers, and the value at the last one of all threads.
    pub(super) clock: u32,
    pub(super) since: u32,
    /// Whether a thread gave up its turn although it can run.
    yielded: bool,
    pub(super) counts: [u64; KINDS],
    pub(super) fault: Option<Fault>,
    /// The first read of what is not defined.
    pub(super) origin: Option<Fault>,
    deadline: Option<Instant>,
    pub(super) exits_allowed: bool,
    pub(super) distinct: bool,
}

// SAFETY: pointers in a block are to its own stacks, shared memory and threads.
unsafe impl Send for Block {}

impl Block {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            threads: Vec::new(),
            fibers: vec![std::ptr::null_mut(); MOST],
            warps: (0..MOST / 32).map(|_| Warp::default()).collect(),
            barriers: Default::default(),
            copies: (0..MOST).map(|_| Copies::default()).collect(),
            scheduler: std::ptr::null_mut(),
            stacks: Stacks::new(),
            // Code by NVRTC computes with addresses of 32 bits in shared memory.
            shared: Mapping::new(None, SHARED, true),
            shared_state: vec![0; SHARED],
            last: Vec::new(),
            alive: 0,
            count: 0,
            index: 0,
            launch: 0,
            clock: 0,
            since: 0,
            yielded: false,
            counts: [0; KINDS],
            fault: None,
            origin: None,
            deadline: None,
            exits_allowed: false,
            distinct: false,
        })
    }

    /// Prepares the threads for the blocks of a launch.
    pub(super) fn begin(&mut self, launch: &Launch<'_>) {
        let [x, y, z] = launch.block;
        let block: *mut Self = self;
        self.count = x * y * z;
        self.counts = [0; KINDS];
        self.fault = None;
        self.origin = None;
        self.launch = launch.number;
        self.deadline = Some(launch.deadline);
        self.exits_allowed = launch.exits_allowed;
        self.distinct = launch.distinct;
        if launch.races && self.last.is_empty() {
            self.last = vec![Default::default(); SHARED];
        }
        let (shared, shared_state) = (self.shared.address(), self.shared_state.as_mut_ptr());
        let counts = self.counts.as_mut_ptr();
        self.threads.clear();
        self.threads.extend((0..self.count).map(|i| Thread {
            tid: [i % x, i / x % y, i / x / y],
            ntid: launch.block,
            ctaid: [0; 3],
            nctaid: launch.grid,
            linear: i,
            dynamic: launch.dynamic,
            launch: launch.number,
            spoiled: launch.spoiled,
            flags: [0; 4],
            params: launch.params,
            base: launch.base,
            span: launch.span,
            shared,
            shared_size: launch.shared.into(),
            shared_state,
            globals: launch.globals.as_ptr(),
            counts,
            run: &raw const super::thread::RUNTIME,
            block: block.cast(),
        }));
    }

    /// Runs the block of that number. `self.fault` is set if it fails.
    pub(super) fn run(&mut self, entry: Entry, grid: [u32; 3], index: u64) {
        let ctaid = [
            (index % u64::from(grid[0])) as u32,
            (index / u64::from(grid[0]) % u64::from(grid[1])) as u32,
            (index / u64::from(grid[0]) / u64::from(grid[1])) as u32,
        ];
        for thread in &mut self.threads {
            thread.ctaid = ctaid;
        }
        self.index = index;
        let shared = self.threads[0].shared_size as usize;
        // What a thread reads before it is written is nothing in particular.
        // SAFETY: the launch demands no more shared memory than is mapped.
        unsafe { std::ptr::write_bytes(self.shared.start(), 0xcd, shared) };
        self.shared_state[..shared].fill(0);
        if entry.sync == 0 {
            // No thread waits, so that all run on this stack.
            self.alive = 0;
            ENTRY.set(None);
            for i in 0..self.count as usize {
                let thread = &raw mut self.threads[i];
                // SAFETY: generated code for a thread of this block.
                unsafe { (entry.body)(thread) };
                if self.fault.is_some() {
                    return;
                }
                self.copies[i].clear();
            }
            return;
        }
        self.fibers(entry);
    }

    fn fibers(&mut self, entry: Entry) {
        let count = self.count as usize;
        self.alive = self.count;
        self.barriers = Default::default();
        self.clock += 1;
        self.since = self.clock;
        for i in 0..count {
            let thread = &raw mut self.threads[i];
            self.fibers[i] = self.stacks.prepare(i, thread_main, thread);
            self.copies[i].clear();
        }
        for (i, warp) in self.warps[..count.div_ceil(32)].iter_mut().enumerate() {
            let lanes = (count - i * 32).min(32);
            warp.begin(if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 }, self.clock);
        }
        ENTRY.set(Some(entry));
        let warps = count.div_ceil(32);
        let this: *mut Self = self;
        loop {
            let mut ran = false;
            self.yielded = false;
            for at in 0..warps {
                loop {
                    let mut any = false;
                    let mut lanes = self.warps[at].ready;
                    while lanes != 0 {
                        let lane = lanes.trailing_zeros() as usize;
                        lanes &= lanes - 1;
                        any = true;
                        // SAFETY: the fiber was prepared above or stopped in `pause`; it comes back by `pause` or at its end.
                        unsafe { switch(&raw mut (*this).scheduler, (&(*this).fibers)[at * 32 + lane]) };
                        if self.fault.is_some() {
                            return;
                        }
                    }
                    ran |= any;
                    if (!any && !self.warps[at].settle_active()) || self.yielded {
                        break;
                    }
                    ran = true;
                }
            }
            if self.alive == 0 {
                return;
            }
            if !ran {
                self.deadlock();
                return;
            }
        }
    }

    fn deadlock(&mut self) {
        let mut waits: Vec<(u32, String)> = Vec::new();
        for (i, thread) in self.threads.iter().enumerate() {
            let warp = &self.warps[i / 32];
            if warp.alive >> (i % 32) & 1 == 0 {
                continue;
            }
            let what = match warp.at_barrier >> (i % 32) & 1 {
                1 => format!("the barrier of line {}", warp.lines[i % 32]),
                _ => format!("threads of their warp at line {}", warp.lines[i % 32]),
            };
            match waits.iter_mut().find(|(_, known)| *known == what) {
                Some((count, _)) => *count += 1,
                None => waits.push((1, what)),
            }
            let _ = thread;
        }
        let list: Vec<String> =
            waits.into_iter().map(|(count, what)| format!("{count} threads wait for {what}")).collect();
        let ended = self.count - self.alive;
        let ended = if ended > 0 { format!("{ended} threads have ended, ") } else { String::new() };
        let stuck = (0..self.count as usize).find(|&i| self.warps[i / 32].alive >> (i % 32) & 1 == 1).unwrap_or(0);
        let line = self.warps[stuck / 32].lines[stuck % 32];
        self.fail(stuck, line, FaultKind::Barrier(format!("no thread can continue: {ended}{}", list.join(", "))));
    }

    /// Remembers the first fault.
    pub(super) fn fail(&mut self, linear: usize, line: u32, kind: FaultKind) {
        let thread = &self.threads[linear];
        self.fault.get_or_insert(Fault { kind, block: thread.ctaid, thread: thread.tid, line });
    }
}

thread_local! {
    /// The kernel that fibers of this thread start.
    static ENTRY: std::cell::Cell<Option<Entry>> = const { std::cell::Cell::new(None) };
}

pub(super) unsafe fn block_of<'a>(thread: *mut Thread) -> &'a mut Block {
    // SAFETY: threads are made by `begin` with the address of their block, which outlives them; only one fiber runs at a time.
    unsafe { &mut *(*thread).block.cast::<Block>() }
}

/// Stops a thread until the scheduler continues it.
pub(super) unsafe fn pause(thread: *mut Thread) {
    // SAFETY: called on the fiber of this thread; the scheduler has saved where it is.
    unsafe {
        let block: *mut Block = (*thread).block.cast();
        let fiber = (*block).fibers.as_mut_ptr().add((*thread).linear as usize);
        switch(fiber, (*block).scheduler);
    }
}

unsafe extern "C" fn thread_main(thread: *mut Thread) -> ! {
    // SAFETY: the first function of a fiber, with the thread that it was prepared for.
    unsafe {
        if let Some(entry) = ENTRY.get() {
            (entry.body)(thread);
        }
        let linear = (*thread).linear as usize;
        let block = block_of(thread);
        block.alive -= 1;
        block.copies[linear].clear();
        block.warps[linear / 32].end(linear as u32 % 32);
        super::barrier::ended(block);
        loop {
            pause(thread);
        }
    }
}

/// Called now and then by loops.
pub(super) unsafe extern "C" fn tick(thread: *mut Thread, line: u32) -> c_int {
    // SAFETY: called by generated code with its thread.
    let block = unsafe { block_of(thread) };
    if block.deadline.is_some_and(|deadline| Instant::now() > deadline) {
        // SAFETY: as above.
        block.fail(unsafe { (*thread).linear } as usize, line, FaultKind::Timeout);
        return 0;
    }
    if block.alive > 0 && ENTRY.get().is_some_and(|entry| entry.sync != 0) {
        block.yielded = true;
        // SAFETY: the thread runs on its fiber, and stays ready.
        unsafe { pause(thread) };
    }
    1
}
