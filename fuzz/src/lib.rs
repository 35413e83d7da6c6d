//! The fuzz targets. Each does with its input what the programs do with an untrusted file of that kind, except for the
//! expensive work after it. Whatever the input, the call returns: no panic leaves the library, nothing aborts or loops
//! forever, and memory is bounded.
//!
//! An input that stands for several files is one text with NUL between its parts; see [`parts`].

use std::fs::{self, File};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use burn::module::ParamId;
use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use moonlight_convert::adapter::read_adapter;
use moonlight_convert::gguf::{self, GgufHeader};
use moonlight_convert::{Checkpoint, sidecars_in};
use moonlight_infer::token_reader::TokenReader;
use moonlight_infer::{ChatEncoder, ChatTemplate, Tokenizer};
use moonlight_model::ModelConfig;
use moonlight_model::kernels::{self, AttentionSpec, GroupLayout};
use moonlight_optim::{
    AdamWConfig, Coefficients, MuonConfig, NewtonSchulz, OptimizerOptions, Parameter, ParameterRules, Rule,
};
use moonlight_simd::Level;
use moonlight_simd::testing::at_level;
use moonlight_train::analysis::plots::{Axis, RunComparison, plot_runs, write_plots};
use moonlight_train::checkpoint::TrainerState;
use moonlight_train::data::Dataset;
use moonlight_train::recipe::{BrokenRecords, DataConfig, DataFormat, Draft, TokenizerName};
use tempfile::TempDir;

/// The `config.json` of the model that adapters and weights are read for.
const CONFIG: &str = include_str!("../../fixtures/compat/pretrain/checkpoints/step-00000003/config.json");

/// The message of the last panic, on any thread.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Runs once, before the first input. Replaces the panic hook of `libfuzzer-sys`, which would abort before the library can
/// catch a panic.
pub fn begin() {
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::capture();
        *PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(format!("{panic}\n{backtrace}"));
    }));
}

/// Runs `target`, and aborts if a panic leaves it, so that the fuzzer reports the input.
pub fn run(target: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(target)).is_err() {
        let message = PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        eprintln!("a panic left the library: {}", message.unwrap_or_default());
        std::process::abort();
    }
}

/// An empty folder for this process. It is in memory if `TMPDIR` is.
fn home() -> &'static Path {
    static HOME: OnceLock<TempDir> = OnceLock::new();
    HOME.get_or_init(|| tempfile::tempdir().expect("a folder for the inputs")).path()
}

/// The folder `name`, emptied for the next input.
fn empty(name: &str) -> PathBuf {
    let folder = home().join(name);
    drop(fs::remove_dir_all(&folder));
    fs::create_dir(&folder).expect("a folder for an input");
    folder
}

fn write(path: &Path, contents: &[u8]) {
    fs::write(path, contents).expect("an input fits into memory");
}

/// Splits an input at its first `N - 1` NULs into `N` files. The last part keeps its NULs; absent parts are empty.
fn parts<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut parts = [&data[..0]; N];
    for (part, found) in parts.iter_mut().zip(data.splitn(N, |byte| *byte == 0)) {
        *part = found;
    }
    parts
}

/// Asserts that the message of an error has no control characters, which a terminal would obey.
fn check_message(error: &impl ToString) {
    let message = error.to_string();
    assert!(!message.chars().any(|char| char.is_control() && char != '\n'), "{}", message.escape_debug());
}

/// Formats an error of a crate whose callers escape the message, to find a panic in its `Display`.
fn format_message(error: &impl ToString) {
    drop(error.to_string());
}

fn config() -> &'static ModelConfig {
    static MODEL: OnceLock<ModelConfig> = OnceLock::new();
    MODEL.get_or_init(|| ModelConfig::from_json(CONFIG).expect("the fixture is sound"))
}

/// `adapter_config.json`, NUL, `adapter_model.safetensors`.
pub fn adapter(data: &[u8]) {
    let [settings, weights] = parts(data);
    let folder = empty("adapter");
    write(&folder.join("adapter_config.json"), settings);
    write(&folder.join("adapter_model.safetensors"), weights);
    if let Err(error) = read_adapter(config(), &folder) {
        check_message(&error);
        drop(error.hint());
    }
}

/// A chat template, NUL, a record with a conversation.
pub fn chat_template(data: &[u8]) {
    let [template, record] = parts(data);
    let file = empty("chat").join("chat_template.jinja");
    write(&file, template);
    let tokenizer = Tokenizer::bytes_chat();
    let template = match ChatTemplate::from_file(&file, &tokenizer) {
        Ok(template) => template,
        Err(error) => return check_message(&error),
    };
    let encoder = ChatEncoder::new(template, tokenizer);
    let conversation = match encoder.parse(record) {
        Ok(conversation) => conversation,
        Err(error) => return check_message(&error),
    };
    for prompt in [false, true] {
        if let Err(error) = encoder.tokens(&conversation.messages(), prompt) {
            check_message(&error);
        }
    }
    if let Err(error) = encoder.weighted_tokens(&conversation) {
        check_message(&error);
    }
}

/// A letter for the kind of records (`c`hat, to`k`ens, else text), one for the file extension (`j`sonl, json for `a`rrays,
/// cs`v`, `g`z, `z`st, else txt), then the file.
pub fn data_records(data: &[u8]) {
    let [format, ending, contents @ ..] = data else { return };
    let (format, tokenizer) = match format {
        b'c' => (DataFormat::Chat, Some(Tokenizer::bytes_chat())),
        b'k' => (DataFormat::Tokens, None),
        _ => (DataFormat::Text, Some(Tokenizer::bytes())),
    };
    let ending = match ending {
        b'j' => "jsonl",
        b'a' => "json",
        b'v' => "csv",
        b'g' => "jsonl.gz",
        b'z' => "jsonl.zst",
        _ => "txt",
    };
    let folder = empty("data");
    let file = folder.join(format!("records.{ending}"));
    write(&file, contents);
    for broken in [BrokenRecords::Error, BrokenRecords::Skip] {
        let config = DataConfig {
            train: vec![file.display().to_string()],
            format,
            tokenizer: if format == DataFormat::Tokens { TokenizerName::None } else { TokenizerName::Bytes },
            sequence_length: 16,
            broken,
            // A small compressed file may expand to gigabytes.
            max_bytes: 1 << 20,
            cache_dir: empty("cache"),
            ..DataConfig::default()
        };
        match Dataset::open(&config, tokenizer.as_ref(), 262, 1) {
            Ok(data) => {
                let mut stream = data.train_stream(2);
                for _ in 0..3 {
                    if let Err(error) = stream.next_batch() {
                        check_message(&error);
                        break;
                    }
                }
                drop(data.inspect(2));
            }
            Err(error) => {
                check_message(&error);
                drop(error.hint());
            }
        }
    }
    // `moonlight score` reads the same file by another path.
    if matches!(ending, "jsonl" | "json" | "csv")
        && let Ok(reader) = TokenReader::open(&file)
        && let Err(error) = reader.for_each(Some(&Tokenizer::bytes()), |_| Ok(()))
    {
        check_message(&error);
    }
}

/// Shapes and dtype for the CPU kernels, a byte each. They do not come from files; this target runs kernels that write memory
/// in parallel and with vector instructions under AddressSanitizer, at each SIMD level.
pub fn kernels(data: &[u8]) {
    let mut sizes = data.iter().map(|byte| usize::from(*byte)).chain(std::iter::repeat(1));
    let mut size = |most: usize| sizes.next().unwrap_or(1) % most + 1;
    let half = size(2) == 2;
    let (tokens, input, output, k) = (size(70), size(70), size(140), size(3));
    let experts = k + 1 + size(4);
    let (heads, width) = (size(4), 2 * size(12));
    for &level in Level::ALL.iter().filter(|level| level.is_available()) {
        at_level(level, || run_kernels(half, [tokens, input, output], [k, experts], [heads, width]));
    }
}

fn run_kernels(half: bool, [tokens, input, output]: [usize; 3], [k, experts]: [usize; 2], [heads, width]: [usize; 2]) {
    let device = Device::flex().autodiff();
    let dtype = if half { DType::BF16 } else { DType::F32 };
    fn random<const D: usize>(shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
        let tensor: Tensor<D> = Tensor::random(shape, Distribution::Normal(0.0, 1.0), device);
        tensor.cast(dtype).require_grad()
    }
    let choices: Vec<u32> = (0..tokens * k).map(|slot| ((slot / k * 7 + slot % k) % experts) as u32).collect();
    let layout = Arc::new(GroupLayout::from_choices(&choices, k, experts));
    let rows = random([tokens, input], &device, dtype);
    let up = kernels::project(rows.clone(), random([input, output], &device, dtype));
    let gated = kernels::swiglu(up.clone(), up);
    let normed = kernels::rms_norm(gated, random([output], &device, dtype), 1e-5);
    let sent = kernels::dispatch_rows(normed, &layout);
    let moved = kernels::grouped_matmul(sent, random([experts, output, input], &device, dtype), &layout);
    let weights = random([tokens, k], &device, DType::F32);
    let combined = kernels::combine_rows(moved, weights, &layout);
    let targets = Tensor::<1, Int>::zeros([tokens], &device);
    let loss = kernels::cross_entropy(combined, targets).cast(DType::F32).sum();
    let query = random([1, tokens, heads, width], &device, dtype);
    let key_value = random([1, tokens, heads, 2 * width], &device, dtype);
    let attended = kernels::grouped_attention(query, key_value, AttentionSpec { scale: 0.3, starts: None });
    drop((loss + attended.cast(DType::F32).sum()).backward());
    let matrices = random([2, input, output], &device, DType::F32).inner();
    for products in [None, Some(DType::BF16)] {
        let mut iteration = NewtonSchulz::new(&Coefficients::Report, 2);
        iteration.dtype = products;
        drop(iteration.apply(matrices.clone()).into_data());
    }
}

/// `metrics.jsonl`.
pub fn metrics(data: &[u8]) {
    let folder = empty("run");
    let file = folder.join("metrics.jsonl");
    write(&file, data);
    if let Err(error) = write_plots(&file, &folder.join("plots")) {
        check_message(&error);
    }
    for axis in [Axis::Step, Axis::Tokens, Axis::Seconds] {
        let comparison = RunComparison { runs: vec![folder.clone()], metric: "loss".into(), axis };
        if let Err(error) = plot_runs(&comparison, &folder.join("loss.svg")) {
            check_message(&error);
        }
    }
}

/// `config.json`.
pub fn model_config(data: &[u8]) {
    let file = empty("config").join("config.json");
    write(&file, data);
    match ModelConfig::load(&file) {
        Ok(config) => {
            if let Err(error) = config.validate() {
                return format_message(&error);
            }
            config.parameter_count();
            let again = ModelConfig::from_json(&config.to_json());
            assert!(again.is_ok(), "a config that was written cannot be read again: {again:?}");
        }
        Err(error) => format_message(&error),
    }
}

/// The optimizer's state, a burnpack.
pub fn optimizer_state(data: &[u8]) {
    let file = empty("state").join("optimizer.bpk");
    write(&file, data);
    let shapes: [(&str, &[usize]); 5] =
        [("embedding", &[7, 4]), ("hidden.0", &[4, 6]), ("heads", &[4, 8]), ("experts", &[3, 4, 6]), ("gain", &[6])];
    let parameter = |(index, (path, shape)): (usize, (&str, &[usize]))| Parameter {
        path: path.into(),
        shape: shape.into(),
        module: "Linear".into(),
        trainable: true,
        id: ParamId::from(index as u64 + 1),
    };
    let rules = ParameterRules::new()
        .group("muon", MuonConfig::new())
        .group("adamw", AdamWConfig::new())
        .rule(Rule::to("adamw").path("embedding"))
        .rule(Rule::to("muon").rank(2..=3))
        .rule(Rule::to("adamw").rank(1..=1));
    let parameters = shapes.into_iter().enumerate().map(parameter).collect();
    let assignment = rules.assign_parameters(parameters).expect("the rules are sound");
    if let Err(error) = assignment.load(&[&file], OptimizerOptions::new()) {
        format_message(&error);
        drop(error.hint());
    }
    if let Err(error) = assignment.load_module_optimizer(&[&file]) {
        format_message(&error);
        drop(error.hint());
    }
}

/// A recipe. The paths in it are not resolved.
pub fn recipe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for sets in [&[][..], &["train.steps=3".to_owned(), "data.train=[\"a\"]".to_owned()]] {
        if let Err(error) = Draft::parse(text, Path::new("recipe.toml"), sets) {
            check_message(&error);
        }
    }
}

/// `model.safetensors.index.json` or nothing, NUL, the header of a weight file, NUL, the length of its data and, after a
/// comma, the length that the file claims for its header.
pub fn safetensors(data: &[u8]) {
    let [index, header, lengths] = parts(data);
    let folder = empty("model");
    write(&folder.join("config.json"), CONFIG.as_bytes());
    let name = if index.is_empty() { "model.safetensors" } else { "model-1.safetensors" };
    if !index.is_empty() {
        write(&folder.join("model.safetensors.index.json"), index);
    }
    let lengths = String::from_utf8_lossy(lengths);
    let mut lengths = lengths.split(',').map(|length| length.parse::<u64>().ok());
    let length = lengths.next().flatten().unwrap_or(0).min(1 << 40);
    let claimed = lengths.next().flatten().unwrap_or(header.len() as u64);
    let mut file = File::create(folder.join(name)).expect("a file for an input");
    file.write_all(&[&claimed.to_le_bytes(), header].concat()).expect("an input fits into memory");
    // The data is a hole in a sparse file.
    file.set_len(8 + header.len() as u64 + length).expect("a hole costs nothing");
    drop(file);
    let checkpoint = match Checkpoint::open(&folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            check_message(&error);
            drop(error.hint());
            return;
        }
    };
    drop(sidecars_in(checkpoint.dir()));
    if let Err(error) = checkpoint.summary() {
        check_message(&error);
    }
    for problem in checkpoint.problems().iter().take(1_000) {
        check_message(problem);
    }
}

/// A GGUF file, whose end may be missing: the values of tensors are filled in. The weights are loaded, and the tokenizer is
/// used.
pub fn gguf(data: &[u8]) {
    let file = empty("gguf").join("model.gguf");
    let mut contents = data.to_vec();
    // Without the values that it lists, a header would be refused as truncated.
    if let Some(end) = GgufHeader::claimed_length(data).filter(|end| *end < 1 << 20) {
        contents.resize(data.len().max(end as usize), 0x3c);
    }
    write(&file, &contents);
    drop(gguf::sidecar_files(&file).map_err(|error| check_message(&error)));
    let checkpoint = match Checkpoint::open(&file) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            check_message(&error);
            drop(error.hint());
            return;
        }
    };
    use_tokenizer(&file);
    if let Err(error) = checkpoint.summary() {
        check_message(&error);
    }
    let problems = checkpoint.problems();
    for problem in problems.iter().take(1_000) {
        check_message(problem);
    }
    if problems.is_empty()
        && checkpoint.config().parameter_count().total < 1 << 20
        && let Err(error) = checkpoint.load(&Device::default(), Some(DType::F32))
    {
        check_message(&error);
    }
}

/// `tiktoken.model`, NUL, `tokenizer_config.json`.
pub fn tiktoken_model(data: &[u8]) {
    let [ranks, settings] = parts(data);
    let folder = empty("tiktoken");
    write(&folder.join("tiktoken.model"), ranks);
    if !settings.is_empty() {
        write(&folder.join("tokenizer_config.json"), settings);
    }
    use_tokenizer(&folder);
    drop(moonlight_convert::tokenizer::write_tokenizer_json(&folder, true).map_err(|error| check_message(&error)));
}

/// `tokenizer.json`, NUL, `tokenizer_config.json`.
pub fn tokenizer_json(data: &[u8]) {
    let [tokenizer, settings] = parts(data);
    let folder = empty("tokenizer");
    write(&folder.join("tokenizer.json"), tokenizer);
    if !settings.is_empty() {
        write(&folder.join("tokenizer_config.json"), settings);
    }
    use_tokenizer(&folder);
}

fn use_tokenizer(folder: &Path) {
    let tokenizer = match Tokenizer::open(&folder.display().to_string()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            check_message(&error);
            drop(error.hint());
            return;
        }
    };
    for text in ["", " the 1 Moon\r\n\n", "月\u{200d}\u{0301}e\u{fffd}\u{0}<|im_end|>"] {
        match tokenizer.encode(text) {
            Ok(tokens) => drop(tokenizer.decode(&tokens)),
            Err(error) => check_message(&error),
        }
    }
    tokenizer.decode(&[0, 1, u32::MAX]);
    drop((tokenizer.specials(), tokenizer.eos(), tokenizer.bos(), tokenizer.vocab_size()));
    if let Err(error) = ChatTemplate::for_tokenizer(&tokenizer) {
        check_message(&error);
    }
}

/// `trainer.json`, NUL, `manifest.json` of the newest checkpoint of a run.
pub fn trainer_state(data: &[u8]) {
    let [state, manifest] = parts(data);
    if let Ok(state) = serde_json::from_slice::<TrainerState>(state) {
        // A state that was read can be written and read again.
        let text = serde_json::to_string(&state).expect("numbers are always JSON");
        assert!(serde_json::from_str::<TrainerState>(&text).is_ok(), "{text}");
    }
    let run = empty("run");
    let checkpoint = run.join("checkpoints/step-00000004");
    fs::create_dir_all(&checkpoint).expect("a folder for an input");
    write(&checkpoint.join("config.json"), CONFIG.as_bytes());
    write(&checkpoint.join("trainer.json"), state);
    if !manifest.is_empty() {
        write(&checkpoint.join("manifest.json"), manifest);
    }
    drop(moonlight_infer::resolve_model(&run).map_err(|error| check_message(&error)));
}
