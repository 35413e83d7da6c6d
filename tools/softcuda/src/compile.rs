//! C to code of this machine: compiled once for each text, kept in a folder, loaded as a library.

use std::ffi::{CString, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::Entry;
use crate::settings::Settings;

/// A compiled module.
pub(crate) struct Library {
    handle: *mut c_void,
}

// SAFETY: a handle of the loader, which any thread may use.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Compiles and loads a text.
    ///
    /// # Errors
    ///
    /// Fails with what the compiler or the loader prints.
    pub(crate) fn new(source: &str, settings: &Settings) -> Result<Self, String> {
        let flags: Vec<&str> = settings.optimization.split_whitespace().collect();
        let key = hash(&[source, &settings.cc, &settings.optimization]);
        let path = settings.folder.join(format!("{key:016x}.so"));
        if !path.exists() {
            build(source, &path, &flags, settings)?;
        }
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())?;
        // SAFETY: the library has no initializers; its code is what `translate` wrote.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(format!("`{}` cannot be loaded", path.display())) } else { Ok(Self { handle }) }
    }

    /// The kernel of that symbol.
    pub(crate) fn entry(&self, symbol: &str) -> Option<Entry> {
        let name = CString::new(symbol).ok()?;
        // SAFETY: the handle is open, and a symbol of that name is an `Entry`.
        unsafe {
            let found = libc::dlsym(self.handle, name.as_ptr());
            (!found.is_null()).then(|| *found.cast::<Entry>())
        }
    }
}

fn build(source: &str, path: &Path, flags: &[&str], settings: &Settings) -> Result<(), String> {
    let failed = |what: &Path, error: std::io::Error| format!("`{}`: {error}", what.display());
    fs::create_dir_all(&settings.folder).map_err(|error| failed(&settings.folder, error))?;
    let text = path.with_extension("c");
    // Another process may compile the same text: each writes a file of its own, and the last one stays.
    let mine = |extension: &str| -> PathBuf {
        path.with_extension(
            format!("{}-{:?}.{extension}", std::process::id(), std::thread::current().id()).replace(['(', ')'], ""),
        )
    };
    let (own_text, own) = (mine("c"), mine("so"));
    fs::write(&own_text, source).map_err(|error| failed(&own_text, error))?;
    let output = Command::new(&settings.cc)
        .args([
            "-w",
            "-march=native",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-fno-math-errno",
            "-shared",
            "-fPIC",
        ])
        .args(flags)
        .arg("-o")
        .arg(&own)
        .arg(&own_text)
        .arg("-lm")
        // A program that is tested may have set these for itself.
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .map_err(|error| format!("`{}` cannot be run: {error}", settings.cc))?;
    fs::rename(&own_text, &text).map_err(|error| failed(&text, error))?;
    if !output.status.success() {
        return Err(format!(
            "`{} {}`: {}",
            settings.cc,
            text.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    fs::rename(&own, path).map_err(|error| failed(path, error))
}

/// FNV-1a of some texts.
pub(crate) fn hash(texts: &[&str]) -> u64 {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
