//! Runs a sequence of small operations on a thread of the CPU's pool.

use burn::tensor::Device;

/// Runs `work` on a thread of rayon's pool if `device` is the CPU, and in place otherwise.
///
/// A thread of the pool starts a parallel operation itself. Any other thread sends it to the pool and sleeps until it is done.
/// When one token is decoded, that handover takes longer than most operations.
pub(crate) fn run_in_pool<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "cpu")]
    if *device == Device::flex() {
        return rayon::scope(|_| work());
    }
    let _ = device;
    work()
}
