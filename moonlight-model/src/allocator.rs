//! Memory that a step frees and the next one wants again.

/// Has the system's allocator keep freed memory for the next allocation, instead of handing it back to the kernel.
///
/// A step allocates and frees the same large tensors over and over, and every page that was handed back is faulted in and
/// cleared anew: a seventh of a step's time on the CPU. The most memory that the process holds stays what it was; it holds
/// it for longer. A program that trains or generates on the CPU calls this before anything else; it does something
/// with the GNU C library alone.
pub fn keep_freed_memory() {
    #[cfg(all(feature = "cpu", target_os = "linux", target_env = "gnu"))]
    {
        // No tensor below 2 GiB is mapped by itself.
        const LARGEST: libc::c_int = libc::c_int::MAX;
        // The heap's end is never given back: any other number is below what the gradients of a large model take.
        const NEVER: libc::c_int = -1;
        // SAFETY: both only set numbers of the allocator's.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST);
            libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
        }
    }
}
