//! The checks that call cargo and the shell scripts, and their order.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::shell::{cargo, command, is_installed, metadata, output, run as call, succeeds};
use crate::{book, package, programs, scripts, words};

/// The examples of the manual; each asserts what it shows.
const EXAMPLES: [&str; 5] = ["own_burn_program", "custom_model", "generate", "lora", "custom_loop"];

/// Features in addition to the default ones, except MPI.
const FEATURES: &str =
    "moonlight-train/cuda,moonlight-train/wgpu,moonlight-train/vulkan,moonlight-train/metal,moonlight-train/parquet";

const CUDA: &str = "scripts/parity/cuda_smoke.sh";

/// Seconds after the start of all checks when those on CUDA begin no more parts.
const CUDA_SECONDS: u64 = 4000;

/// Everything that a change must pass, ordered so that the most likely errors show first.
pub(crate) fn run(root: &Path) -> Result<()> {
    let start = Instant::now();
    fmt(root)?;
    words::run(root, &[])?;
    optional("the spelling", is_installed("typos"), "typos is not installed", || typos(root))?;
    test(root)?;
    lint(root)?;
    doc(root)?;
    examples(root)?;
    // These run the programs that the tests have built.
    programs::serve(root)?;
    programs::gguf(root)?;
    programs::wheel(root, None)?;
    programs::browser(root)?;
    scripts::run(root)?;
    book::run(root, true)?;
    package::run(root, true)?;
    let has_deny = succeeds(&mut cargo(root, "deny --version"));
    optional("licenses of dependencies", has_deny, "cargo-deny is not installed", || deny(root, false))?;

    // The default build and all tests above need no MPI. This check runs if MPI is installed or can be.
    let has_mpi = has_mpi() || install_mpi(root);
    optional("two ranks on MPI", has_mpi, "there is no MPI here and it cannot be installed", || mpi(root))?;
    lint_all(root, has_mpi)?;

    // These share a build, which takes longest, so they are skipped if the checks before them were slow.
    let late = |seconds: u64| format!("the checks before it took {seconds} seconds");
    let seconds = start.elapsed().as_secs();
    let is_early = seconds < 1500;
    optional("the GPU kernels on CUDA", is_early, &late(seconds), || {
        let left = CUDA_SECONDS.saturating_sub(start.elapsed().as_secs());
        call(command(root, CUDA).env("CUDA_SMOKE_SECONDS", left.to_string()))
    })?;
    let seconds = start.elapsed().as_secs();
    let is_built = is_early && seconds < 4200;
    optional("the GPU kernels on WGPU", is_built || seconds < 2700, &late(seconds), || wgpu(root))?;

    // The fuzz targets have a sanitizer and share no build with the rest: without a cached build they take half an hour.
    let seconds = start.elapsed().as_secs();
    optional("the fuzz targets", seconds < 1800, &late(seconds), || fuzz(root, 15))
}

/// Runs a check that this machine may not be able to run.
fn optional(name: &str, possible: bool, reason: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    if possible {
        return check();
    }
    println!("SKIPPED: {name}: {reason}");
    Ok(())
}

pub(crate) fn fmt(root: &Path) -> Result<()> {
    call(&mut cargo(root, "fmt --all -- --check"))
}

pub(crate) fn typos(root: &Path) -> Result<()> {
    call(&mut command(root, "typos"))
}

/// All tests. A test that this machine cannot run adds a line to a file, which is printed at the end.
pub(crate) fn test(root: &Path) -> Result<()> {
    let skipped = std::env::temp_dir().join(format!("moonlight-skipped-{}", std::process::id()));
    std::fs::write(&skipped, "").with_context(|| format!("`{}` cannot be written", skipped.display()))?;
    // Windows cannot replace a program that is running, which this one is.
    let all = if cfg!(windows) { "test --workspace --exclude xtask" } else { "test --workspace" };
    let parquet = format!("{all} --features moonlight-train/parquet --lib --test parquet -- parquet");
    let tests = [all, &parquet];
    let outcome = tests.iter().try_for_each(|line| call(cargo(root, line).env("MOONLIGHT_SKIPPED", &skipped)));
    let text = std::fs::read_to_string(&skipped).unwrap_or_default();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    lines.iter().for_each(|line| println!("{line}"));
    std::fs::remove_file(&skipped).ok();
    outcome
}

pub(crate) fn lint(root: &Path) -> Result<()> {
    call(&mut cargo(root, "clippy --workspace --all-targets -- -D warnings"))
}

/// All backends and options, and the fuzz targets. With `DOCS_RS` the build script of CubeCL's compiler does not download LLVM, and CUDA need not be
/// installed.
pub(crate) fn lint_all(root: &Path, mpi: bool) -> Result<()> {
    let features = if mpi { format!("{FEATURES},moonlight-train/mpi") } else { FEATURES.into() };
    let line = format!("clippy --workspace --all-targets --features {features} -- -D warnings");
    call(cargo(root, &line).env("DOCS_RS", "1"))?;
    // A workspace of its own, which no other command compiles.
    call(&mut cargo(root, "check --locked --manifest-path fuzz/Cargo.toml"))
}

pub(crate) fn doc(root: &Path) -> Result<()> {
    call(cargo(root, "doc --workspace --no-deps").env("RUSTDOCFLAGS", "-D warnings"))
}

/// Runs the built programs directly: `cargo run -p` would select other features and build Burn a second time.
pub(crate) fn examples(root: &Path) -> Result<()> {
    let targets = EXAMPLES.map(|name| format!("--example={name}")).join(" ");
    call(&mut cargo(root, &format!("build --workspace {targets}")))?;
    let folder = target_dir(root)?.join("debug/examples");
    for name in EXAMPLES {
        let program = folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
        call(std::process::Command::new(program).current_dir(root))?;
    }
    Ok(())
}

/// Only advisories need a network: they are fetched from GitHub.
pub(crate) fn deny(root: &Path, advisories: bool) -> Result<()> {
    let what = if advisories { "all" } else { "bans licenses sources" };
    call(&mut cargo(root, &format!("deny --all-features check {what}")))
}

pub(crate) fn mpi(root: &Path) -> Result<()> {
    call(&mut command(root, "scripts/cluster/mpi_smoke.sh"))
}

pub(crate) fn cuda(root: &Path) -> Result<()> {
    call(&mut command(root, CUDA))
}

pub(crate) fn wgpu(root: &Path) -> Result<()> {
    call(&mut command(root, "scripts/parity/wgpu_smoke.sh"))
}

/// The seed is fixed, so that a failure can be repeated; run `scripts/fuzz.sh` for new inputs.
pub(crate) fn fuzz(root: &Path, seconds: u32) -> Result<()> {
    let has_fuzz = || succeeds(&mut cargo(root, "fuzz --version"));
    if !has_fuzz() && succeeds(&mut command(root, "cargo +nightly --version")) {
        succeeds(&mut cargo(root, "install --quiet --locked cargo-fuzz"));
    }
    let mut script = command(root, &format!("scripts/fuzz.sh {seconds}"));
    script.env("FUZZ_SEED", "1");
    if std::env::var_os("FUZZ_TARGET_DIR").is_none() {
        script.env("FUZZ_TARGET_DIR", target_dir(root)?.parent().unwrap_or(root).join("fuzz"));
    }
    call(&mut script)
}

fn has_mpi() -> bool {
    is_installed("mpirun") && is_installed("mpicc")
}

fn install_mpi(root: &Path) -> bool {
    install(root, "openmpi-bin libopenmpi-dev libclang-dev clang") && has_mpi()
}

/// Tries to install packages, as root on Debian.
pub(crate) fn install(root: &Path, packages: &str) -> bool {
    let is_root = output(&mut command(root, "id -u")).is_ok_and(|id| id.trim() == "0");
    let line = format!("apt-get install -y -qq {packages}");
    is_root
        && is_installed("apt-get")
        && succeeds(&mut command(root, "apt-get update -qq"))
        && succeeds(command(root, &line).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Where cargo builds.
pub(crate) fn target_dir(root: &Path) -> Result<PathBuf> {
    match metadata(root)?["target_directory"].as_str() {
        Some(folder) => Ok(folder.into()),
        None => bail!("`cargo metadata` names no target folder"),
    }
}
