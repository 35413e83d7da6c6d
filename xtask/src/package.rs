//! Packages the crates as for crates.io.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::shell::{cargo, metadata, run as call};

/// Packages the crates that are published, and builds each from its package unless `no_verify` is set. Cargo resolves a dependency
/// on another crate of this workspace, which crates.io does not have yet, to the package that it has just made.
pub(crate) fn run(root: &Path, no_verify: bool) -> Result<()> {
    let metadata = metadata(root)?;
    let target = Path::new(metadata["target_directory"].as_str().unwrap_or("target")).join("packages");
    // Uncommitted changes are packaged, too.
    let mut command = cargo(root, "package --allow-dirty");
    command.env("CARGO_TARGET_DIR", &target);
    for package in metadata["packages"].as_array().into_iter().flatten() {
        // `null` allows every registry, an empty list none.
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

/// Removes the unpacked sources of a package from an earlier call. Cargo treats a version in a registry as immutable and unpacks it
/// only once, so the crates that depend on it would be built with old contents.
fn remove_unpacked(package: &str) -> Result<()> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let Some(home) = home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))) else { return Ok(()) };
    let Ok(registries) = fs::read_dir(home.join("registry/src")) else { return Ok(()) };
    for registry in registries {
        let registry = registry?;
        // Cargo's temporary registry has no host, so the name of its folder begins with a hyphen.
        let folder = registry.path().join(package);
        if registry.file_name().to_string_lossy().starts_with('-') && folder.is_dir() {
            fs::remove_dir_all(&folder).with_context(|| format!("`{}` cannot be removed", folder.display()))?;
        }
    }
    Ok(())
}

/// Makes cargo build a package again, because its sources may have changed under the same version.
fn remove_built(target: &Path, name: &str) -> Result<()> {
    let Ok(fingerprints) = fs::read_dir(target.join("debug/.fingerprint")) else { return Ok(()) };
    for fingerprint in fingerprints {
        let path = fingerprint?.path();
        // The name is followed by a hyphen and a hash.
        let name_and_hash = path.file_name().and_then(|file| file.to_str()).and_then(|file| file.rsplit_once('-'));
        if name_and_hash.is_some_and(|(package, _)| package == name) {
            fs::remove_dir_all(&path).with_context(|| format!("`{}` cannot be removed", path.display()))?;
        }
    }
    Ok(())
}
