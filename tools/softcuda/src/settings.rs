//! What environment variables set; see README.md.

use std::path::PathBuf;
use std::sync::OnceLock;

/// The settings of this process.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Compute capability: 80 is 8.0.
    pub sm: u32,
    /// The name of the device.
    pub name: String,
    /// The version of CUDA that the driver reports: 12090 is 12.9.
    pub driver: i32,
    /// How many devices there are.
    pub devices: usize,
    /// Bytes of memory that each reports.
    pub memory: u64,
    /// Where compiled kernels and the log are kept.
    pub folder: PathBuf,
    /// The log, if it is not `log` in the folder; `-` is stderr.
    pub log: Option<PathBuf>,
    /// The assembler, if modules are assembled.
    pub ptxas: Option<PathBuf>,
    /// Architectures that modules are assembled for; empty for the device's.
    pub architectures: Vec<String>,
    /// Threads of the host that run blocks.
    pub threads: usize,
    /// Report where values that are not defined matter.
    pub uninitialized: bool,
    /// Report copies to the host of memory that was not written.
    pub host: bool,
    /// Report each read of memory that was not written.
    pub strict: bool,
    /// Report threads of a block that miss a barrier by ending before it.
    pub barriers: bool,
    /// Report accesses that no barrier orders.
    pub races: bool,
    /// Whether a fault is returned until the process ends, as on a device.
    pub sticky: bool,
    /// Where counts are written at exit.
    pub counts: Option<PathBuf>,
    /// The compiler for C.
    pub cc: String,
    /// Its optimization.
    pub optimization: String,
    /// Seconds after which a launch fails.
    pub timeout: u64,
    /// Write the PTX of each module to the folder.
    pub dump: bool,
    /// A fault that is put into modules.
    pub fault: Option<Fault>,
}

/// A fault that is put into a kernel on purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// How the kernel's name begins.
    pub kernel: String,
    /// One of [`Self::KINDS`].
    pub kind: String,
    /// Which of the places for this kind in the kernel, from zero.
    pub place: usize,
}

impl Fault {
    /// The kinds, as in README.md.
    pub const KINDS: [&str; 8] = ["barrier", "read", "write", "shared", "initial", "compare", "lane", "fragment"];

    fn from_text(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (kernel, kind) = (parts.next()?.to_owned(), parts.next()?.to_owned());
        let place = parts.next().map_or(Some(0), |place| place.parse().ok())?;
        (Self::KINDS.contains(&kind.as_str()) && parts.next().is_none()).then_some(Self { kernel, kind, place })
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn parsed<T: std::str::FromStr>(name: &str, default: T) -> T {
    let Some(text) = variable(name) else { return default };
    text.parse().unwrap_or_else(|_| {
        eprintln!("softcuda: `{name}` is `{text}`, which is not a value for it");
        std::process::exit(2)
    })
}

impl Settings {
    /// Reads the environment.
    pub fn from_environment() -> Self {
        let sm = parsed("SOFTCUDA_SM", 80);
        // CubeCL decides by the name whether a device of 7.5 has tensor cores.
        let name = match sm {
            75 => "NVIDIA GeForce GTX 1660",
            80 => "NVIDIA A100",
            86 => "NVIDIA RTX A6000",
            89 => "NVIDIA GeForce RTX 4090",
            90 => "NVIDIA H100",
            100 => "NVIDIA B200",
            _ => "CUDA device in software",
        };
        let checks = variable("SOFTCUDA_CHECKS").unwrap_or_else(|| "uninitialized,host,barriers".into());
        let check = |name| checks.split(',').any(|check| check.trim() == name || check.trim() == "all");
        for word in checks.split(',').map(str::trim) {
            if !matches!(word, "all" | "none" | "uninitialized" | "host" | "reads" | "barriers" | "races" | "") {
                eprintln!("softcuda: `SOFTCUDA_CHECKS` names the unknown check `{word}`");
                std::process::exit(2);
            }
        }
        let fault = variable("SOFTCUDA_FAULT").map(|text| {
            Fault::from_text(&text).unwrap_or_else(|| {
                eprintln!(
                    "softcuda: `SOFTCUDA_FAULT` is `{text}`, and not KERNEL:KIND:N with a KIND of {:?}",
                    Fault::KINDS
                );
                std::process::exit(2)
            })
        });
        let races = check("races");
        // Not a part of `all`: a kernel may read what it does not use.
        let strict = checks.split(',').any(|check| check.trim() == "reads");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            sm,
            name: variable("SOFTCUDA_NAME").unwrap_or_else(|| name.into()),
            driver: parsed("SOFTCUDA_DRIVER", 12090),
            devices: parsed("SOFTCUDA_DEVICES", 1_usize).min(crate::memory::DEVICES),
            memory: parsed::<u64>("SOFTCUDA_MEMORY", 16) << 30,
            folder: variable("SOFTCUDA_DIR").map_or_else(|| std::env::temp_dir().join("softcuda"), PathBuf::from),
            log: variable("SOFTCUDA_LOG").map(PathBuf::from),
            ptxas: variable("SOFTCUDA_PTXAS").map(PathBuf::from),
            architectures: variable("SOFTCUDA_ARCHITECTURES")
                .map(|list| list.split(',').map(|sm| sm.trim().trim_start_matches("sm_").to_owned()).collect())
                .unwrap_or_default(),
            // The last accesses are remembered without locks.
            threads: if races { 1 } else { parsed("SOFTCUDA_THREADS", cores).clamp(1, 64) },
            uninitialized: check("uninitialized") || strict,
            host: check("host") || strict,
            strict,
            barriers: check("barriers"),
            races,
            sticky: parsed("SOFTCUDA_STICKY", 1_u8) != 0,
            counts: variable("SOFTCUDA_COUNTS").map(|path| path.replace("%p", &std::process::id().to_string()).into()),
            cc: variable("SOFTCUDA_CC").unwrap_or_else(|| "cc".into()),
            optimization: variable("SOFTCUDA_OPT").unwrap_or_else(|| "-O1".into()),
            timeout: parsed("SOFTCUDA_TIMEOUT", 300),
            dump: parsed("SOFTCUDA_DUMP", 0_u8) != 0,
            fault,
        }
    }
}

/// The settings, read when first asked for.
pub fn get() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(Settings::from_environment)
}
