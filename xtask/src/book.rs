//! Builds the manual and compares its generated pages with the sources.

use std::path::Path;

use anyhow::{Result, bail};

pub(crate) fn run(_root: &Path, _check: bool) -> Result<()> {
    bail!("`cargo xtask book` is not written yet")
}
