//! Memory of the host that takes no room until it is written.

/// A range of memory, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut u8,
    size: usize,
}

// SAFETY: the range is owned, and what is in it is plain bytes.
unsafe impl Send for Mapping {}
// SAFETY: a shared mapping gives only its address; whoever uses it says why that is sound.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes: at `address` where one is given, below 4 GiB if `low`.
    pub(crate) fn new(address: Option<u64>, size: usize, low: bool) -> Self {
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        if address.is_some() {
            flags |= libc::MAP_FIXED_NOREPLACE;
        }
        if low {
            flags |= libc::MAP_32BIT;
        }
        let at = address.unwrap_or(0) as *mut libc::c_void;
        // SAFETY: an anonymous mapping that replaces no other.
        let start = unsafe { libc::mmap(at, size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert!(start != libc::MAP_FAILED, "softcuda: mmap of {size} bytes: {}", std::io::Error::last_os_error());
        Self { start: start.cast(), size }
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    pub(crate) fn address(&self) -> u64 {
        self.start as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}
