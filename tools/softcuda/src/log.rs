//! The log: a line for each module, launch and finding.

use std::fs::{self, File};
use std::io::Write;
use std::sync::{Mutex, OnceLock, PoisonError};

fn file() -> &'static Mutex<Box<dyn Write + Send>> {
    static FILE: OnceLock<Mutex<Box<dyn Write + Send>>> = OnceLock::new();
    FILE.get_or_init(|| {
        let settings = crate::settings::get();
        let path = settings.log.clone().unwrap_or_else(|| settings.folder.join("log"));
        if path.as_os_str() == "-" {
            return Mutex::new(Box::new(std::io::stderr()));
        }
        if let Some(folder) = path.parent() {
            let _ = fs::create_dir_all(folder);
        }
        match File::options().append(true).create(true).open(&path) {
            Ok(file) => Mutex::new(Box::new(file)),
            Err(error) => {
                eprintln!("softcuda: cannot write `{}`: {error}; logging to stderr", path.display());
                Mutex::new(Box::new(std::io::stderr()))
            }
        }
    })
}

/// Writes a line.
pub(crate) fn line(text: &str) {
    let mut file = file().lock().unwrap_or_else(PoisonError::into_inner);
    // One call, so that lines of several processes do not mix.
    let _ = file.write_all(format!("[{}] {text}\n", std::process::id()).as_bytes());
}

/// Writes a line that says what is wrong, to stderr as well.
pub(crate) fn finding(text: &str) {
    line(&format!("FINDING {text}"));
    eprintln!("softcuda: {text}");
}
