//! The memory of this process.

/// Resident memory in MiB; `None` where `/proc` does not say.
pub fn resident_memory_mib() -> Option<f64> {
    status("VmRSS:")
}

/// The most memory that the process ever held, in MiB; `None` where `/proc` does not say.
pub fn peak_memory_mib() -> Option<f64> {
    status("VmHWM:")
}

fn status(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}
