//! Whether NCCL can be used.

/// Whether NCCL is installed. Burn calls it through cudarc, which opens `libnccl.so` when it is first needed, and panics without it.
/// NVIDIA's packages for running programs have `libnccl.so.2` alone, which cudarc 0.19 does not look for.
pub(super) fn is_installed() -> bool {
    #[cfg(feature = "cuda")]
    // SAFETY: NCCL's initializers are those of an ordinary library, and nothing is called.
    return unsafe { libloading::Library::new("libnccl.so") }.is_ok();
    #[cfg(not(feature = "cuda"))]
    false
}
