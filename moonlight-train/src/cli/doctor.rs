//! `moonlight doctor`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use moonlight_convert::hub;
use serde::Serialize;

use super::output::print;
use super::units;
use crate::error::TrainError;
use crate::plan::{Threads, available_memory};

/// Less free memory than this gives a warning, bytes.
const LITTLE_MEMORY: u64 = 2_000_000_000;
/// Less free disk space than this gives a warning, bytes: a checkpoint of a small model with its optimizer state.
const LITTLE_DISK: u64 = 5_000_000_000;

/// Check this machine and this build, and say what to set
///
/// Prints the vector instructions in use, cores, memory, backends and devices, caches, free disk space, the terminal, and the
/// environment variables that the program reads. Each problem comes with a hint. The exit code is 1 if there is an error, 0 with
/// warnings alone. Secrets are not printed.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The environment variables that the programs of this project read, and their purpose.
const VARIABLES: &[(&str, &str)] = &[
    ("MOONLIGHT_SIMD", "the highest level of vector instructions that kernels use"),
    ("RAYON_NUM_THREADS", "the number of CPU threads"),
    ("CUDA_VISIBLE_DEVICES", "the GPUs that CUDA shows"),
    ("CUBECL_ENVIRONMENT", "the name of the kernel cache"),
    ("HF_HOME", "the folder of the Hub's cache and token"),
    ("HF_HUB_CACHE", "the Hub's cache"),
    ("HUGGINGFACE_HUB_CACHE", "the Hub's cache, older name"),
    ("XDG_CACHE_HOME", "the folder of caches"),
    ("HF_TOKEN", "the user's token for the Hub"),
    ("HUGGING_FACE_HUB_TOKEN", "the user's token for the Hub, older name"),
    ("HF_TOKEN_PATH", "the file with the token"),
    ("HF_ENDPOINT", "the address of the Hub"),
    ("HF_HUB_OFFLINE", "whether to download nothing"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "seconds that a download may be silent"),
    ("NO_COLOR", "no colors, and log lines instead of the dashboard"),
    ("TERM", "the kind of terminal"),
    ("OMPI_COMM_WORLD_SIZE", "the number of processes under Open MPI"),
    ("PMI_SIZE", "the number of processes under other launchers"),
    ("SLURM_NTASKS", "the number of processes under `srun`"),
];

/// Variables whose values are not printed.
const SECRET: &[&str] = &["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    build: Build,
    processor: Processor,
    memory: Memory,
    devices: Vec<FoundDevice>,
    kernel_cache: Option<PathBuf>,
    hub_cache: HubCache,
    /// Free bytes where runs are written: in the working directory.
    disk_free_bytes: Option<u64>,
    terminal: Terminal,
    environment: Vec<Variable>,
    problems: Vec<Problem>,
}

#[derive(Debug, Serialize)]
struct Build {
    /// `release` or `debug`.
    profile: &'static str,
    backends: Vec<&'static str>,
    features: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct Processor {
    architecture: &'static str,
    cores: usize,
    threads: usize,
    /// The level of vector instructions that kernels use; `None` in a build without the cpu backend.
    vectors: Option<String>,
    best_vectors: Option<String>,
    /// The instruction sets of the processor that matter to kernels.
    features: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct Memory {
    total_bytes: u64,
    /// What can be allocated without swapping, within the limit of the container.
    free_bytes: u64,
}

#[derive(Debug, Serialize)]
struct FoundDevice {
    /// The value for `--device`; `None` for a GPU that this build cannot use.
    device: Option<String>,
    description: String,
}

#[derive(Debug, Serialize)]
struct HubCache {
    path: PathBuf,
    exists: bool,
    bytes: u64,
    models: usize,
    /// The variable or file that has the token; the token itself is not part of the report.
    token_from: Option<String>,
}

#[derive(Debug, Serialize)]
struct Terminal {
    stdout: bool,
    stderr: bool,
    /// Whether a run shows the dashboard instead of log lines.
    dashboard: bool,
}

#[derive(Debug, Serialize)]
struct Variable {
    name: &'static str,
    /// `None` if it is not set.
    value: Option<String>,
    purpose: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    Error,
    Warning,
}

#[derive(Debug, Serialize)]
struct Problem {
    severity: Severity,
    problem: String,
    hint: String,
}

impl Problem {
    fn error(problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { severity: Severity::Error, problem: problem.into(), hint: hint.into() }
    }

    fn warning(problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, problem: problem.into(), hint: hint.into() }
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, TrainError> {
    let report = Report::new();
    let failed = report.problems.iter().any(|problem| problem.severity == Severity::Error);
    let text = match arguments.json {
        true => format!("{}\n", serde_json::json!(report)),
        false => report.text(),
    };
    print(&text)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

impl Report {
    fn new() -> Self {
        let mut problems = Vec::new();
        let build = build();
        if build.profile == "debug" {
            problems.push(Problem::warning(
                "this is a debug build, which is many times slower",
                "build with `cargo build --release`",
            ));
        }
        let processor = processor(&mut problems);
        let memory = memory();
        if memory.free_bytes < LITTLE_MEMORY {
            let problem = format!("only {} of memory are free", units::bytes(memory.free_bytes));
            problems.push(Problem::warning(problem, "close other programs, or look at `moonlight plan RECIPE`"));
        }
        let devices = devices(&build, &mut problems);
        let hub_cache = hub_cache(&mut problems);
        let disk_free_bytes = free_disk(Path::new("."));
        if let Some(free) = disk_free_bytes.filter(|&free| free < LITTLE_DISK) {
            let problem = format!("only {} are free on the disk of the working directory", units::bytes(free));
            problems.push(Problem::warning(problem, "free some space, or put runs elsewhere with `run.dir`"));
        }
        launcher(&mut problems);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel_cache: kernel_cache(),
            build,
            processor,
            memory,
            devices,
            hub_cache,
            disk_free_bytes,
            terminal: terminal(),
            environment: environment(),
            problems,
        }
    }

    fn text(&self) -> String {
        let mut lines = Lines::default();
        let Self { build, processor, memory, hub_cache, terminal, .. } = self;
        lines.heading(&format!("moonlight {}, {} build", self.version, build.profile));
        lines.line("backends", &build.backends.join(", "));
        lines.line("features", &if build.features.is_empty() { "none".into() } else { build.features.join(", ") });
        lines.heading("processor");
        let threads = match processor.threads == processor.cores {
            true => String::new(),
            false => format!(", {} threads", processor.threads),
        };
        lines.line("cores", &format!("{}{threads}", processor.cores));
        if let (Some(vectors), Some(best)) = (&processor.vectors, &processor.best_vectors) {
            let note = if vectors == best { "the best of this processor".into() } else { format!("it has `{best}`") };
            lines.line("vectors", &format!("{vectors} ({note})"));
        }
        let features = if processor.features.is_empty() { "none".into() } else { processor.features.join(" ") };
        lines.line("instructions", &format!("{}: {features}", processor.architecture));
        lines.heading("memory");
        lines.line("total", &units::bytes(memory.total_bytes));
        lines.line("free", &units::bytes(memory.free_bytes));
        lines.heading("devices");
        for found in &self.devices {
            lines.line(found.device.as_deref().unwrap_or("(not usable)"), &found.description);
        }
        match &self.kernel_cache {
            Some(path) => lines.line("kernel cache", &path.display().to_string()),
            None => lines.line("kernel cache", "none: CPU kernels are compiled in"),
        }
        lines.heading("Hub cache");
        let size = match hub_cache.exists {
            true => format!("{}, models: {}", units::bytes(hub_cache.bytes), hub_cache.models),
            false => "not there yet".into(),
        };
        lines.line("folder", &format!("{} ({size})", hub_cache.path.display()));
        lines.line("token", hub_cache.token_from.as_deref().unwrap_or("none; only gated and private models need one"));
        lines.heading("disk");
        lines.line("free here", &self.disk_free_bytes.map_or_else(|| "unknown".into(), units::bytes));
        lines.heading("terminal");
        let stream = |name: &str, is: bool| format!("{name} is {}a terminal", if is { "" } else { "not " });
        lines.line("streams", &[stream("stdout", terminal.stdout), stream("stderr", terminal.stderr)].join(", "));
        lines.line("a run shows", if terminal.dashboard { "the dashboard" } else { "log lines" });
        lines.heading("environment");
        for Variable { name, value, purpose } in &self.environment {
            if let Some(value) = value {
                lines.line(name, &format!("{value} ({purpose})"));
            }
        }
        lines.0 += "\n";
        for Problem { severity, problem, hint } in &self.problems {
            let severity = if *severity == Severity::Error { "error" } else { "warning" };
            lines.0 += &format!("{severity}: {problem}\nhint: {hint}\n");
        }
        if self.problems.is_empty() {
            lines.0 += "no problems found\n";
        }
        lines.0
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn heading(&mut self, text: &str) {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        self.0 += &format!("{gap}{text}\n");
    }

    fn line(&mut self, name: &str, value: &str) {
        self.0 += &format!("  {name:<14} {}\n", moonlight_convert::printable(value));
    }
}

fn build() -> Build {
    let chosen = |all: &[(&'static str, bool)]| all.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    Build {
        profile: if cfg!(debug_assertions) { "debug" } else { "release" },
        backends: chosen(&[
            ("cpu", cfg!(feature = "cpu")),
            ("cuda", cfg!(feature = "cuda")),
            ("wgpu", cfg!(feature = "wgpu")),
            ("vulkan", cfg!(feature = "vulkan")),
            ("metal", cfg!(feature = "metal")),
        ]),
        features: chosen(&[("parquet", cfg!(feature = "parquet")), ("mpi", cfg!(feature = "mpi"))]),
    }
}

fn processor(problems: &mut Vec<Problem>) -> Processor {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = Threads::available().0;
    if let Ok(text) = std::env::var("RAYON_NUM_THREADS")
        && text.parse::<usize>().is_err()
    {
        problems.push(Problem::warning(
            format!("`RAYON_NUM_THREADS` is `{}`, which is not a number", text.escape_debug()),
            "set it to a number of threads, or unset it",
        ));
    }
    if threads > cores {
        problems.push(Problem::warning(
            format!("there are {threads} threads on {cores} cores"),
            format!("unset `RAYON_NUM_THREADS`, or set it to at most {cores}"),
        ));
    }
    let (vectors, best_vectors) = vectors(problems);
    Processor { architecture: std::env::consts::ARCH, cores, threads, vectors, best_vectors, features: features() }
}

/// The level of vector instructions in use, and the best one.
#[cfg(feature = "cpu")]
fn vectors(problems: &mut Vec<Problem>) -> (Option<String>, Option<String>) {
    use moonlight_model::simd::{LEVEL_VARIABLE, Level, from_environment};
    let best = Level::best();
    let level = match from_environment() {
        Ok(level) => level,
        Err(error) => {
            problems.push(Problem::error(error.to_string(), error.hint().unwrap_or_default()));
            best
        }
    };
    if level < best {
        problems.push(Problem::warning(
            format!("`{LEVEL_VARIABLE}` limits kernels to `{level}`, and this processor has `{best}`"),
            format!("unset `{LEVEL_VARIABLE}`"),
        ));
    } else if best == Level::Scalar {
        problems.push(Problem::warning(
            "this processor has none of the vector instructions that the CPU kernels use",
            "expect slow training; use a processor with AVX2 or NEON, or a GPU",
        ));
    }
    (Some(level.to_string()), Some(best.to_string()))
}

#[cfg(not(feature = "cpu"))]
fn vectors(_problems: &mut [Problem]) -> (Option<String>, Option<String>) {
    (None, None)
}

fn features() -> Vec<&'static str> {
    macro_rules! detected {
        ($detect:ident, $($name:tt)*) => {
            [$(($name, std::arch::$detect!($name))),*].into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
        };
    }
    #[cfg(target_arch = "x86_64")]
    return detected!(is_x86_feature_detected, "avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512vl" "avx512bf16");
    #[cfg(target_arch = "aarch64")]
    return detected!(is_aarch64_feature_detected, "neon" "fp16" "bf16");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

fn memory() -> Memory {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    // In a container, its limit is the total memory.
    let limit = system.cgroup_limits().map(|limits| limits.total_memory).filter(|&limit| limit > 0);
    let total_bytes = limit.map_or(system.total_memory(), |limit| limit.min(system.total_memory()));
    Memory { total_bytes, free_bytes: available_memory().unwrap_or_else(|| system.available_memory()) }
}

fn devices(build: &Build, problems: &mut Vec<Problem>) -> Vec<FoundDevice> {
    let mut devices = Vec::new();
    if cfg!(feature = "cpu") {
        devices.push(FoundDevice { device: Some("cpu".into()), description: "the processor".into() });
    }
    let found = gpus();
    for (kind, count) in &found {
        for index in 0..*count {
            let device = if *kind == "metal" { (*kind).to_owned() } else { format!("{kind}:{index}") };
            devices.push(FoundDevice { device: Some(device), description: format!("a device of {kind}") });
        }
        if *count == 0 {
            problems.push(Problem::warning(
                format!("this build has `{kind}`, and no device of it was found"),
                "install the driver of the GPU; look at `nvidia-smi` and `CUDA_VISIBLE_DEVICES`, or `vulkaninfo`",
            ));
        }
    }
    let nvidia = nvidia_driver();
    let uses_gpu = found.iter().any(|(_, count)| *count > 0);
    if !nvidia.is_empty() && !uses_gpu {
        if !build.backends.contains(&"cuda") {
            problems.push(Problem::warning(
                format!("there is an NVIDIA GPU ({}), and this build has no `cuda`", nvidia[0]),
                "build with `--features cuda`",
            ));
        }
        devices.extend(nvidia.into_iter().map(|description| FoundDevice { device: None, description }));
    }
    devices
}

/// The GPU backends of this build, and how many devices each has found.
#[allow(unused_mut, clippy::vec_init_then_push, reason = "a build with the CPU alone has none")]
fn gpus() -> Vec<(&'static str, usize)> {
    let mut found: Vec<(&'static str, usize)> = Vec::new();
    #[cfg(feature = "cuda")]
    found.push(("cuda", count(burn::tensor::DeviceType::Cuda)));
    #[cfg(feature = "metal")]
    found.push(("metal", count(burn::tensor::DeviceType::Metal)));
    #[cfg(feature = "vulkan")]
    found.push(("vulkan", count(burn::tensor::DeviceType::Vulkan)));
    #[cfg(feature = "wgpu")]
    found.push(("wgpu", count(burn::tensor::DeviceType::Wgpu)));
    found
}

/// The number of devices of a kind. A backend without its driver panics, which counts as none; the panic is not printed.
#[cfg(any(feature = "cuda", feature = "metal", feature = "vulkan", feature = "wgpu"))]
fn count(kind: burn::tensor::DeviceType) -> usize {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = std::panic::catch_unwind(|| burn::tensor::Device::enumerate(kind).into_iter().count());
    std::panic::set_hook(hook);
    found.unwrap_or(0)
}

/// The names of the GPUs that NVIDIA's driver for Linux reports, whether or not this build can use them.
fn nvidia_driver() -> Vec<String> {
    let Ok(folders) = std::fs::read_dir("/proc/driver/nvidia/gpus") else { return Vec::new() };
    let name = |folder: std::fs::DirEntry| {
        let text = std::fs::read_to_string(folder.path().join("information")).ok()?;
        text.lines().find_map(|line| Some(line.strip_prefix("Model:")?.trim().to_owned()))
    };
    folders.filter_map(|folder| name(folder.ok()?)).collect()
}

/// The file of compiled and tuned kernels; `None` in a build without a GPU backend.
fn kernel_cache() -> Option<PathBuf> {
    #[cfg(any(feature = "cuda", feature = "metal", feature = "vulkan", feature = "wgpu"))]
    return Some(cubecl::environment::path());
    #[cfg(not(any(feature = "cuda", feature = "metal", feature = "vulkan", feature = "wgpu")))]
    None
}

fn hub_cache(problems: &mut Vec<Problem>) -> HubCache {
    let path = hub::cache_folder();
    let exists = path.is_dir();
    if path.exists() && !exists {
        problems.push(Problem::error(
            format!("the Hub's cache `{}` is not a folder", path.display()),
            "set `HF_HUB_CACHE` to a folder",
        ));
    }
    if exists && !is_writable(&path) {
        problems.push(Problem::warning(
            format!("the Hub's cache `{}` cannot be written", path.display()),
            "set `HF_HUB_CACHE` to a folder of yours before you download a model",
        ));
    }
    let models = std::fs::read_dir(&path).into_iter().flatten().flatten();
    let models = models.filter(|entry| entry.file_name().to_string_lossy().starts_with("models--")).count();
    HubCache { bytes: size_of_folder(&path), exists, models, token_from: hub::token_source(), path }
}

/// Bytes of the files below a folder. Links are not followed: snapshots in the Hub's cache link to its blobs.
fn size_of_folder(path: &Path) -> u64 {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let size = |entry: std::fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size_of_folder(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |metadata| metadata.len()),
        _ => 0,
    };
    entries.map(size).sum()
}

#[cfg(unix)]
fn is_writable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(not(unix))]
fn is_writable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| !metadata.permissions().readonly())
}

/// Bytes that can still be written in a directory; `None` if the system does not report them.
#[cfg(unix)]
fn free_disk(path: &Path) -> Option<u64> {
    let volume = rustix::fs::statvfs(path).ok()?;
    volume.f_bavail.checked_mul(volume.f_frsize)
}

#[cfg(not(unix))]
fn free_disk(_path: &Path) -> Option<u64> {
    None
}

/// Reports a launcher of several processes if the build has no MPI: such a build refuses to train.
fn launcher(problems: &mut Vec<Problem>) {
    let launched = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().find_map(|name| {
        let number = std::env::var(name).ok()?.parse::<usize>().ok()?;
        (number > 1).then_some((name, number))
    });
    if let Some((name, number)) = launched.filter(|_| !cfg!(feature = "mpi")) {
        problems.push(Problem::error(
            format!("`{name}` says that there are {number} processes, and this build has no `mpi`"),
            "build with `--features mpi`, or start the program without the launcher",
        ));
    }
}

fn terminal() -> Terminal {
    let (stdout, stderr) = (std::io::stdout().is_terminal(), std::io::stderr().is_terminal());
    Terminal { stdout, stderr, dashboard: crate::trainer::shows_dashboard() }
}

fn environment() -> Vec<Variable> {
    let value = |name: &str| {
        let value = std::env::var_os(name)?.to_string_lossy().into_owned();
        Some(if SECRET.contains(&name) { "set".into() } else { value })
    };
    VARIABLES.iter().map(|&(name, purpose)| Variable { name, value: value(name), purpose }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_machine_and_no_secret() {
        let report = Report::new();
        assert!(report.processor.cores > 0 && report.memory.total_bytes >= report.memory.free_bytes);
        assert!(report.text().contains("\nHub cache\n"));
        assert!(SECRET.iter().all(|secret| VARIABLES.iter().any(|(name, _)| name == secret)));
    }

    #[test]
    fn the_size_of_a_folder_does_not_count_links() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        std::fs::write(dir.path().join("blobs/a"), [0; 100]).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(dir.path().join("blobs/a"), dir.path().join("link")).unwrap();
        assert_eq!(size_of_folder(dir.path()), 100);
    }
}
