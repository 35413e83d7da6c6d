//! Whether the end of the terminal matters to this process.

/// Whether it was started with SIGHUP ignored, as `nohup` does for what is to outlive its terminal. Such a process must not
/// handle the signal. Only Linux can tell, by `/proc`.
pub fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1, SIGHUP.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}
