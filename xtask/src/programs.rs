//! The checks of the built programs from outside: installed from a wheel, as a server, in a browser, next to llama.cpp. They use the
//! programs that the tests have built.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::ci::{install, target_dir};
use crate::shell::{cargo, is_installed, run as call, succeeds};

/// Builds both programs, and returns their folder. They are built together with tests, because a plain build has other features and
/// would compile Burn again.
pub(crate) fn build(root: &Path) -> Result<PathBuf> {
    call(&mut cargo(root, "test --workspace --test kill --test commands --no-run"))?;
    Ok(target_dir(root)?.join("debug"))
}

/// Installs both programs from a wheel into an environment without Rust.
pub(crate) fn wheel(root: &Path, wheel: Option<&Path>) -> Result<()> {
    let programs = match wheel {
        Some(wheel) => wheel.to_owned(),
        None => build(root)?,
    };
    let mut script = bash(root, "scripts/install/check_wheel.sh");
    call(script.arg(programs).env("CARGO_TARGET_DIR", target_dir(root)?))
}

/// Serves a tiny model to OpenAI's client, to load, and to clients that misbehave.
pub(crate) fn serve(root: &Path) -> Result<()> {
    let python = environment(root, "serve", &["openai"])?;
    let mut script = bash(root, "scripts/serve/smoke.sh");
    script.arg(program(root)?);
    // Without the package the script skips OpenAI's client, and prints so.
    if let Some(python) = python {
        script.env("PYTHON", python);
    }
    call(&mut script)
}

/// Uses the page in headless Chromium, which is installed as root on Debian. The script reports what it cannot have as SKIPPED.
pub(crate) fn browser(root: &Path) -> Result<()> {
    let browsers = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    if std::env::var_os("CHROMIUM").is_none() && !browsers.into_iter().any(is_installed) {
        install(root, "chromium");
    }
    call(bash(root, "scripts/browser/test.sh").arg(program(root)?))
}

/// Writes GGUF files of each type, and compares what llama.cpp and the package `gguf` read in them with this project.
pub(crate) fn gguf(root: &Path) -> Result<()> {
    // torch and its CUDA libraries are gigabytes, so that they are used where they are and not installed.
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let packages = "import gguf, numpy, peft, safetensors, tiktoken, tokenizers, torch, transformers";
    if !succeeds(Command::new(&python).args(["-c", packages])) {
        println!(
            "SKIPPED: GGUF files next to llama.cpp: {} lacks the packages of the group `parity` in scripts/pyproject.toml \
             (PYTHON names another)",
            python.display()
        );
        return Ok(());
    }
    let programs = build(root)?;
    let mut script = Command::new(python);
    script.arg("scripts/parity/check_gguf.py").current_dir(root);
    for (option, name) in [("--program", "moonlight"), ("--converter", "moonlight-convert")] {
        script.arg(option).arg(executable(&programs, name));
    }
    call(&mut script)
}

fn program(root: &Path) -> Result<PathBuf> {
    Ok(executable(&build(root)?, "moonlight"))
}

fn executable(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

/// Git for Windows has a bash, which is not the first one on the PATH there: that one starts Linux.
fn bash(root: &Path, script: &str) -> Command {
    let git = Path::new("C:/Program Files/Git/bin/bash.exe");
    let shell = if git.exists() { git.as_os_str() } else { "bash".as_ref() };
    let mut command = Command::new(shell);
    command.arg(script).current_dir(root);
    command
}

/// A Python that has these packages, in an environment that is kept next to the target folder; `None` if they cannot be installed.
/// Their versions are those of `scripts/pyproject.toml`.
///
/// # Errors
///
/// A package without a version there.
fn environment(root: &Path, name: &str, packages: &[&str]) -> Result<Option<PathBuf>> {
    let pins = packages.iter().map(|package| pin(root, package)).collect::<Result<Vec<_>>>()?;
    let Some(python) = ["python3", "python"].into_iter().find(|name| is_installed(name)) else { return Ok(None) };
    let folder = target_dir(root)?.join(format!("python-{name}"));
    let inside = folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
    let made = inside.exists() || succeeds(Command::new(python).args(["-m", "venv"]).arg(&folder));
    let mut pip = Command::new(&inside);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(&pins);
    Ok((made && succeeds(&mut pip)).then_some(inside))
}

/// `package==version`, from any group of the scripts' packages.
fn pin(root: &Path, package: &str) -> Result<String> {
    let text = std::fs::read_to_string(root.join("scripts/pyproject.toml")).context("`scripts/pyproject.toml`")?;
    let table: toml::Table = toml::from_str(&text).context("`scripts/pyproject.toml`")?;
    let groups = table.get("dependency-groups").and_then(toml::Value::as_table);
    let mut pins = groups.into_iter().flatten().filter_map(|(_, group)| group.as_array()).flatten();
    let found = pins.find_map(|pin| pin.as_str().filter(|pin| pin.split("==").next() == Some(package)));
    found.map(str::to_owned).with_context(|| format!("`scripts/pyproject.toml` has no version of `{package}`"))
}
