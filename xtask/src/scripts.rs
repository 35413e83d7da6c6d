//! The Python scripts: linted, compiled, and asked for their help.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell::{command, is_installed, output, run as call, succeeds};

/// Modules that scripts import; they have no `--help`.
const MODULES: [&str; 20] = [
    "scripts/common.py",
    "scripts/bench/gpu/cards.py",
    "scripts/bench/gpu/day.py",
    "scripts/bench/gpu/decoding.py",
    "scripts/bench/gpu/driver.py",
    "scripts/bench/gpu/facts.py",
    "scripts/bench/gpu/kernels.py",
    "scripts/bench/gpu/operations.py",
    "scripts/bench/gpu/peers.py",
    "scripts/bench/gpu/recipes.py",
    "scripts/bench/gpu/report.py",
    "scripts/bench/gpu/runner.py",
    "scripts/bench/gpu/shapes.py",
    "scripts/bench/gpu/training.py",
    "scripts/parity/llama_cpp.py",
    "scripts/parity/models.py",
    "scripts/cluster/tiny_run.py",
    "scripts/serve/hostile.py",
    "scripts/serve/http_client.py",
    "scripts/serve/server.py",
];

/// Checks all scripts. Their packages need not be installed, because a script imports them only after it has parsed its arguments.
pub(crate) fn run(root: &Path) -> Result<()> {
    let Some(python) = ["python3", "python"].into_iter().find(|name| is_installed(name)) else {
        println!("SKIPPED: the scripts: Python is not installed");
        return Ok(());
    };
    if is_installed("ruff") {
        call(&mut command(root, "ruff format --check scripts"))?;
        call(&mut command(root, "ruff check scripts"))?;
    } else {
        println!("SKIPPED: linting the scripts: ruff is not installed");
    }
    let files = output(&mut command(root, "git ls-files -- scripts/*.py"))?;
    for file in files.lines() {
        check(root, python, file)?;
    }
    println!("{} scripts can be compiled and print their help", files.lines().count());
    // The only comparison that takes seconds and needs no build.
    let versions = "import transformers, jinja2; assert transformers.__version__.startswith('5.24.')";
    if succeeds(Command::new(python).args(["-c", versions])) {
        call(&mut command(root, &format!("{python} scripts/parity/check_templates.py --check")))?;
    } else {
        println!("SKIPPED: chat templates compared with transformers: transformers 5.24 is not installed");
    }
    Ok(())
}

/// Compiles a script and runs it with `--help` outside of the repository, because no script may depend on the working directory.
fn check(root: &Path, python: &str, file: &str) -> Result<()> {
    let elsewhere = std::env::temp_dir();
    let source = root.join(file);
    let mut compile = Command::new(python);
    // `compile` and not the module `py_compile`, which would write a file.
    compile.args(["-c", "import sys; compile(open(sys.argv[1], encoding='utf-8').read(), sys.argv[1], 'exec')"]);
    if !compile.arg(&source).status().context("Python cannot be started")?.success() {
        bail!("`{file}` cannot be compiled");
    }
    if MODULES.contains(&file) {
        return Ok(());
    }
    let help = Command::new(python)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONIOENCODING", "utf-8")
        .arg(&source)
        .arg("--help")
        .current_dir(elsewhere)
        .output()
        .context("Python cannot be started")?;
    let text = String::from_utf8_lossy(&help.stdout);
    if !help.status.success() {
        bail!("`{file} --help` fails\n{}", String::from_utf8_lossy(&help.stderr));
    }
    match ["Needs:", "Takes:"].into_iter().find(|part| !text.contains(part)) {
        Some(part) => bail!("`{file} --help` has no `{part}`"),
        None => Ok(()),
    }
}
