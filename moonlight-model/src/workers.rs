//! The thread that a chain of small operations runs on.

use burn::tensor::Device;

/// Runs `work` on one of the threads that the CPU's operations are shared out among, where `device` is the CPU.
///
/// Each operation of a chain is then shared out by a thread that takes part in it. From any other thread it is handed over
/// and waited for, which takes longer than most operations of one token do.
pub(crate) fn on_worker<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "cpu")]
    if *device == Device::flex() {
        return rayon::scope(|_| work());
    }
    let _ = device;
    work()
}
