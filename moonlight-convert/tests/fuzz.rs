//! Fuzzing. Real configs, indexes and headers (of transformers' checkpoints and of the full-size Moonlight) are changed
//! at random and opened: the result is always a value or an error, quickly and in little memory.
//!
//! ```text
//! FUZZ_INPUTS=1000000 cargo test -p moonlight-convert --test fuzz -- --ignored --nocapture
//! ```
//!
//! `FUZZ_SEED` selects other changes; a failure names the input, and `FUZZ_FIRST=N FUZZ_INPUTS=1` repeats it.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use burn::tensor::Device;
use moonlight_convert::adapter::{base_of, is_adapter, read_adapter, write_adapter};
use moonlight_convert::tokenizer::write_tokenizer_json;
use moonlight_convert::{Checkpoint, Format, SaveOptions, hugging_face_tensors, load, sidecars_in};
use moonlight_model::ModelConfig;
use moonlight_model::lora::LoraConfig;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// The most bytes allocated at a time while opening an input.
const MOST_MEMORY: usize = 100_000_000;
/// The longest time for an input, on a machine with other load.
const LONGEST: Duration = Duration::from_secs(10);

/// Counts the allocated bytes, and their maximum since the last reset.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every request is passed unchanged to the system's allocator; only counters are added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps `alloc`'s promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the pointer came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// One run at a time: the counters are global.
static ALONE: Mutex<()> = Mutex::new(());

/// A valid directory: the texts to change, and the sizes of the data after headers.
#[derive(Clone)]
struct Base {
    name: &'static str,
    files: Vec<Part>,
}

#[derive(Clone)]
struct Part {
    name: String,
    kind: Kind,
    /// The text; for a weight file, its header.
    text: Vec<u8>,
    /// The beginning of the data that follows; the rest of the file is sparse.
    data: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    /// A header preceded by its length, and the size of the data after it.
    Weights(u64),
    /// A header that contains its own length, and the size of the data after it.
    Burnpack(u64),
}

impl Part {
    fn text(name: &str, text: impl Into<Vec<u8>>) -> Self {
        Self { name: name.into(), kind: Kind::Text, text: text.into(), data: Vec::new() }
    }

    /// Writes the file, with `length` as the header's length and `data` as the size of the data instead of the true
    /// ones.
    fn write(&self, dir: &Path, text: &[u8], length: Option<u64>, data: Option<u64>) {
        let mut file = File::create(dir.join(&self.name)).unwrap();
        match self.kind {
            Kind::Text => file.write_all(text).unwrap(),
            Kind::Weights(own) => {
                file.write_all(&length.unwrap_or(text.len() as u64).to_le_bytes()).unwrap();
                file.write_all(text).unwrap();
                file.write_all(&self.data).unwrap();
                file.set_len(8 + text.len() as u64 + data.unwrap_or(own)).unwrap();
            }
            Kind::Burnpack(own) => {
                file.write_all(text).unwrap();
                file.set_len(text.len() as u64 + data.unwrap_or(own)).unwrap();
            }
        }
    }
}

fn weights(path: &Path, name: &str) -> Part {
    let bytes = fs::read(path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (text, data) = (bytes[8..header].to_vec(), bytes[header..].to_vec());
    Part { name: name.into(), kind: Kind::Weights(data.len() as u64), text, data }
}

/// The fixtures' directories; without values, except for those whose values are read on opening.
fn fixtures() -> Vec<Base> {
    let base = |name: &'static str| {
        let dir = common::fixture(name);
        let quantized = name.starts_with("quantized");
        let mut names: Vec<String> =
            fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let files = names
            .iter()
            .filter(|name| name.starts_with("model") || *name == "config.json")
            .map(|name| match name.ends_with(".safetensors") {
                true if quantized => weights(&dir.join(name), name),
                true => Part { data: Vec::new(), ..weights(&dir.join(name), name) },
                false => Part::text(name, fs::read(dir.join(name)).unwrap()),
            })
            .collect();
        Base { name, files }
    };
    common::FAMILIES.into_iter().chain(["quantized/fp8", "quantized/int4"]).map(base).collect()
}

/// A fixture in Burn's format.
fn burnpack() -> Base {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("burnpack");
    let options = SaveOptions { format: Format::Burnpack, ..SaveOptions::default() };
    Checkpoint::open(common::fixture("moonlight-like")).unwrap().convert(&dir, &options).unwrap();
    let bytes = fs::read(dir.join("model.bpk")).unwrap();
    // The descriptors in CBOR are at the beginning.
    let (text, rest) = bytes.split_at(bytes.len().min(16_000));
    let kind = Kind::Burnpack(rest.len() as u64);
    let model = Part { name: "model.bpk".into(), kind, text: text.to_vec(), data: Vec::new() };
    let config = Part::text("config.json", fs::read(dir.join("config.json")).unwrap());
    Base { name: "burnpack", files: vec![config, model] }
}

/// The full-size Moonlight: its config, its index with all names, and the header of one shard with the true sizes.
fn full_size() -> Base {
    let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
    let tensors: Vec<_> = config.parameter_shapes().iter().flat_map(hugging_face_tensors).collect();
    let (mut map, mut header, mut end) = (BTreeMap::new(), serde_json::Map::new(), 0);
    for (place, tensor) in tensors.iter().enumerate() {
        let shard = place * 27 / tensors.len();
        map.insert(tensor.name.clone(), format!("model-{}-of-27.safetensors", shard + 1));
        if shard == 3 {
            let bytes = 2 * tensor.shape.iter().product::<usize>() as u64;
            let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + bytes]});
            header.insert(tensor.name.clone(), entry);
            end += bytes;
        }
    }
    let index = json!({"metadata": {"total_size": 31_920_223_872_u64}, "weight_map": map});
    let shard = Part {
        name: "model-4-of-27.safetensors".into(),
        kind: Kind::Weights(end),
        text: Value::Object(header).to_string().into_bytes(),
        data: Vec::new(),
    };
    let files = vec![
        Part::text("config.json", config.to_json()),
        Part::text("model.safetensors.index.json", index.to_string()),
        shard,
    ];
    Base { name: "moonlight-16b-a3b", files }
}

/// Ranks, and the config next to them.
fn tokenizer() -> Base {
    let pairs = ["th", "he", "the", " t", " the", "in", "月", "\r\n"].map(|token| token.as_bytes().to_vec());
    let mut ranks = String::new();
    for (rank, token) in (0..=u8::MAX).map(|byte| vec![byte]).chain(pairs).enumerate() {
        writeln!(ranks, "{} {rank}", STANDARD.encode(token)).unwrap();
    }
    let config = json!({"added_tokens_decoder": {"264": {"content": "[BOS]", "special": true}, "300": "<|x|>"}});
    let files = vec![Part::text("tiktoken.model", ranks), Part::text("tokenizer_config.json", config.to_string())];
    Base { name: "tokenizer", files }
}

/// An adapter of a fixture: its config, with patterns, and the header of its matrices.
fn adapter() -> Base {
    let home = tempfile::tempdir().unwrap();
    let fixture = common::fixture("moonlight-like");
    let lora = LoraConfig { rank: 3, alpha: 5.0, dropout: 0.1, rslora: false, targets: vec!["all".to_owned()] };
    let model = load(&fixture, &Device::default(), None).unwrap().model.with_lora(&lora, 7).unwrap();
    write_adapter(&model, home.path(), &fixture, None).unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(home.path().join("adapter_config.json")).unwrap()).unwrap();
    config["alpha_pattern"][".*q_proj"] = json!(5);
    config["alpha_pattern"]["layers\\.[0-9]+\\.mlp\\.up_proj"] = json!(5.0);
    let weights = weights(&home.path().join("adapter_model.safetensors"), "adapter_model.safetensors");
    Base { name: "adapter", files: vec![Part::text("adapter_config.json", config.to_string()), weights] }
}

/// Numbers at limits and beyond, and values that are not numbers.
const NUMBERS: [&str; 24] = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "63",
    "65",
    "255",
    "256",
    "1000",
    "65535",
    "65536",
    "2147483647",
    "4294967295",
    "1000000000000",
    "9007199254740993",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "1e-400",
    "0.5",
    "null",
];
const TEXTS: [&str; 20] = [
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "C:\\x",
    "\\u0000",
    "\\u001b[2J",
    "",
    "model.safetensors",
    "config.json",
    "BF16",
    "F8_E4M3",
    "F4",
    "U64",
    "C64",
    "I32",
    "deepseek_v3",
    "llama",
    "fp8",
    "\\ud800",
];

/// Makes a few random changes to a text.
fn change(text: &mut Vec<u8>, others: &[&[u8]], random: &mut ChaCha8Rng) {
    for _ in 0..random.random_range(1..=4) {
        let length = text.len();
        let at = |random: &mut ChaCha8Rng| if length == 0 { 0 } else { random.random_range(0..length) };
        match random.random_range(0..14) {
            0 if length > 0 => text[at(random)] ^= 1 << random.random_range(0..8),
            1 if length > 0 => text[at(random)] = random.random(),
            2 => text.truncate(at(random)),
            3 => text.insert(at(random), *b"{}[]\",:0e-\xFF\n".choose(random).unwrap()),
            4 => {
                let (from, to) = (at(random), at(random));
                let part = text[from.min(to)..from.max(to)].to_vec();
                let part = &part[..part.len().min(2_000)];
                let place = at(random);
                text.splice(place..place, part.iter().copied());
            }
            5 => {
                let from = at(random);
                text.drain(from..(from + random.random_range(0..200)).min(length));
            }
            6 => {
                let other = others.choose(random).copied().unwrap_or_default();
                if !other.is_empty() {
                    let from = random.random_range(0..other.len());
                    let part = &other[from..(from + random.random_range(0..500)).min(other.len())];
                    let place = at(random);
                    text.splice(place..place, part.iter().copied());
                }
            }
            7..=10 => replace_number(text, random),
            11 => replace_string(text, random),
            12 => double_entry(text, random),
            _ => {
                let place = at(random);
                let deep = *[10, 127, 128, 5_000].choose(random).unwrap();
                let opening = if random.random() { b"[".as_slice() } else { b"{\"a\":".as_slice() };
                text.splice(place..place, opening.repeat(deep));
            }
        }
    }
}

/// Replaces a number by another.
fn replace_number(text: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    if text.is_empty() {
        return;
    }
    let from = random.random_range(0..text.len());
    let Some(start) = text[from..].iter().position(u8::is_ascii_digit).map(|start| from + start) else { return };
    let end = text[start..].iter().position(|byte| !byte.is_ascii_digit()).map_or(text.len(), |end| start + end);
    let number = match random.random_range(0..4) {
        // Near the old one, for checks that are off by one.
        0 => {
            let old: u64 = String::from_utf8_lossy(&text[start..end]).parse().unwrap_or(0);
            old.wrapping_add(random.random_range(0..5)).wrapping_sub(2).to_string()
        }
        1 => random.random_range(0..2_000_000_u64).to_string(),
        _ => NUMBERS.choose(random).copied().unwrap_or_default().to_owned(),
    };
    text.splice(start..end, number.into_bytes());
}

/// Replaces a string by another.
fn replace_string(text: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    let quotes: Vec<usize> = text.iter().enumerate().filter(|(_, byte)| **byte == b'"').map(|(at, _)| at).collect();
    if quotes.len() < 2 {
        return;
    }
    let first = random.random_range(0..quotes.len() - 1);
    let new = TEXTS.choose(random).copied().unwrap_or_default();
    text.splice(quotes[first] + 1..quotes[first + 1], new.bytes());
}

/// Duplicates an entry of a map.
fn double_entry(text: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    let commas: Vec<usize> = text.iter().enumerate().filter(|(_, byte)| **byte == b',').map(|(at, _)| at).collect();
    if commas.len() < 2 {
        return;
    }
    let first = random.random_range(0..commas.len() - 1);
    let last = (first + random.random_range(1..6)).min(commas.len() - 1);
    let entry = text[commas[first]..commas[last]].to_vec();
    text.splice(commas[first]..commas[first], entry);
}

/// The largest checkpoint that is converted: a still valid one may claim a terabyte in a sparse file.
const MOST_CONVERTED: u64 = 1_000_000;

/// Everything that a program does with a directory before it reads weights; for small valid ones, also a conversion.
fn open_everything(dir: &Path, convert: bool) -> Seen {
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            assert_one_line(&error.to_string());
            drop(error.hint());
            return Seen::Refused;
        }
    };
    let count = checkpoint.config().parameter_count();
    assert!(count.total >= count.activated || count.total == u64::MAX);
    drop(sidecars_in(checkpoint.dir()));
    match checkpoint.summary() {
        Ok(summary) => drop(serde_json::to_string(&summary)),
        Err(error) => assert_one_line(&error.to_string()),
    }
    let problems = checkpoint.problems();
    for problem in problems.iter().take(1_000) {
        assert_one_line(&problem.to_string());
    }
    if !problems.is_empty() {
        return Seen::Problems;
    }
    drop(checkpoint.skipped());
    let bytes: u64 = checkpoint.tensors().map(|(_, tensor)| tensor.bytes()).sum();
    for (_, tensor) in checkpoint.tensors().filter(|_| bytes <= MOST_CONVERTED) {
        assert_eq!(checkpoint.data(tensor).unwrap().len() as u64, tensor.bytes());
    }
    if convert && bytes <= MOST_CONVERTED {
        // Only now are non-finite values found, for example.
        if let Err(error) = checkpoint.convert(&dir.with_extension("converted"), &SaveOptions::default()) {
            assert_one_line(&error.to_string());
        }
    }
    Seen::Valid
}

/// Text from a file must not forge a line of output or reach the terminal as a command.
fn assert_one_line(message: &str) {
    assert!(!message.chars().any(char::is_control), "{}", message.escape_debug());
}

fn open_adapter(model: &ModelConfig, dir: &Path) -> Seen {
    assert!(is_adapter(dir) || !dir.join("adapter_config.json").exists());
    if let Err(error) = base_of(dir) {
        assert_one_line(&error.to_string());
    }
    match read_adapter(model, dir) {
        Ok(adapters) => {
            assert!(adapters.iter().all(|adapter| adapter.settings.scale(1).is_finite()));
            Seen::Valid
        }
        Err(error) => {
            assert_one_line(&error.to_string());
            drop(error.hint());
            Seen::Refused
        }
    }
}

fn open_tokenizer(dir: &Path) -> Seen {
    match write_tokenizer_json(dir, true) {
        Ok(_) => Seen::Valid,
        Err(error) => {
            assert_one_line(&error.to_string());
            Seen::Refused
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Refused,
    Problems,
    Valid,
}

#[derive(Default)]
struct Report {
    refused: u64,
    problems: u64,
    sound: u64,
    most_memory: (usize, u64),
    longest: (Duration, u64),
}

/// A directory for thousands of writes per second, in memory if possible.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn fuzz(seed: u64, inputs: std::ops::Range<u64>) -> Report {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut bases = fixtures();
    bases.extend([burnpack(), adapter(), full_size(), tokenizer()]);
    let model = Checkpoint::open(common::fixture("moonlight-like")).unwrap().config().clone();
    let home = scratch();
    let dirs: Vec<PathBuf> = bases
        .iter()
        .map(|base| {
            let dir = home.path().join(base.name);
            fs::create_dir_all(&dir).unwrap();
            base.files.iter().for_each(|file| file.write(&dir, &file.text, None, None));
            dir
        })
        .collect();
    // The unchanged directories are valid.
    for (base, dir) in bases.iter().zip(&dirs) {
        let seen = match base.name {
            "tokenizer" => open_tokenizer(dir),
            "adapter" => open_adapter(&model, dir),
            _ => open_everything(dir, true),
        };
        // Of the full-size model, 26 of the 27 files are missing.
        let expected = if base.name == "moonlight-16b-a3b" { Seen::Problems } else { Seen::Valid };
        assert!(seen == expected, "{}", base.name);
    }
    let headers: Vec<&[u8]> = bases.iter().flat_map(|base| &base.files).map(|file| file.text.as_slice()).collect();
    let mut report = Report::default();
    for input in inputs {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(input);
        // The full-size model takes a hundred times longer than the others.
        let which = match random.random_range(0..200) {
            0 => bases.len() - 2,
            1..=15 => bases.len() - 1,
            16..=45 => bases.len() - 3,
            _ => random.random_range(0..bases.len() - 3),
        };
        let (base, dir) = (&bases[which], &dirs[which]);
        let mut changed = Vec::new();
        for _ in 0..random.random_range(1..=2) {
            let part = base.files.choose(&mut random).unwrap();
            let mut text = part.text.clone();
            change(&mut text, &headers, &mut random);
            let odd = |random: &mut ChaCha8Rng| random.random_range(0..16) == 0;
            let length = odd(&mut random).then(|| match random.random_range(0..3) {
                0 => random.random(),
                1 => (text.len() as u64).wrapping_add(random.random_range(0..20)).wrapping_sub(10),
                _ => *[0, 1, 1 << 31, 1 << 32, u64::MAX - 7, u64::MAX].choose(&mut random).unwrap(),
            });
            // The file has the size in its header, or is longer or truncated. It contains no data, only the header.
            let data = odd(&mut random).then(|| match random.random_range(0..3) {
                0 => 0,
                1 => random.random_range(0..1 << 40),
                _ => random.random_range(0..300_000),
            });
            part.write(dir, &text, length, data);
            changed.push(part);
        }
        let (before, begun) = (NOW.load(Relaxed), Instant::now());
        MOST.store(before, Relaxed);
        let seen = catch_unwind(AssertUnwindSafe(|| match base.name {
            "tokenizer" => open_tokenizer(dir),
            "adapter" => open_adapter(&model, dir),
            _ => open_everything(dir, input % 4 == 0),
        }));
        let (memory, time) = (MOST.load(Relaxed).saturating_sub(before), begun.elapsed());
        let names: Vec<&str> = changed.iter().map(|part| part.name.as_str()).collect();
        let which = || format!("input {input} of seed {seed} ({} with another {})", base.name, names.join(", "));
        match seen {
            Ok(Seen::Refused) => report.refused += 1,
            Ok(Seen::Problems) => report.problems += 1,
            Ok(Seen::Valid) => report.sound += 1,
            Err(_) => panic!("{} panics", which()),
        }
        assert!(memory <= MOST_MEMORY, "{} allocates {memory} bytes", which());
        assert!(time <= LONGEST, "{} takes {time:?}", which());
        report.most_memory = report.most_memory.max((memory, input));
        report.longest = report.longest.max((time, input));
        changed.iter().for_each(|part| part.write(dir, &part.text, None, None));
    }
    report
}

fn print(report: &Report, inputs: u64, begun: Instant) {
    let Report { refused, problems, sound, most_memory, longest } = report;
    println!("{inputs} inputs in {:.0?}: {refused} refused, {problems} with problems, {sound} sound", begun.elapsed());
    println!("most memory {:.1} MB (input {})", most_memory.0 as f64 / 1e6, most_memory.1);
    println!("longest {:.1?} (input {})", longest.0, longest.1);
}

#[test]
fn some_thousand_inputs_cause_no_panic() {
    let begun = Instant::now();
    let report = fuzz(1, 0..4_000);
    print(&report, 4_000, begun);
    // Changes without effect, or that all fail at the first brace, would test nothing.
    assert!(report.refused > 400 && report.problems > 400 && report.sound > 40);
}

#[test]
#[ignore = "takes minutes"]
fn many_inputs_cause_no_panic() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, inputs) = (number("FUZZ_FIRST").unwrap_or(0), number("FUZZ_INPUTS").unwrap_or(1_000_000));
    let begun = Instant::now();
    print(&fuzz(number("FUZZ_SEED").unwrap_or(2), first..first + inputs), inputs, begun);
}

/// Cases that random changes might miss: each is refused or reported.
#[test]
fn known_inconsistencies_are_refused() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let base = fixtures().remove(0);
    let home = scratch();
    let dir = home.path();
    let config = base.files.iter().find(|part| part.name == "config.json").unwrap();
    let weights = base.files.iter().find(|part| part.name == "model.safetensors").unwrap();
    base.files.iter().for_each(|part| part.write(dir, &part.text, None, None));
    assert!(open_everything(dir, true) == Seen::Valid);

    let sizes: Value = serde_json::from_slice(&config.text).unwrap();
    for (key, value) in sizes.as_object().unwrap() {
        if !value.is_u64() || key.ends_with("_token_id") {
            continue;
        }
        for size in [1_000_000_000_000_u64, u64::MAX, 1 << 20, 1 << 16, 10_000] {
            let mut changed = sizes.clone();
            changed[key] = json!(size);
            config.write(dir, changed.to_string().as_bytes(), None, None);
            let before = NOW.load(Relaxed);
            MOST.store(before, Relaxed);
            let begun = Instant::now();
            open_everything(dir, true);
            let memory = MOST.load(Relaxed).saturating_sub(before);
            assert!(memory <= MOST_MEMORY && begun.elapsed() < LONGEST, "{key} = {size}: {memory} bytes");
        }
    }
    for text in [&b"\xFF\xFE"[..], b"", b"[]", b"null", &b"[".repeat(1_000_000), br#"{"hidden_size": 1e400}"#] {
        config.write(dir, text, None, None);
        assert!(open_everything(dir, true) == Seen::Refused);
    }
    config.write(dir, &[config.text.as_slice(), &b" ".repeat(2_000_000)].concat(), None, None);
    assert!(Checkpoint::open(dir).unwrap_err().to_string().contains("more than the limit"));
    config.write(dir, &config.text, None, None);

    // A sparse file of a terabyte, and headers that claim its size.
    for (length, data) in [(Some(1 << 40), Some(1 << 40)), (Some(100_000_001), Some(1 << 40)), (None, Some(1 << 40))] {
        weights.write(dir, &weights.text, length, data);
        let before = NOW.load(Relaxed);
        MOST.store(before, Relaxed);
        assert!(open_everything(dir, true) == Seen::Problems);
        assert!(MOST.load(Relaxed).saturating_sub(before) < MOST_MEMORY);
    }
}

#[cfg(unix)]
#[test]
fn links_out_of_the_directory_are_refused() {
    use std::os::unix::fs::symlink;
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("model");
    let copy = || {
        drop(fs::remove_dir_all(&dir));
        fs::create_dir(&dir).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(common::fixture("moonlight-like").join(name), dir.join(name)).unwrap();
        }
    };
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        copy();
        fs::write(home.path().join("outside"), "{}").unwrap();
        drop(fs::remove_file(dir.join(name)));
        symlink(home.path().join("outside"), dir.join(name)).unwrap();
        let refused = match Checkpoint::open(&dir) {
            Err(error) => error.to_string(),
            Ok(checkpoint) => sidecars_in(checkpoint.dir()).unwrap_err().to_string(),
        };
        assert!(refused.contains("a symbolic link that leads out of the directory"), "{name}: {refused}");
    }
    // Also for a shard in an index, where it is reported along with other problems.
    copy();
    fs::rename(dir.join("model.safetensors"), home.path().join("shard")).unwrap();
    symlink("../shard", dir.join("a.safetensors")).unwrap();
    common::write_index(&dir, &BTreeMap::from([("norm.weight".to_owned(), "a.safetensors".to_owned())]));
    let problems = Checkpoint::open(&dir).unwrap().problems();
    assert!(problems[0].to_string().contains("`a.safetensors` is a symbolic link that leads out"), "{problems:?}");
}
