//! Modules by NVIDIA's assembler, for the device and for other architectures: what it refuses, a driver refuses.

use std::fs;
use std::process::Command;

use crate::compile::hash;
use crate::settings::Settings;

/// Number and suffix of an architecture: `sm_90a` is 90 and `a`.
fn parts(architecture: &str) -> (u32, &str) {
    let digits = architecture.trim_start_matches("sm_");
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    (digits[..end].parse().unwrap_or(0), &digits[end..])
}

/// The architectures of the list that a module of that target can be assembled for. Instructions of `sm_90a` are of 9.0 only.
fn fitting<'a>(target: &str, list: &'a [String]) -> Vec<&'a str> {
    let (number, suffix) = parts(target);
    let fits = |architecture: &&'a str| {
        let (wanted, _) = parts(architecture);
        if suffix.is_empty() { wanted >= number } else { wanted == number }
    };
    list.iter().map(String::as_str).filter(fits).collect()
}

/// Assembles a module for each architecture that it is for. Does nothing without an assembler.
///
/// # Errors
///
/// Fails with the first architecture that refuses it, and what the assembler prints.
pub(crate) fn check(ptx: &str, target: &str, settings: &Settings) -> Result<usize, String> {
    let Some(ptxas) = &settings.ptxas else { return Ok(0) };
    let own = [format!("{}{}", settings.sm, parts(target).1)];
    let list = if settings.architectures.is_empty() { &own[..] } else { &settings.architectures };
    let fitting = fitting(target, list);
    for architecture in &fitting {
        let key = hash(&[ptx, architecture, &ptxas.to_string_lossy()]);
        let marker = settings.folder.join(format!("{key:016x}.sm_{architecture}"));
        if marker.exists() {
            continue;
        }
        fs::create_dir_all(&settings.folder).map_err(|error| error.to_string())?;
        // Another thread may assemble the same text for another device, or another process: each has a file of its own.
        let (process, thread) = (std::process::id(), format!("{:?}", std::thread::current().id()));
        let text = settings.folder.join(format!("{key:016x}-{process}-{}.ptx", thread.replace(['(', ')'], "")));
        fs::write(&text, ptx).map_err(|error| error.to_string())?;
        let output = Command::new(ptxas)
            .arg(format!("-arch=sm_{architecture}"))
            .args(["-o", "/dev/null"])
            .arg(&text)
            .env_remove("LD_LIBRARY_PATH")
            .output()
            .map_err(|error| format!("`{}` cannot be run: {error}", ptxas.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("sm_{architecture}: {} (`{}`)", said.trim(), text.display()));
        }
        let _ = fs::remove_file(&text);
        fs::write(&marker, "").map_err(|error| error.to_string())?;
    }
    Ok(fitting.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_assembled_for_later_architectures_only() {
        let list = ["75", "80", "90a", "100a"].map(String::from);
        assert_eq!(fitting("sm_80", &list), ["80", "90a", "100a"]);
        assert_eq!(fitting("sm_75", &list), ["75", "80", "90a", "100a"]);
        assert_eq!(fitting("sm_90a", &list), ["90a"]);
    }
}
