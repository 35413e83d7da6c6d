//! Reading at a place of a file, whoever else reads it.
//!
//! Weights are read and not looked at through a map: a map of a file that becomes shorter ends the program by a signal,
//! while a read is an error that says so.

use std::fs::File;
use std::io;

/// Fills `target` from a place of the file on.
///
/// # Errors
///
/// The system's, and [`io::ErrorKind::UnexpectedEof`] where the file ends before.
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

/// How many files of weights a checkpoint keeps open: a quarter of what the process may have, and no more than serve a
/// purpose. What is open can be read to its end also when it is removed meanwhile.
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
