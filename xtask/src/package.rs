//! Packages all crates as for crates.io.

use std::path::Path;

use anyhow::Result;

use crate::shell::{cargo, run as call};

/// Packages the crates, and builds each from its package if `no_verify` is not set. Cargo takes crates of this workspace that
/// are not on crates.io from the packages that it has just made.
pub(crate) fn run(root: &Path, no_verify: bool) -> Result<()> {
    // A tree with changes can be tried as well.
    let mut command = cargo(root, "package --workspace --exclude xtask --allow-dirty");
    if no_verify {
        command.arg("--no-verify");
    }
    call(&mut command)
}
