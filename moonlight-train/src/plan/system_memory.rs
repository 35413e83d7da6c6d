//! The memory that this machine has left.

/// Bytes that a new allocation may take without swapping: what Linux says is available, or what is left of the control
/// group's limit where that is less. `None` where the system does not say.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available = available.split_whitespace().next()?.parse::<u64>().ok()? * 1024;
    Some(group_left().map_or(available, |left| available.min(left)))
}

/// Of a control group (version 2), as containers have one.
fn group_left() -> Option<u64> {
    let number =
        |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?; // `max` does not parse, and is no limit
    // Pages of files that the group has read are given back on demand.
    let stat = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(number("memory.current")?.saturating_sub(files)))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn there_is_some() {
        assert!(super::available_memory().unwrap() > 1 << 20);
    }
}
