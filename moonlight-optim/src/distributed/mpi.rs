//! Workers that are processes, over MPI.
//!
//! Messages go from process to process by `MPI_Isend` and `MPI_Irecv`, and a collective is made of them, as libraries make
//! their own non-blocking ones. That costs no bytes and has three advantages: sums are in the order of the ranks with any
//! library; an error can name the worker that is missing; and waiting is polling, which can time out.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::Bytes;
use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{AsRaw, Communicator};

use super::transport::{Payload, Transport};
use super::{ByHost, Collective, CollectiveError, Operation};

/// Bytes of one MPI message: MPI counts them in an `int`, and each one received shows that the sender is alive.
const MESSAGE: usize = 8 << 20;
/// The tag of heartbeats; tags of operations are below it.
const ALIVE: i32 = 1 << 14;
/// How often a busy worker sends a heartbeat.
const BEAT: Duration = Duration::from_secs(1);
/// How long `MPI_Abort` may take before the process exits without it.
const LAST_RESORT: Duration = Duration::from_secs(5);

/// This process's place among the processes of an MPI job. MPI ends when it is dropped, which waits for all processes.
pub struct Mpi {
    /// Ends MPI when it is dropped.
    _universe: Universe,
    world: SimpleCommunicator,
    threading: Threading,
    local_rank: usize,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank()).field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Mpi {
    /// Starts MPI; once in a process.
    ///
    /// # Errors
    ///
    /// A library that cannot be called from more than one thread, or that was started before.
    pub fn open() -> Result<Self, CollectiveError> {
        let error = |message: &str| CollectiveError::Transport { rank: 0, message: message.to_string() };
        let opened = mpi::initialize_with_threading(Threading::Multiple);
        let (universe, threading) = opened.ok_or_else(|| error("MPI was started before"))?;
        if threading < Threading::Serialized {
            return Err(error("this MPI can be called from its first thread alone"));
        }
        let world = universe.world();
        let local_rank = world.split_shared(world.rank()).rank() as usize;
        Ok(Self { _universe: universe, world, threading, local_rank })
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        self.world.size() as usize
    }

    /// This process's rank among those of its machine.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// One group of all processes for each of `devices` devices that a process has. An operation fails if a
    /// process that is not busy shows no sign of life for `timeout`.
    ///
    /// # Errors
    ///
    /// A library that several threads cannot call at the same time, where there are several devices.
    pub fn collectives(&self, devices: usize, timeout: Duration) -> Result<Vec<Arc<dyn Collective>>, CollectiveError> {
        let rank = self.rank();
        if devices > 1 && self.threading < Threading::Multiple {
            let message =
                "this MPI cannot be called from several threads at a time, as several devices in a process do";
            return Err(CollectiveError::Transport { rank, message: message.to_string() });
        }
        let processes = || {
            let communicator = self.world.duplicate();
            let raw = communicator.as_raw();
            // To free one is a collective operation, and has no place in a destructor. MPI's end frees them all.
            std::mem::forget(communicator);
            // SAFETY: the communicator is one; errors come back as codes from then on.
            unsafe { ffi::MPI_Comm_set_errhandler(raw, ffi::RSMPI_ERRORS_RETURN) };
            Processes {
                communicator: Shared(raw),
                rank,
                size: self.size(),
                timeout,
                operations: AtomicU64::new(0),
                busy: AtomicUsize::new(0),
                beaten: Mutex::new(Instant::now()),
            }
        };
        Ok((0..devices).map(|_| Arc::new(ByHost::new(processes())) as Arc<dyn Collective>).collect())
    }
}

/// A communicator that a process may use on any thread, one at a time.
struct Shared(ffi::MPI_Comm);

// SAFETY: MPI was started with `MPI_THREAD_MULTIPLE`, or with `MPI_THREAD_SERIALIZED` for one device, which one thread of a
// `Worker` calls.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A process's end of a group of processes.
struct Processes {
    communicator: Shared,
    rank: usize,
    size: usize,
    timeout: Duration,
    operations: AtomicU64,
    busy: AtomicUsize,
    beaten: Mutex<Instant>,
}

impl std::fmt::Debug for Processes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Processes").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

/// A pending send or receive.
struct Request {
    raw: ffi::MPI_Request,
    peer: usize,
}

impl Processes {
    fn raw(&self) -> ffi::MPI_Comm {
        self.communicator.0
    }

    fn checked(&self, code: i32, call: &str) -> Result<(), CollectiveError> {
        if code == 0 {
            return Ok(());
        }
        Err(CollectiveError::Transport { rank: self.rank, message: format!("{call} gave the error {code}") })
    }

    /// Starts to send the `length` bytes at `start`.
    ///
    /// # Safety
    ///
    /// They must stay there, unchanged, until the request is done.
    unsafe fn send(&self, start: *const u8, length: usize, to: usize, tag: i32) -> Result<Request, CollectiveError> {
        // SAFETY: a request is a plain handle, which the call overwrites.
        let mut raw = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: a constant of the library.
        let (start, kind) = (start.cast::<c_void>(), unsafe { ffi::RSMPI_UINT8_T });
        // SAFETY: the caller keeps the bytes.
        let code = unsafe { ffi::MPI_Isend(start, length as i32, kind, to as i32, tag, self.raw(), &mut raw) };
        self.checked(code, "MPI_Isend")?;
        Ok(Request { raw, peer: to })
    }

    /// Starts to receive `length` bytes at `start`.
    ///
    /// # Safety
    ///
    /// They must be writable and unused by anything else until the request is done.
    unsafe fn receive(&self, start: *mut u8, length: usize, from: usize, tag: i32) -> Result<Request, CollectiveError> {
        // SAFETY: as in `send`.
        let mut raw = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: a constant of the library.
        let (start, kind) = (start.cast::<c_void>(), unsafe { ffi::RSMPI_UINT8_T });
        // SAFETY: the caller keeps the bytes.
        let code = unsafe { ffi::MPI_Irecv(start, length as i32, kind, from as i32, tag, self.raw(), &mut raw) };
        self.checked(code, "MPI_Irecv")?;
        Ok(Request { raw, peer: from })
    }

    /// Whether a request is done.
    fn is_done(&self, request: &mut Request) -> Result<bool, CollectiveError> {
        let mut done = 0;
        // SAFETY: the request is one of this communicator's.
        let code = unsafe { ffi::MPI_Test(&mut request.raw, &mut done, ffi::RSMPI_STATUS_IGNORE) };
        self.checked(code, "MPI_Test")?;
        Ok(done != 0)
    }

    /// Receives pending heartbeats.
    fn signs(&self, seen: &mut [Instant]) -> Result<(), CollectiveError> {
        loop {
            let mut there = 0;
            // SAFETY: a status is plain numbers, which the call overwrites.
            let mut status: ffi::MPI_Status = unsafe { std::mem::zeroed() };
            // SAFETY: all pointers are to what lives here.
            let code = unsafe { ffi::MPI_Iprobe(ffi::RSMPI_ANY_SOURCE, ALIVE, self.raw(), &mut there, &mut status) };
            self.checked(code, "MPI_Iprobe")?;
            if there == 0 {
                return Ok(());
            }
            let from = status.MPI_SOURCE;
            // SAFETY: the message is there, and it has no bytes.
            let code = unsafe {
                let (nothing, kind, ignored) = (ptr::null_mut(), ffi::RSMPI_UINT8_T, ffi::RSMPI_STATUS_IGNORE);
                ffi::MPI_Recv(nothing, 0, kind, from, ALIVE, self.raw(), ignored)
            };
            self.checked(code, "MPI_Recv")?;
            if let Some(seen) = seen.get_mut(from as usize) {
                *seen = Instant::now();
            }
        }
    }

    /// Waits for all requests; fails if a worker was silent for the timeout.
    fn wait(&self, mut open: Vec<Request>, operation: Operation) -> Result<(), CollectiveError> {
        let mut seen = vec![Instant::now(); self.size];
        let mut looked = Instant::now();
        let mut idle_since: Option<Instant> = None;
        loop {
            let before = open.len();
            let mut index = 0;
            while index < open.len() {
                if self.is_done(&mut open[index])? {
                    seen[open.swap_remove(index).peer] = Instant::now();
                } else {
                    index += 1;
                }
            }
            if open.is_empty() {
                return Ok(());
            }
            if open.len() < before {
                idle_since = None;
                continue;
            }
            // Yield to computing threads, and poll less often after a while.
            if idle_since.get_or_insert_with(Instant::now).elapsed() < Duration::from_millis(2) {
                thread::yield_now();
            } else {
                thread::sleep(Duration::from_micros(100));
            }
            if looked.elapsed() < Duration::from_millis(100) {
                continue;
            }
            looked = Instant::now();
            self.signs(&mut seen)?;
            let mut missing: Vec<usize> = open.iter().map(|request| request.peer).collect();
            missing.sort_unstable();
            missing.dedup();
            missing.retain(|&peer| seen[peer].elapsed() >= self.timeout);
            if !missing.is_empty() {
                let seconds = self.timeout.as_secs();
                return Err(CollectiveError::Silent { rank: self.rank, missing, operation: operation.name(), seconds });
            }
        }
    }
}

/// The chunks of a message: at least one, so that every operation has a message from each to each.
fn stretches(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length.max(1)).step_by(MESSAGE).map(move |start| (start, MESSAGE.min(length - start)))
}

impl Transport for Processes {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(
        &self,
        operation: Operation,
        outgoing: Vec<Payload>,
        incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError> {
        // The order of operations is the same on all ranks; tags still keep one that timed out from being taken for the next.
        let tag = (self.operations.fetch_add(1, Ordering::Relaxed) % ALIVE as u64) as i32;
        let mut received: Vec<Vec<u8>> = incoming.iter().map(|&length| vec![0; length]).collect();
        let mut start = || {
            let mut open = Vec::new();
            // In a different order on each rank, so that not all send to the same one at first.
            for distance in 1..self.size {
                let from = (self.rank + self.size - distance) % self.size;
                let place = received[from].as_mut_ptr();
                for (start, length) in stretches(incoming[from]) {
                    // SAFETY: the chunk is in a buffer that lives until all requests are done, or is leaked.
                    open.push(unsafe { self.receive(place.add(start), length, from, tag)? });
                }
            }
            for distance in 1..self.size {
                let to = (self.rank + distance) % self.size;
                let place = outgoing[to].as_ptr();
                for (start, length) in stretches(outgoing[to].len()) {
                    // SAFETY: as above.
                    open.push(unsafe { self.send(place.add(start), length, to, tag)? });
                }
            }
            self.wait(open, operation)
        };
        if let Err(error) = start() {
            // MPI may still write to these buffers.
            std::mem::forget((received, outgoing));
            return Err(error);
        }
        Ok(received.into_iter().map(|bytes| Arc::new(Bytes::from_bytes_vec(bytes))).collect())
    }

    fn set_busy(&self, busy: bool) {
        match busy {
            true => self.busy.fetch_add(1, Ordering::Relaxed),
            false => self.busy.fetch_sub(1, Ordering::Relaxed),
        };
    }

    /// A heartbeat to all, while this worker is busy.
    fn idle(&self) {
        let mut beaten = self.beaten.lock().unwrap_or_else(PoisonError::into_inner);
        if self.busy.load(Ordering::Relaxed) == 0 || beaten.elapsed() < BEAT {
            return;
        }
        *beaten = Instant::now();
        for to in (0..self.size).filter(|&to| to != self.rank) {
            // SAFETY: there are no bytes to keep alive. The request is freed by MPI when it is done.
            unsafe {
                if let Ok(mut request) = self.send(ptr::NonNull::dangling().as_ptr(), 0, to, ALIVE) {
                    ffi::MPI_Request_free(&mut request.raw);
                }
            }
        }
    }

    /// Ends all processes of the job, and this one in any case.
    fn fail(&self, _message: &str) {
        thread::spawn(|| {
            thread::sleep(LAST_RESORT);
            exit_at_once();
        });
        // Let the launcher forward what was written to stderr.
        thread::sleep(Duration::from_millis(200));
        // SAFETY: MPI runs as long as there is a `Processes`.
        unsafe { ffi::MPI_Abort(self.raw(), 1) };
        exit_at_once();
    }
}

/// Ends the process without the exit handlers of libraries, which may wait for a network that is gone.
fn exit_at_once() -> ! {
    // SAFETY: POSIX's declaration; it takes any code and does not return.
    unsafe extern "C" {
        safe fn _exit(code: i32) -> !;
    }
    _exit(1)
}
