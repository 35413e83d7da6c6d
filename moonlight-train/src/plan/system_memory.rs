//! The memory that is free on this machine.

/// Bytes that can be allocated without swapping: Linux's `MemAvailable`, or the rest of the control group's limit if that is less. `None` on other systems.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available = available.split_whitespace().next()?.parse::<u64>().ok()? * 1024;
    Some(control_group_left().map_or(available, |left| available.min(left)))
}

/// The bytes left of the limit of a control group (version 2), which containers have.
fn control_group_left() -> Option<u64> {
    let number =
        |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?; // without a limit the file contains `max`, which does not parse
    // The page cache is part of `memory.current`, and the kernel reclaims it on demand.
    let stat = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(number("memory.current")?.saturating_sub(files)))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn linux_reports_available_memory() {
        assert!(super::available_memory().unwrap() > 1 << 20);
    }
}
