//! Packages the crates as for crates.io.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::shell::{cargo, metadata, run as call};

/// Packages the crates that are published, and builds each from its package if `no_verify` is not set. For a crate of this
/// workspace that is not on crates.io yet, cargo uses the package that it has just made.
pub(crate) fn run(root: &Path, no_verify: bool) -> Result<()> {
    let metadata = metadata(root)?;
    let target = Path::new(metadata["target_directory"].as_str().unwrap_or("target")).join("packages");
    // A tree with changes can be tried as well.
    let mut command = cargo(root, "package --allow-dirty");
    command.env("CARGO_TARGET_DIR", &target);
    for package in metadata["packages"].as_array().into_iter().flatten() {
        // `null` is every registry, an empty list is none.
        let (true, Some(name), Some(version)) =
            (package["publish"].is_null(), package["name"].as_str(), package["version"].as_str())
        else {
            continue;
        };
        remove_unpacked(&format!("{name}-{version}"))?;
        remove_built(&target, name)?;
        command.args(["--package", name]);
    }
    if no_verify {
        command.arg("--no-verify");
    }
    call(&mut command)
}

/// Removes what an earlier call has unpacked of a package. Cargo takes a version in a registry for immutable: it unpacks it once,
/// and would build the crates that depend on it with the contents of that time.
fn remove_unpacked(package: &str) -> Result<()> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let Some(home) = home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))) else { return Ok(()) };
    let Ok(registries) = fs::read_dir(home.join("registry/src")) else { return Ok(()) };
    for registry in registries {
        let registry = registry?;
        // The registry of packages that are not published has no host, and so a name that begins with a hyphen.
        let folder = registry.path().join(package);
        if registry.file_name().to_string_lossy().starts_with('-') && folder.is_dir() {
            fs::remove_dir_all(&folder).with_context(|| format!("`{}` cannot be removed", folder.display()))?;
        }
    }
    Ok(())
}

/// Makes cargo build a package again, for the same reason.
fn remove_built(target: &Path, name: &str) -> Result<()> {
    let Ok(fingerprints) = fs::read_dir(target.join("debug/.fingerprint")) else { return Ok(()) };
    for fingerprint in fingerprints {
        let path = fingerprint?.path();
        // The name is followed by a hyphen and a hash.
        let of = path.file_name().and_then(|file| file.to_str()).and_then(|file| file.rsplit_once('-'));
        if of.is_some_and(|(package, _)| package == name) {
            fs::remove_dir_all(&path).with_context(|| format!("`{}` cannot be removed", path.display()))?;
        }
    }
    Ok(())
}
