//! Hostile GGUF files: truncated, with wrong lengths, with random changes. Each is read or refused, without a panic, quickly,
//! and in memory in proportion to the file.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::fixture;
use moonlight_convert::Checkpoint;
use moonlight_convert::gguf::{GgufHeader, GgufOptions, sidecar_files};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Memory that a header may take, in multiples of its length. The least string has 8 bytes in a file and 24 in memory, the
/// least array of arrays 12 and 32; a vector is made of bytes that exist next to it for a moment.
const FACTOR: usize = 8;
/// And this much in addition.
const BASE: usize = 100_000;
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

/// Runs `work`; returns its result and the bytes that it had allocated at once. Panics with `name` if it panics or takes long.
fn measured<R>(name: &str, work: impl FnOnce() -> R) -> (R, usize) {
    let (before, start) = (NOW.load(Relaxed), Instant::now());
    MOST.store(before, Relaxed);
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| panic!("{name} panics"));
    let taken = MOST.load(Relaxed) - before;
    assert!(start.elapsed() < LONGEST, "{name} takes {:?}", start.elapsed());
    (result, taken)
}

/// A file, and the length of its header.
fn written(family: &str, dir: &Path) -> (Vec<u8>, usize) {
    let path = dir.join("model.gguf");
    let options = GgufOptions { overwrite: true, ..GgufOptions::default() };
    Checkpoint::open(fixture(family)).unwrap().write_gguf(&path, &options, &()).unwrap();
    let bytes = fs::read(path).unwrap();
    let header = GgufHeader::parse(bytes.as_slice(), bytes.len() as u64).unwrap();
    (bytes, header.data_start as usize)
}

fn parse(name: &str, header: &[u8], length: usize) -> Result<GgufHeader, String> {
    let (result, taken) = measured(name, || GgufHeader::parse(header, length as u64));
    assert!(taken <= FACTOR * header.len() + BASE, "{name} takes {taken} bytes for {} bytes", header.len());
    if let Err(problem) = &result {
        assert!(!problem.chars().any(char::is_control), "{name}: {problem:?}");
        // Lists of names are cut, but names may be as long as the file allows.
        assert!(problem.len() < header.len() + 2_000, "{name}: {} bytes of message", problem.len());
    }
    result
}

#[test]
fn a_file_that_ends_at_any_byte_is_refused() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let home = tempfile::tempdir().unwrap();
    let (bytes, header) = written("llama", home.path());
    for end in 0..header {
        let problem = parse(&format!("the first {end} bytes"), &bytes[..end], end).unwrap_err();
        assert!(problem.contains("trunc") || problem.contains("claims"), "{end}: {problem}");
    }
    // In the values: the end is found from the header, without reading them.
    // Padding after the last tensor may be absent.
    let claimed = GgufHeader::claimed_length(&bytes).unwrap() as usize;
    assert!(parse("all values", &bytes[..header], claimed).is_ok());
    for end in [header, header + 1, claimed - 1] {
        let problem = parse("values", &bytes[..header], end).unwrap_err();
        assert!(problem.contains("is truncated"), "{problem}");
    }
}

/// Every length, count, size and offset is at some position of the header.
#[test]
fn huge_numbers_at_any_position_are_harmless() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let home = tempfile::tempdir().unwrap();
    let (bytes, header) = written("moonlight-like", home.path());
    let huge = [u64::MAX, 1 << 63, i64::MAX as u64, 1 << 32, u64::from(u32::MAX), 99_999_999, bytes.len() as u64];
    for at in 4..header - 8 {
        for number in huge {
            let mut changed = bytes[..header].to_vec();
            changed[at..at + 8].copy_from_slice(&number.to_le_bytes());
            drop(parse(&format!("{number} at {at}"), &changed, bytes.len()));
        }
        let mut changed = bytes[..header].to_vec();
        changed[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        drop(parse(&format!("32 bits at {at}"), &changed, bytes.len()));
    }
}

/// A file of nothing but the least elements takes the most memory for its size.
#[test]
fn memory_is_in_proportion_to_the_file() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let start =
        |tensors: u64, keys: u64| [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &keys.to_le_bytes()].concat();
    let array = |element: u32, count: u64, bytes: usize| {
        let key = [&1u64.to_le_bytes()[..], b"k", &9u32.to_le_bytes(), &element.to_le_bytes(), &count.to_le_bytes()];
        [start(0, 1), key.concat(), vec![0; bytes]].concat()
    };
    let count = 100_000;
    for (name, bytes) in [
        ("empty strings", array(8, count, 8 * count as usize)),
        ("empty arrays", array(9, count, 12 * count as usize)),
        ("bytes", array(0, count, count as usize)),
        ("booleans", array(7, count, count as usize)),
        ("tensors without a name", [start(count, 0), vec![0; 24 * count as usize]].concat()),
        ("keys without a name", [start(0, 4096), vec![0; 13 * 4096]].concat()),
        ("a count without elements", array(8, u64::MAX / 8, 64)),
        ("as many keys as bytes", start(0, u64::MAX)),
        ("as many tensors as bytes", start(u64::MAX, 0)),
    ] {
        drop(parse(name, &bytes, bytes.len()));
    }
}

#[test]
fn random_changes_are_read_or_refused() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let inputs: usize = std::env::var("FUZZ_INPUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_500);
    let home = tempfile::tempdir().unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(22);
    for family in ["moonlight-like", "llama"] {
        let (bytes, header) = written(family, home.path());
        let path = home.path().join("changed.gguf");
        let mut opened = 0;
        for input in 0..inputs {
            let mut changed = bytes.clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(8..header);
                match random.random_range(0..5) {
                    0 => changed[at] ^= 1 << random.random_range(0..8),
                    1 => changed[at] = random.random(),
                    2 => changed[at] = changed[at].wrapping_add(1),
                    3 => drop(changed.remove(at)),
                    _ => changed.insert(at, random.random()),
                }
            }
            let name = format!("change {input} of {family}");
            // A string may take as much as the file has, which is far more than this header.
            drop(parse(&name, &changed[..header], header));
            fs::write(&path, &changed).unwrap();
            let (good, taken) = measured(&name, || {
                drop(sidecar_files(&path));
                let Ok(checkpoint) = Checkpoint::open(&path) else { return false };
                drop(checkpoint.problems());
                drop(checkpoint.summary());
                checkpoint.problems().is_empty()
            });
            // Reports of a model that the metadata describes, and that the file does not contain.
            assert!(taken < 50_000_000, "{name} takes {taken} bytes");
            opened += usize::from(good);
        }
        assert!(opened > 0, "{family}: none of {inputs} changes leaves a model");
    }
}

/// Values are checked when they are read: any bytes are some numbers.
#[test]
fn random_values_are_loaded_or_refused() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let home = tempfile::tempdir().unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let path = home.path().join("model.gguf");
    for block_type in moonlight_convert::gguf::BlockType::ALL {
        let options = GgufOptions { block_type: Some(block_type), overwrite: true };
        let source = Checkpoint::open(fixture("moonlight-like")).unwrap();
        if source.write_gguf(&path, &options, &()).is_err() {
            continue; // a type that is only read
        }
        let mut bytes = fs::read(&path).unwrap();
        let start = GgufHeader::parse(bytes.as_slice(), bytes.len() as u64).unwrap().data_start as usize;
        random.fill(&mut bytes[start..]);
        fs::write(&path, &bytes).unwrap();
        measured(&format!("random {block_type}"), || {
            let loaded = Checkpoint::open(&path).unwrap().load(&burn::tensor::Device::default(), None);
            if let Err(error) = loaded {
                let text = error.to_string();
                assert!(text.contains("NaN or inf") || text.contains("non-finite"), "{text}");
            }
        });
    }
}

/// The seeds of the fuzz target are models, from which its changes start.
#[test]
fn the_seeds_of_the_fuzz_target_are_loaded() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("model.gguf");
    for seed in ["llama", "deepseek", "scored"] {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/gguf");
        let mut bytes = fs::read(corpus.join(seed)).unwrap();
        let end = GgufHeader::claimed_length(&bytes).unwrap();
        bytes.resize(end as usize, 0x3c);
        fs::write(&path, bytes).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.problems(), [], "{seed}");
        checkpoint.load(&burn::tensor::Device::default(), None).unwrap();
        let names: Vec<String> = sidecar_files(&path).unwrap().into_iter().map(|(name, _)| name).collect();
        assert!(names.iter().any(|name| name == "tokenizer.json"), "{seed}: {names:?}");
    }
}
