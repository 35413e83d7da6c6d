//! The tokens at the start and the end of a text and of a turn, in every command that reads text.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use common::{Home, assert_fails, moonlight, text};
use moonlight_infer::tokenizer::Tokenizer;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const VOCAB: usize = 262;
const WIDTH: usize = 32;

/// The tokens after the 256 bytes.
const BOS: u32 = 256;
const EOS: u32 = 257;
const END_OF_TURN: u32 = 258;
const START: u32 = 259;
const MIDDLE: u32 = 260;

/// A template whose turns end with an unusual token.
const TEMPLATE: &str = "{%- for m in messages -%}<|start|>{{ m['role'] }}<|middle|>{{ m['content'] }}<|done|>\n{%- endfor -%}\
     {%- if add_generation_prompt -%}<|start|>assistant<|middle|>{%- endif -%}";

/// Writes a Llama that predicts the next token from the last one alone: after each token of `chain`, the one that follows it
/// there.
fn says(dir: &Path, chain: &[u32]) {
    fs::create_dir_all(dir).unwrap();
    let (mut embedding, mut head) = (vec![0.0; VOCAB * WIDTH], vec![0.0; VOCAB * WIDTH]);
    // Tokens outside the chain share one embedding, and those of the chain have one each.
    embedding.iter_mut().skip(WIDTH - 1).step_by(WIDTH).for_each(|value| *value = 1.0);
    for (place, pair) in chain.windows(2).enumerate() {
        let row = pair[0] as usize * WIDTH;
        embedding[row..row + WIDTH].fill(0.0);
        embedding[row + place] = 1.0;
        head[pair[1] as usize * WIDTH + place] = 1.0;
    }
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::from([
        ("model.embed_tokens.weight".into(), (vec![VOCAB, WIDTH], embedding)),
        ("lm_head.weight".into(), (vec![VOCAB, WIDTH], head)),
        ("model.norm.weight".into(), (vec![WIDTH], vec![1.0; WIDTH])),
        (layer("input_layernorm"), (vec![WIDTH], vec![1.0; WIDTH])),
        (layer("post_attention_layernorm"), (vec![WIDTH], vec![1.0; WIDTH])),
    ]);
    for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        tensors.insert(layer(&format!("self_attn.{name}")), (vec![WIDTH, WIDTH], vec![0.0; WIDTH * WIDTH]));
    }
    for (name, shape) in [("gate_proj", [8, WIDTH]), ("up_proj", [8, WIDTH]), ("down_proj", [WIDTH, 8])] {
        tensors.insert(layer(&format!("mlp.{name}")), (shape.to_vec(), vec![0.0; 8 * WIDTH]));
    }
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    let config = json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "eos_token_id": EOS});
    write(dir, "config.json", &config);
    write_tokenizer(
        dir,
        &Value::Null,
        true,
        &json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}),
    );
}

fn write(dir: &Path, name: &str, value: &Value) {
    fs::write(dir.join(name), value.to_string()).unwrap();
}

/// Writes a tokenizer of the bytes and five added tokens. `special_end`: whether the end of a turn is a special token.
fn write_tokenizer(dir: &Path, processor: &Value, special_end: bool, config: &Value) {
    let mut json: Value = serde_json::from_slice(&Tokenizer::bytes().files()[0].contents).unwrap();
    let tokens = [("<s>", BOS), ("</s>", EOS), ("<|done|>", END_OF_TURN), ("<|start|>", START), ("<|middle|>", MIDDLE)];
    json["added_tokens"] = tokens
        .iter()
        .map(|(content, id)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *id != END_OF_TURN || special_end})
        })
        .collect();
    json["post_processor"] = processor.clone();
    write(dir, "tokenizer.json", &json);
    write(dir, "tokenizer_config.json", config);
}

/// A post-processor that puts `<s>` before texts, and with `ends` `</s>` after them.
fn template(ends: bool) -> Value {
    let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let mut single = vec![piece("<s>"), json!({"Sequence": {"id": "A", "type_id": 0}})];
    single.extend(ends.then(|| piece("</s>")));
    let token = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    json!({"type": "TemplateProcessing", "single": single, "pair": [],
        "special_tokens": {"<s>": token("<s>", BOS), "</s>": token("</s>", EOS)}})
}

fn run(command: &str, dir: &Path, more: &[&str]) -> Output {
    moonlight(&[command, "--model"]).arg(dir).args(["--device", "cpu"]).args(more).output().unwrap()
}

fn value(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_text_starts_with_bos_if_the_tokenizer_says_so() {
    let home = tempfile::tempdir().unwrap();
    let dir = &home.path().join("model");
    says(dir, &[105, b'o'.into(), EOS]);
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let prompt = |more: &[&str]| {
        let output = run("generate", dir, &[&["--json", "--max-new-tokens", "4"], more].concat());
        (value(&output)["prompt_tokens"].clone(), text(&output.stderr))
    };
    let lines = home.path().join("lines.jsonl");
    fs::write(&lines, "{\"text\": \"<s>Hi\"}\n{\"tokens\": [72, 105]}\n").unwrap();
    let lines = lines.to_str().unwrap();
    let scored = |more: &[&str]| {
        let output = run("score", dir, &[&["--data", lines], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let rows = text(&output.stdout);
        let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows[1]["tokens"], json!([72, 105]), "tokens are used unchanged");
        rows[0]["tokens"].clone()
    };
    // The bytes of the text `<s>Hi`.
    let spelled = |begin: &[u32], end: &[u32]| json!([begin, &[60, 115, 62, 72, 105], end].concat());

    assert_eq!(prompt(&["--prompt", "Hi"]).0, json!([72, 105]));
    assert_eq!(prompt(&["--prompt", "Hi", "--bos"]).0, json!([BOS, 72, 105]));
    assert_eq!(scored(&[]), spelled(&[], &[]));

    write_tokenizer(dir, &template(false), true, &config);
    assert_eq!(prompt(&["--prompt", "Hi"]), (json!([BOS, 72, 105]), String::new()));
    assert_eq!(prompt(&["--prompt", "Hi", "--no-bos"]).0, json!([72, 105]));
    assert_eq!(prompt(&["--prompt-tokens", "72,105"]).0, json!([72, 105]));
    assert_fails(&run("generate", dir, &["--prompt-tokens", "72", "--bos"]), "`--prompt-tokens` excludes `--bos`");
    assert_eq!(prompt(&["--prompt", "<s>Hi"]).0, spelled(&[BOS], &[]));
    let (twice, warning) = prompt(&["--prompt", "<s>Hi", "--parse-special"]);
    assert_eq!(twice, json!([BOS, BOS, 72, 105]), "as in transformers");
    assert!(warning.contains("a text begins with `<s>` twice"), "{warning}");
    assert_eq!(prompt(&["--prompt", "<s>Hi", "--parse-special", "--no-bos"]), (json!([BOS, 72, 105]), String::new()));
    assert_eq!(scored(&[]), spelled(&[BOS], &[]));
    assert_eq!(scored(&["--no-bos"]), spelled(&[], &[]));
    assert_eq!(scored(&["--no-bos", "--parse-special"]), json!([BOS, 72, 105]));
    let output = run("generate", dir, &["--prompts", lines, "--max-new-tokens", "4"]);
    let first = text(&output.stdout);
    let first: Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    assert_eq!((&first["prompt_tokens"], &first["stop_token"]), (&spelled(&[BOS], &[]), &json!(EOS)));
    assert_eq!(run("generate", dir, &["--prompt", "Hi", "--bos", "--no-bos"]).status.code(), Some(2));

    // A text to score ends as the tokenizer says, and a prompt to continue does not.
    write_tokenizer(dir, &template(true), true, &config);
    assert_eq!(scored(&[]), spelled(&[BOS], &[EOS]));
    let (open, note) = prompt(&["--prompt", "Hi"]);
    assert_eq!(open, json!([BOS, 72, 105]));
    assert!(note.contains("the tokenizer ends texts with `</s>`, which is left out of prompts"), "{note}");

    // DeepSeek's files ask for BOS in a place that transformers 5 does not read.
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    write_tokenizer(dir, &Value::Null, true, &config);
    let (tokens, warning) = prompt(&["--prompt", "Hi"]);
    assert_eq!(tokens, json!([72, 105]));
    assert!(
        warning.contains("says `add_bos_token: true`") && warning.contains("choose with `--bos` or `--no-bos`"),
        "{warning}"
    );
    assert_eq!(prompt(&["--prompt", "Hi", "--bos"]), (json!([BOS, 72, 105]), String::new()));
    write_tokenizer(dir, &Value::Null, true, &json!({}));
    assert_fails(&run("generate", dir, &["--prompt", "Hi", "--bos"]), "has no BOS token");
}

#[test]
fn documents_start_with_bos_and_end_with_one_eos() {
    let home = Home::new();
    let dir = &home.path("model");
    says(dir, &[105, EOS]);
    let texts = home.path("texts");
    fs::create_dir(&texts).unwrap();
    // Longer than the block that is tokenized at once.
    fs::write(texts.join("a.txt"), "word ".repeat(1 << 20)).unwrap();
    fs::write(texts.join("b.txt"), "Hi").unwrap();
    let [glob, tokenizer, config] =
        [texts.join("*.txt"), dir.clone(), home.path("recipe.toml")].map(|path| path.display().to_string());
    let ends = |more: &[&str]| {
        let sets = [
            format!("data.train=[{glob:?}]"),
            format!("data.tokenizer={tokenizer:?}"),
            "data.valid_fraction=0".into(),
            "data.shuffle=false".into(),
            "train.validate_every=0".into(),
            "data.sequence_length=64".into(),
        ];
        let sets = sets.iter().map(String::as_str).chain(more.iter().copied()).flat_map(|set| ["--set", set]);
        let inspect = ["data", "inspect", &config, "--json", "--samples", "9", "--longest", "0"];
        let output = moonlight(&inspect).args(sets).output().unwrap();
        let found = value(&output);
        let mut tokens = Vec::new();
        for sample in found["samples"].as_array().unwrap() {
            tokens.extend(sample["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32));
        }
        let count = |token: u32| tokens.iter().filter(|&&each| each == token).count();
        (count(BOS), count(EOS), text(&output.stderr))
    };
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    write_tokenizer(dir, &template(false), true, &config);
    let (bos, eos, _) = ends(&[]);
    assert_eq!((bos, eos), (2, 2), "one of each for each document, however long");
    fs::write(texts.join("a.txt"), "word").unwrap();
    write_tokenizer(dir, &Value::Null, true, &config);
    assert_eq!(ends(&[]).0, 0);
    // The cache of another post-processor is not used.
    write_tokenizer(dir, &template(false), true, &config);
    assert_eq!(ends(&[]).0, 2);
    assert_eq!(ends(&["data.bos=never"]).0, 0);
    write_tokenizer(dir, &template(true), true, &config);
    let (bos, eos, _) = ends(&[]);
    assert_eq!((bos, eos), (2, 2), "the end of the text is that of the document");
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    write_tokenizer(dir, &Value::Null, true, &config);
    let (bos, _, warning) = ends(&[]);
    assert!(bos == 0 && warning.contains("set `data.bos` to decide"), "{warning}");
    let (bos, _, warning) = ends(&["data.bos=always"]);
    assert!(bos == 2 && !warning.contains("set `data.bos` to decide"), "{warning}");
}

/// Sends a line to `moonlight chat` and reads the answer.
fn answer(dir: &Path, line: &str, more: &[&str]) -> String {
    let mut command = moonlight(&["chat", "--device", "cpu", "--max-new-tokens", "9", "--model"]);
    let mut chat = command.arg(dir).args(more).stdin(Stdio::piped()).spawn().unwrap();
    chat.stdin.take().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    let output = chat.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn an_answer_ends_at_the_template_s_end_of_turn() {
    let home = tempfile::tempdir().unwrap();
    let dir = &home.path().join("model");
    let letter = |letter: u8| u32::from(letter);
    says(dir, &[MIDDLE, letter(b'O'), letter(b'K'), END_OF_TURN, START, letter(b'x'), letter(b'y'), EOS]);
    for special in [true, false] {
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE});
        write_tokenizer(dir, &template(false), special, &config);
        assert_eq!(answer(dir, "hi", &[]), "OK\n", "special: {special}");
        // A prompt that contains the template's tokens ends there too.
        let spelled = "<|start|>user<|middle|>hi<|done|>\n<|start|>assistant<|middle|>";
        let found = value(&run("generate", dir, &["--prompt", spelled, "--parse-special", "--no-bos", "--json"]));
        assert_eq!(
            (&found["text"], &found["tokens"], &found["stop"], &found["stop_token"]),
            (&json!("OK"), &json!([79, 75]), &json!("eos"), &json!(END_OF_TURN))
        );
        // Otherwise a text ends only at the tokens that the configs name.
        let found = value(&run("generate", dir, &["--prompt-tokens", "260", "--json"]));
        assert_eq!((&found["stop"], &found["stop_token"]), (&json!("eos"), &json!(EOS)));
        assert_eq!(found["tokens"].as_array().unwrap().len(), 6);
        let kept = if special { "OKxy" } else { "OK<|done|>xy" };
        assert_eq!(found["text"], json!(kept));
    }
    let found = value(&run("generate", dir, &["--prompt-tokens", "260", "--json", "--max-new-tokens", "2"]));
    assert_eq!((&found["stop"], &found["stop_token"]), (&json!("length"), &Value::Null));
}

#[test]
fn the_end_of_a_text_is_named_in_one_of_three_files() {
    let home = tempfile::tempdir().unwrap();
    let dir = &home.path().join("model");
    says(dir, &[MIDDLE, 79, 75, START, END_OF_TURN, 120, EOS, 121, BOS]);
    let stop = || value(&run("generate", dir, &["--prompt-tokens", "260", "--json"]))["stop_token"].clone();
    // Each overrides the next: the list of the generation config, the model's config, the tokenizer's.
    write(dir, "generation_config.json", &json!({"eos_token_id": [START, 120]}));
    assert_eq!(stop(), json!(START));
    write(dir, "generation_config.json", &json!({}));
    assert_eq!(stop(), json!(EOS));
    let mut config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("eos_token_id");
    write(dir, "config.json", &config);
    assert_eq!(stop(), json!(EOS));
    write_tokenizer(dir, &Value::Null, true, &json!({"eos_token": "<|done|>", "chat_template": TEMPLATE}));
    assert_eq!(stop(), json!(END_OF_TURN));
}
