//! Whether this process should survive its terminal.

/// Whether the process was started with SIGHUP ignored, as by `nohup`. Such a process must not install a handler for
/// the signal, which would undo `nohup`. Only detected on Linux, from `/proc`.
pub fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1, SIGHUP.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}
