//! Free space on a disk.

use std::path::Path;

/// Bytes that may still be written below a directory; `None` where the system does not say.
#[cfg(unix)]
pub(crate) fn free(dir: &Path) -> Option<u64> {
    let volume = rustix::fs::statvfs(dir).ok()?;
    volume.f_bavail.checked_mul(volume.f_frsize)
}

/// Bytes that may still be written below a directory; `None` where the system does not say.
#[cfg(not(unix))]
pub(crate) fn free(_dir: &Path) -> Option<u64> {
    None
}
