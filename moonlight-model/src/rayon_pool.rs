//! Running a chain of small operations inside the CPU's thread pool.

use burn::tensor::Device;

/// Runs `work` on one of rayon's threads, which the CPU's operations are divided among, where `device` is the CPU.
///
/// A thread of the pool divides an operation by itself; any other thread hands it over and waits, which takes longer than
/// most operations of decoding one token do.
pub(crate) fn run_in_pool<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "cpu")]
    if *device == Device::flex() {
        return rayon::scope(|_| work());
    }
    let _ = device;
    work()
}
