//! [`Team`]: threads that compute the phases of a token together.
//!
//! A phase is divided into chunks, which threads claim one by one. The thread that decodes could finish every phase alone; the others
//! help when they come, so a thread that another program keeps from running delays one chunk and no more. What a chunk computes does
//! not depend on the thread that claimed it: any number of threads gives the same bits.
//!
//! The helpers are tasks of rayon's pool, one for each thread but the one that decodes: a fork and join of rayon for each phase takes
//! longer than most phases. Between phases, and between tokens, they spin for a short time, because most phases end within
//! microseconds and waking a thread takes longer; then they leave the pool's thread to others, so that the scheduler can move a thread
//! that waits for a processor to theirs.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The time that a helper spins without work before it leaves: longer than the time between two tokens. A thread that sleeps in between
/// is woken on any processor, on a busy machine often on that of the thread that woke it.
const LINGER: Duration = Duration::from_millis(2);
/// The time that the caller spins for the last chunks of a phase before it sleeps, so that a helper can run on its processor.
const SPIN: Duration = Duration::from_micros(60);
/// The time of the caller's sleep. With the slack of Linux' timers it is about twice as long.
const SLEEP: Duration = Duration::from_micros(40);

/// Threads that share the chunks of a phase. Only one thread at a time may [`run`](Self::run) phases; the others help it.
#[derive(Debug)]
pub(super) struct Team {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The index of the phase in the upper half, the number of its unclaimed chunks in the lower.
    claims: AtomicU64,
    /// Chunks of the phase that are not finished.
    unfinished: AtomicUsize,
    /// The phase. Written only while no chunk is unfinished, read only by a thread that has claimed a chunk and not finished it.
    phase: UnsafeCell<Phase>,
    /// Helpers that run or wait for a thread of the pool.
    helpers: AtomicUsize,
    /// Whether a chunk panicked.
    panicked: AtomicBool,
}

/// What the chunks of a phase compute.
#[derive(Debug, Clone, Copy)]
struct Phase {
    work: *const (dyn Fn(usize) + Sync),
    chunks: usize,
}

// SAFETY: the only field that is not `Sync` is `phase`; its documentation states when it is accessed, and the accesses are ordered by
// `claims` and `unfinished`. The work is `Sync`, and `run` keeps it alive until no chunk is unfinished.
unsafe impl Sync for Shared {}
// SAFETY: as above. A pointer that stays is not used after its phase.
unsafe impl Send for Shared {}

impl Team {
    pub(super) fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                claims: AtomicU64::new(0),
                unfinished: AtomicUsize::new(0),
                phase: UnsafeCell::new(Phase { work: &|_| (), chunks: 0 }),
                helpers: AtomicUsize::new(0),
                panicked: AtomicBool::new(false),
            }),
        }
    }

    /// Starts helpers, one for each other thread of rayon's pool, if they have left.
    fn call_helpers(&self) {
        let wanted = rayon::current_num_threads() - 1;
        let present = self.shared.helpers.load(Ordering::Relaxed);
        if present < wanted {
            self.shared.helpers.fetch_add(wanted - present, Ordering::Relaxed);
            for _ in present..wanted {
                let shared = self.shared.clone();
                rayon::spawn(move || shared.help());
            }
        }
    }

    /// Runs `work(0)` to `work(chunks - 1)`, in any order and on any thread, and returns when all have ended.
    ///
    /// # Panics
    ///
    /// If a chunk panics.
    pub(super) fn run(&mut self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
        if chunks <= 1 {
            // Not worth a message to the other threads.
            (0..chunks).for_each(work);
            return;
        }
        // SAFETY: only the lifetime changes. The pointer is used by threads with an unfinished chunk of this phase, and this function
        // does not return before all chunks are finished.
        let work: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work) };
        let count = u32::try_from(chunks).expect("a phase has fewer than 2^32 chunks");
        let shared = &*self.shared;
        // SAFETY: no chunk is unfinished: the last phase waited for its chunks, and its claims are used up. No other thread runs a
        // phase, because this needs the only reference to the team.
        unsafe { *shared.phase.get() = Phase { work, chunks } };
        shared.unfinished.store(chunks, Ordering::Relaxed);
        let phase = (shared.claims.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared.claims.store(phase << 32 | u64::from(count), Ordering::Release);
        self.call_helpers();
        while shared.run_chunk() {}
        let mut wait = Wait::new();
        while shared.unfinished.load(Ordering::Acquire) > 0 {
            if wait.pause() > SPIN {
                std::thread::sleep(SLEEP);
            }
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a part of the work of a token panicked");
    }
}

impl Shared {
    /// Claims a chunk and runs it; false if there is none to claim.
    fn run_chunk(&self) -> bool {
        let mut claims = self.claims.load(Ordering::Acquire);
        loop {
            if claims as u32 == 0 {
                return false;
            }
            match self.claims.compare_exchange_weak(claims, claims - 1, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => break,
                Err(found) => claims = found,
            }
        }
        // SAFETY: this thread has claimed a chunk of the current phase, so the phase is not replaced before the chunk is finished. It
        // was written before `claims`, which this thread has read with `Acquire`.
        let Phase { work, chunks } = unsafe { *self.phase.get() };
        let chunk = chunks - claims as u32 as usize;
        // SAFETY: `run` keeps the work alive until all chunks are finished.
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*work)(chunk) }));
        if outcome.is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        // Releases what the chunk wrote.
        self.unfinished.fetch_sub(1, Ordering::Release);
        true
    }

    fn help(&self) {
        let mut wait = Wait::new();
        loop {
            if self.run_chunk() {
                wait = Wait::new();
            } else if wait.pause() > LINGER {
                break;
            }
        }
        self.helpers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Measures the time of waiting.
struct Wait {
    pauses: u32,
    since: Option<Instant>,
    waited: Duration,
}

impl Wait {
    fn new() -> Self {
        Self { pauses: 0, since: None, waited: Duration::ZERO }
    }

    /// Pauses for some nanoseconds, and returns the time since the first pause.
    fn pause(&mut self) -> Duration {
        std::hint::spin_loop();
        // Reading the clock takes longer than a pause.
        self.pauses += 1;
        if self.pauses.is_multiple_of(32) {
            self.waited = self.since.get_or_insert_with(Instant::now).elapsed();
        }
        self.waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_chunk_of_every_phase_runs_once_and_phases_follow_each_other() {
        for threads in [1, 2, 5] {
            pool(threads).install(|| {
                let mut team = Team::new();
                let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
                for phase in 0..2000 {
                    let chunks = [0, 1, 2, 7, 100][phase % 5];
                    team.run(chunks, &|chunk| {
                        counts[chunk].fetch_add(1, Ordering::Relaxed);
                    });
                    let sum: usize = counts.iter().map(|count| count.swap(0, Ordering::Relaxed)).sum();
                    assert_eq!(sum, chunks, "{threads} threads, phase {phase}");
                }
                team.run(100, &|chunk| {
                    counts[chunk].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            });
        }
    }

    #[test]
    fn helpers_that_never_come_are_not_needed() {
        let pool = pool(2);
        let release = AtomicBool::new(false);
        pool.scope(|scope| {
            // The second thread is busy until the team is done.
            scope.spawn(|_| {
                while !release.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            let sum = AtomicUsize::new(0);
            let mut team = Team::new();
            for _ in 0..10 {
                team.run(10, &|chunk| {
                    sum.fetch_add(chunk, Ordering::Relaxed);
                });
            }
            assert_eq!(sum.load(Ordering::Relaxed), 450);
            release.store(true, Ordering::Release);
        });
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller() {
        for threads in [1, 2] {
            let caught = catch_unwind(|| {
                pool(threads).install(|| Team::new().run(8, &|chunk| assert_ne!(chunk, 5, "on purpose")));
            });
            assert!(caught.is_err());
        }
    }
}
