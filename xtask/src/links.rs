//! Checks the links of all pages.

use std::path::Path;

use anyhow::{Result, bail};

pub(crate) fn run(_root: &Path, _check: bool) -> Result<()> {
    bail!("`cargo xtask links` is not written yet")
}
