//! Ranks that are processes, over MPI.
//!
//! Collectives are made of `MPI_Isend` and `MPI_Irecv`, not of `MPI_Allreduce` and the like. That sends no more bytes and has
//! three advantages: sums are taken in rank order with any MPI library; an error can name the rank that is missing; and waiting
//! is polling, which can time out.

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
use super::{Collective, CollectiveError, CollectiveOp, HostCollective};

/// The most bytes of one MPI message. MPI counts elements in an `int`; this is far below that limit, so that messages arrive
/// often enough to show that their sender is alive.
const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// The tag of heartbeats; tags of collectives are below it.
const HEARTBEAT_TAG: i32 = 1 << 14;
/// How often a busy rank sends a heartbeat.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// How long `MPI_Abort` may take before the process exits without it.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// This process of an MPI job. Dropping it calls `MPI_Finalize`, which waits for all processes.
pub struct Mpi {
    /// Calls `MPI_Finalize` when it is dropped.
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
    /// Calls `MPI_Init_thread`, which a process may do once.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Transport`], if MPI is already initialized, or its library allows calls from the first thread only.
    pub fn open() -> Result<Self, CollectiveError> {
        let error = |message: &str| CollectiveError::Transport { rank: 0, message: message.to_string() };
        let opened = mpi::initialize_with_threading(Threading::Multiple);
        let (universe, threading) = opened.ok_or_else(|| error("MPI is already initialized"))?;
        if threading < Threading::Serialized {
            return Err(error("this MPI library allows calls from its first thread only"));
        }
        let world = universe.world();
        let local_rank = world.split_shared(world.rank()).rank() as usize;
        Ok(Self { _universe: universe, world, threading, local_rank })
    }

    /// The rank of this process, from 0.
    pub fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        self.world.size() as usize
    }

    /// The rank of this process among those on its machine.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// The collectives of this process in `devices` groups, each of one device of every process. A collective fails if a
    /// process that is not busy sends neither data nor a heartbeat for `timeout`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Transport`], for several devices if the MPI library does not allow calls from several threads at a time.
    pub fn collectives(&self, devices: usize, timeout: Duration) -> Result<Vec<Arc<dyn Collective>>, CollectiveError> {
        let rank = self.rank();
        if devices > 1 && self.threading < Threading::Multiple {
            let message =
                "several devices in a process need an MPI library with `MPI_THREAD_MULTIPLE`, and this one lacks it";
            return Err(CollectiveError::Transport { rank, message: message.to_string() });
        }
        let transport = || {
            let communicator = self.world.duplicate();
            let raw = communicator.as_raw();
            // `MPI_Comm_free` is collective: a destructor that calls it would hang if another rank has failed. `MPI_Finalize`
            // frees all communicators.
            std::mem::forget(communicator);
            // SAFETY: the communicator is valid. Errors come back as codes from now on, instead of aborting the job.
            unsafe { ffi::MPI_Comm_set_errhandler(raw, ffi::RSMPI_ERRORS_RETURN) };
            MpiTransport {
                communicator: SharedComm(raw),
                rank,
                size: self.size(),
                timeout,
                entered: AtomicU64::new(0),
                busy: AtomicUsize::new(0),
                last_heartbeat: Mutex::new(Instant::now()),
            }
        };
        Ok((0..devices).map(|_| Arc::new(HostCollective::new(transport())) as Arc<dyn Collective>).collect())
    }
}

/// An MPI communicator that any thread may use.
struct SharedComm(ffi::MPI_Comm);

// SAFETY: MPI was initialized with `MPI_THREAD_MULTIPLE`, or with `MPI_THREAD_SERIALIZED` for one device, whose calls all
// come from the one communication thread of a `Communicator`.
unsafe impl Send for SharedComm {}
// SAFETY: as above.
unsafe impl Sync for SharedComm {}

/// The transport between processes, as one of them sees it.
struct MpiTransport {
    communicator: SharedComm,
    rank: usize,
    size: usize,
    timeout: Duration,
    /// How many collectives this rank has entered.
    entered: AtomicU64,
    /// How often `set_busy(true)` was called without `set_busy(false)`.
    busy: AtomicUsize,
    last_heartbeat: Mutex<Instant>,
}

impl std::fmt::Debug for MpiTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MpiTransport").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

/// A pending send or receive.
struct Request {
    raw: ffi::MPI_Request,
    peer: usize,
}

impl MpiTransport {
    fn raw(&self) -> ffi::MPI_Comm {
        self.communicator.0
    }

    fn checked(&self, code: i32, call: &str) -> Result<(), CollectiveError> {
        if code == 0 {
            return Ok(());
        }
        Err(CollectiveError::Transport { rank: self.rank, message: format!("{call} returned error code {code}") })
    }

    /// Starts to send the `length` bytes at `start`.
    ///
    /// # Safety
    ///
    /// The bytes must stay valid and unchanged until the request is done.
    unsafe fn send(&self, start: *const u8, length: usize, to: usize, tag: i32) -> Result<Request, CollectiveError> {
        // SAFETY: a request is a plain handle, which the call overwrites.
        let mut raw = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: a constant of the library.
        let (start, kind) = (start.cast::<c_void>(), unsafe { ffi::RSMPI_UINT8_T });
        // SAFETY: the caller keeps the bytes valid.
        let code = unsafe { ffi::MPI_Isend(start, length as i32, kind, to as i32, tag, self.raw(), &mut raw) };
        self.checked(code, "MPI_Isend")?;
        Ok(Request { raw, peer: to })
    }

    /// Starts to receive `length` bytes at `start`.
    ///
    /// # Safety
    ///
    /// The bytes must be valid for writes, and nothing else may use them until the request is done.
    unsafe fn receive(&self, start: *mut u8, length: usize, from: usize, tag: i32) -> Result<Request, CollectiveError> {
        // SAFETY: as in `send`.
        let mut raw = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: a constant of the library.
        let (start, kind) = (start.cast::<c_void>(), unsafe { ffi::RSMPI_UINT8_T });
        // SAFETY: the caller keeps the bytes valid.
        let code = unsafe { ffi::MPI_Irecv(start, length as i32, kind, from as i32, tag, self.raw(), &mut raw) };
        self.checked(code, "MPI_Irecv")?;
        Ok(Request { raw, peer: from })
    }

    fn is_done(&self, request: &mut Request) -> Result<bool, CollectiveError> {
        let mut done = 0;
        // SAFETY: the request is one of this communicator's.
        let code = unsafe { ffi::MPI_Test(&mut request.raw, &mut done, ffi::RSMPI_STATUS_IGNORE) };
        self.checked(code, "MPI_Test")?;
        Ok(done != 0)
    }

    /// Receives the heartbeats that have arrived, and sets their senders' entries of `last_seen` to now.
    fn receive_heartbeats(&self, last_seen: &mut [Instant]) -> Result<(), CollectiveError> {
        loop {
            let mut arrived = 0;
            // SAFETY: a status is plain numbers, which the call overwrites.
            let mut status: ffi::MPI_Status = unsafe { std::mem::zeroed() };
            // SAFETY: all pointers are to locals.
            let code =
                unsafe { ffi::MPI_Iprobe(ffi::RSMPI_ANY_SOURCE, HEARTBEAT_TAG, self.raw(), &mut arrived, &mut status) };
            self.checked(code, "MPI_Iprobe")?;
            if arrived == 0 {
                return Ok(());
            }
            let from = status.MPI_SOURCE;
            // SAFETY: the message has arrived, and it has no bytes.
            let code = unsafe {
                let (nothing, kind, ignored) = (ptr::null_mut(), ffi::RSMPI_UINT8_T, ffi::RSMPI_STATUS_IGNORE);
                ffi::MPI_Recv(nothing, 0, kind, from, HEARTBEAT_TAG, self.raw(), ignored)
            };
            self.checked(code, "MPI_Recv")?;
            if let Some(last_seen) = last_seen.get_mut(from as usize) {
                *last_seen = Instant::now();
            }
        }
    }

    /// Waits for all requests. Fails if a rank sent neither data nor a heartbeat for the timeout.
    fn wait(&self, mut open: Vec<Request>, operation: CollectiveOp) -> Result<(), CollectiveError> {
        let mut last_seen = vec![Instant::now(); self.size];
        let mut last_checked = Instant::now();
        let mut idle_since: Option<Instant> = None;
        loop {
            let before = open.len();
            let mut index = 0;
            while index < open.len() {
                if self.is_done(&mut open[index])? {
                    last_seen[open.swap_remove(index).peer] = Instant::now();
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
            // The backward pass runs at the same time and needs the core: yield at first, then poll less often.
            if idle_since.get_or_insert_with(Instant::now).elapsed() < Duration::from_millis(2) {
                thread::yield_now();
            } else {
                thread::sleep(Duration::from_micros(100));
            }
            if last_checked.elapsed() < Duration::from_millis(100) {
                continue;
            }
            last_checked = Instant::now();
            self.receive_heartbeats(&mut last_seen)?;
            let mut missing: Vec<usize> = open.iter().map(|request| request.peer).collect();
            missing.sort_unstable();
            missing.dedup();
            missing.retain(|&peer| last_seen[peer].elapsed() >= self.timeout);
            if !missing.is_empty() {
                let seconds = self.timeout.as_secs();
                return Err(CollectiveError::Timeout {
                    rank: self.rank,
                    missing,
                    operation: operation.name(),
                    seconds,
                });
            }
        }
    }
}

/// The chunks of a message, as `(start, length)`. There is at least one: empty messages are sent too, so that every collective
/// waits for every rank.
fn chunks(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length.max(1)).step_by(MAX_MESSAGE_BYTES).map(move |start| (start, MAX_MESSAGE_BYTES.min(length - start)))
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(
        &self,
        operation: CollectiveOp,
        outgoing: Vec<Payload>,
        incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError> {
        // All ranks call the same collectives in the same order, so their counts agree. The count as tag keeps a late message of
        // a collective that timed out from being received by the next one.
        let tag = (self.entered.fetch_add(1, Ordering::Relaxed) % HEARTBEAT_TAG as u64) as i32;
        let mut received: Vec<Vec<u8>> = incoming.iter().map(|&length| vec![0; length]).collect();
        let mut start = || {
            let mut open = Vec::new();
            // Receives are posted before sends, so that arriving messages have a buffer. Each rank starts with a different
            // peer, so that they do not all send to the same one at first.
            for distance in 1..self.size {
                let from = (self.rank + self.size - distance) % self.size;
                let buffer = received[from].as_mut_ptr();
                for (start, length) in chunks(incoming[from]) {
                    // SAFETY: the chunk is in a buffer that lives until all requests are done, or is leaked.
                    open.push(unsafe { self.receive(buffer.add(start), length, from, tag)? });
                }
            }
            for distance in 1..self.size {
                let to = (self.rank + distance) % self.size;
                let buffer = outgoing[to].as_ptr();
                for (start, length) in chunks(outgoing[to].len()) {
                    // SAFETY: as above.
                    open.push(unsafe { self.send(buffer.add(start), length, to, tag)? });
                }
            }
            self.wait(open, operation)
        };
        if let Err(error) = start() {
            // Requests are still open, and MPI may read or write these buffers at any time, so they are leaked.
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

    /// Sends a heartbeat to all ranks if this one is busy.
    fn heartbeat(&self) {
        let mut last_heartbeat = self.last_heartbeat.lock().unwrap_or_else(PoisonError::into_inner);
        if self.busy.load(Ordering::Relaxed) == 0 || last_heartbeat.elapsed() < HEARTBEAT_INTERVAL {
            return;
        }
        *last_heartbeat = Instant::now();
        for to in (0..self.size).filter(|&to| to != self.rank) {
            // SAFETY: there are no bytes to keep valid. MPI frees the request when it is done.
            unsafe {
                if let Ok(mut request) = self.send(ptr::NonNull::dangling().as_ptr(), 0, to, HEARTBEAT_TAG) {
                    ffi::MPI_Request_free(&mut request.raw);
                }
            }
        }
    }

    /// Ends all processes of the job, and this one even if MPI hangs.
    fn abort(&self, _message: &str) {
        thread::spawn(|| {
            thread::sleep(ABORT_TIMEOUT);
            exit_at_once();
        });
        // Give the launcher time to forward what was written to stderr.
        thread::sleep(Duration::from_millis(200));
        // SAFETY: MPI runs as long as there is an `MpiTransport`.
        unsafe { ffi::MPI_Abort(self.raw(), 1) };
        exit_at_once();
    }
}

/// Exits without the exit handlers of libraries, which may wait for a network that is gone.
fn exit_at_once() -> ! {
    // SAFETY: POSIX's declaration; it takes any code and does not return.
    unsafe extern "C" {
        safe fn _exit(code: i32) -> !;
    }
    _exit(1)
}
