//! Writes the evidence page from its data file.

use std::path::Path;

use anyhow::{Result, bail};

pub(crate) fn run(_root: &Path, _check: bool) -> Result<()> {
    bail!("`cargo xtask evidence` is not written yet")
}
