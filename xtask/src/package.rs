//! Packages the crates as for crates.io.

use std::path::Path;

use anyhow::Result;

use crate::shell::{cargo, metadata, run as call};

/// Packages the crates that are published, and builds each from its package if `no_verify` is not set. For a crate of this
/// workspace that is not on crates.io yet, cargo uses the package that it has just made.
pub(crate) fn run(root: &Path, no_verify: bool) -> Result<()> {
    // A tree with changes can be tried as well.
    let mut command = cargo(root, "package --allow-dirty");
    for package in metadata(root)?["packages"].as_array().into_iter().flatten() {
        // `null` is every registry, an empty list is none.
        if let (true, Some(name)) = (package["publish"].is_null(), package["name"].as_str()) {
            command.args(["--package", name]);
        }
    }
    if no_verify {
        command.arg("--no-verify");
    }
    call(&mut command)
}
