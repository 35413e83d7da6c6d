//! The Python scripts: linted, compiled, and asked for their help.

use std::path::Path;

use anyhow::Result;

use crate::shell::{command, is_installed, output, run as call};

/// Their packages need not be installed: what a script imports, it imports after its arguments are read.
pub(crate) fn run(root: &Path) -> Result<()> {
    if !is_installed("python3") {
        println!("SKIPPED: the scripts: python3 is not installed");
        return Ok(());
    }
    let files = output(&mut command(root, "git ls-files -- scripts/*.py"))?;
    call(command(root, "python3 -m py_compile").args(files.lines()))
}
