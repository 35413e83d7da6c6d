//! The memory of this process, from `/proc/self/status`.

/// Resident memory in MiB; `None` on systems without `/proc`.
pub fn resident_memory_mib() -> Option<f64> {
    status("VmRSS:")
}

/// Peak resident memory since the process started, in MiB; `None` on systems without `/proc`.
pub fn peak_memory_mib() -> Option<f64> {
    status("VmHWM:")
}

fn status(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}
