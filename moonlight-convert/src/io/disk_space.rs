//! Free disk space.

use std::path::Path;

/// Free bytes on the disk of a directory, without those reserved for root; `None` if the system does not report them.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
pub(crate) fn free(dir: &Path) -> Option<u64> {
    let volume = rustix::fs::statvfs(dir).ok()?;
    volume.f_bavail.checked_mul(volume.f_frsize)
}

/// Free bytes on the disk of a directory; `None`, because the system does not report them.
#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
pub(crate) fn free(_dir: &Path) -> Option<u64> {
    None
}
