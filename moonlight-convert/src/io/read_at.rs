//! Reading at an offset of a file, from several threads.
//!
//! Files are not memory-mapped: if a mapped file is truncated, SIGBUS kills the program, while a read returns an error.

use std::fs::File;
use std::io;

/// Fills `target` from an offset of the file.
///
/// # Errors
///
/// An I/O error, and [`io::ErrorKind::UnexpectedEof`] if the file is too short.
pub(crate) fn read_exact_at(file: &File, target: &mut [u8], at: u64) -> io::Result<()> {
    exact_at(file, target, at).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            io::Error::new(io::ErrorKind::UnexpectedEof, "it is shorter than when it was opened")
        }
        _ => error,
    })
}

#[cfg(unix)]
fn exact_at(file: &File, target: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, target, at)
}

#[cfg(windows)]
fn exact_at(file: &File, mut target: &mut [u8], mut at: u64) -> io::Result<()> {
    while !target.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, target, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                target = &mut target[read..];
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How many weight files a checkpoint keeps open, so that they can be read even after they are removed: a quarter of the
/// process's limit, at most 256.
pub(crate) fn most_kept_open() -> usize {
    const MOST: u64 = 256;
    #[cfg(target_os = "linux")]
    {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the pointer is to a value of the type that the call fills.
        if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
            return (limit.rlim_cur / 4).min(MOST) as usize;
        }
    }
    MOST as usize / 4
}
