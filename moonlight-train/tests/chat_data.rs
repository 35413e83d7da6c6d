//! Training on conversations and inspecting them, by the commands of a user.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Home, assert_fails, assert_same_checkpoint, checkpoint, metrics, moonlight, text};
use serde_json::json;

/// A home with conversations in `talk.jsonl`, in all three formats.
fn home() -> (Home, Vec<String>) {
    let home = Home::new();
    let lines: String = (0..60)
        .map(|n| {
            let (question, answer) = (format!("{n}+1?"), format!("{}", n + 1));
            let record = match n % 3 {
                0 => json!({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": question},
                    {"role": "assistant", "content": answer}]}),
                1 => json!({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}),
                _ => json!({"instruction": "Add.", "input": question, "output": answer}),
            };
            format!("{record}\n")
        })
        .collect();
    let path = home.path("talk.jsonl");
    fs::write(&path, lines).unwrap();
    let sets = vec![
        format!("data.train=[\"{}\"]", path.display()),
        "data.format=chat".into(),
        "data.tokenizer=bytes-chat".into(),
        "data.sequence_length=192".into(),
        "model.max_position_embeddings=256".into(),
    ];
    (home, sets)
}

fn arguments<'a>(sets: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    let sets = sets.iter().flat_map(|set| ["--set", set.as_str()]);
    sets.chain(more.iter().copied()).collect()
}

#[test]
fn a_run_on_conversations_resumes_bit_for_bit_and_its_model_chats() {
    let (home, sets) = home();
    let whole = home.trained("whole", &arguments(&sets, &[]));
    let schedule = ["--set", "schedule.total_steps=12", "--set", "train.steps=5"];
    let parts = home.trained("parts", &arguments(&sets, &schedule));
    home.trained("parts", &arguments(&sets, &["--resume"]));
    assert_same_checkpoint(&checkpoint(&whole, 12), &checkpoint(&parts, 12));
    let losses: Vec<f64> = metrics(&whole).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert!(losses[11] < losses[0], "{losses:?}");
    // The checkpoint contains its tokenizer and its template.
    let config = fs::read_to_string(checkpoint(&whole, 12).join("tokenizer_config.json")).unwrap();
    assert!(config.contains("<|im_assistant|>"));
    // Servers stop at the end of the assistant's turn.
    let generation = fs::read_to_string(checkpoint(&whole, 12).join("generation_config.json")).unwrap();
    let generation: serde_json::Value = serde_json::from_str(&generation).unwrap();
    assert_eq!(generation["eos_token_id"], json!([257, 0xF5]));
    let mut chat = moonlight(&["chat", "--max-new-tokens", "4", "--model"]);
    let output = chat.arg(&whole).stdin(fs::File::open(home.path("talk.jsonl")).unwrap()).output().unwrap();
    assert!(!text(&output.stderr).contains("has no chat template"), "{}", text(&output.stderr));
}

#[test]
fn the_template_of_the_recipe_is_saved_in_the_checkpoint() {
    let (home, mut sets) = home();
    let template = "{% for m in messages %}<|im_user|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}\
                    {% if add_generation_prompt %}<|im_user|>assistant:{% endif %}";
    let path = home.path("other.jinja");
    fs::write(&path, template).unwrap();
    sets.push(format!("data.chat_template={}", path.display()));
    let run = home.trained("other", &arguments(&sets, &["--set", "train.steps=1"]));
    assert_eq!(fs::read_to_string(checkpoint(&run, 1).join("chat_template.jinja")).unwrap(), template);
    // A run that starts from this checkpoint uses its template.
    let recipe = fs::read_to_string(home.path("recipe.toml")).unwrap();
    let (before, rest) = recipe.split_once("[model]").unwrap();
    let (_, after) = rest.split_once("[data]").unwrap();
    fs::write(home.path("recipe.toml"), format!("{before}[model]\npath = \"{}\"\n\n[data]{after}", run.display()))
        .unwrap();
    sets.retain(|set| !set.starts_with("data.chat_template") && !set.starts_with("model."));
    sets.retain(|set| !set.starts_with("data.tokenizer"));
    sets.push(format!("data.tokenizer={}", checkpoint(&run, 1).display()));
    let next = home.trained("next", &arguments(&sets, &["--set", "train.steps=1"]));
    assert_eq!(fs::read_to_string(checkpoint(&next, 1).join("chat_template.jinja")).unwrap(), template);
}

#[test]
fn inspect_shows_what_is_learned() {
    let (home, sets) = home();
    let inspect = |more: &[&str]| {
        let mut command = moonlight(&["data", "inspect"]);
        command.arg(home.path("recipe.toml")).args(arguments(&sets, more)).output().unwrap()
    };
    let output = inspect(&["--samples", "2", "--set", "data.valid_fraction=0"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for expected in [
        "data: chat template: bytes-chat/tokenizer_config.json",
        "20 with `messages` (OpenAI), 20 with `conversations` (ShareGPT), 20 with `instruction` (Alpaca)",
        "train: 60 documents, ",
        "% full",
        "talk.jsonl:1: ",
        "[<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>0+1?<|im_end|><|im_assistant|>assistant\
         <|im_middle|>]1<|im_end|>\n",
        "talk.jsonl:31: ",
    ] {
        assert!(shown.contains(expected), "{expected}\n{shown}");
    }
    let histogram = shown.lines().filter(|line| line.trim_start().starts_with("up to")).count();
    assert!(histogram >= 1, "{shown}");
    let output = inspect(&["--samples", "1", "--json"]);
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let sample = &object["samples"][0];
    assert_eq!(sample["tokens"].as_array().unwrap().len(), sample["weights"].as_array().unwrap().len());
    assert!(object["train"]["learned"].as_u64().unwrap() > 0);
    // Text is shown too.
    let output = moonlight(&["data", "inspect", "--longest", "10"]).arg(home.path("recipe.toml")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    assert!(shown.contains("File 0 say\n... and ") && shown.contains("valid: "), "{shown}");
}

#[test]
fn broken_conversations_are_reported_in_one_line() {
    let (home, sets) = home();
    let data: PathBuf = home.path("talk.jsonl");
    let good = r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}"#;
    let refuses = home.path("refuses.jinja");
    fs::write(&refuses, "{% for m in messages %}{{ raise_exception('roles must\nalternate') }}{% endfor %}").unwrap();
    let template = format!("data.chat_template={}", refuses.display());
    let run = |second: &[u8], more: &[&str]| {
        fs::write(&data, [good.as_bytes(), b"\n", second, b"\n"].concat()).unwrap();
        home.train("bad", &arguments(&sets, &[&["--set", "data.valid_fraction=0"], more].concat())).output().unwrap()
    };
    let user = br#"{"messages": [{"role": "user", "content": "Q"}]}"#;
    assert_fails(&run(user, &[]), "talk.jsonl:2: the conversation has no assistant message");
    let robot = br#"{"messages": [{"role": "robot", "content": "Q"}]}"#;
    assert_fails(&run(robot, &[]), "talk.jsonl:2: `messages[0]` has the unknown role `robot`");
    assert_fails(&run(b"{\"messages\": \"\xff\"}", &[]), "talk.jsonl:2:15: the record is not UTF-8");
    assert_fails(&run(b"{\"messages\": [", &[]), "talk.jsonl:2:14: the record is not JSON");
    let set = ["--set", &template];
    assert_fails(
        &run(b"", &set),
        "talk.jsonl:1: the chat template does not accept this conversation: roles must\\nalternate",
    );
    let long = format!(r#"{{"instruction": "Q", "output": "{}"}}"#, "long ".repeat(100));
    assert_fails(&run(long.as_bytes(), &[]), "talk.jsonl:2: the record has ");
    assert_fails(&run(b"", &["--set", "data.tokenizer=bytes"]), "`bytes` has no chat template");
    assert!(!home.run("bad").exists());
    let skipped =
        run(user, &["--set", "data.broken=skip", "--set", "train.steps=1", "--set", "train.validate_every=0"]);
    assert!(skipped.status.success(), "{}", text(&skipped.stderr));
    let note = "note: data.train: 1 record was broken and left out: ";
    assert!(text(&skipped.stderr).contains(note), "{}", text(&skipped.stderr));
    let kept = fs::read_to_string(home.run("bad").join("data.txt")).unwrap();
    assert!(kept.contains(note.strip_prefix("note: ").unwrap()) && kept.contains("talk.jsonl:2 ("), "{kept}");
}

/// Ignored fields of records are listed once, with their counts, on the console and in `data.txt`.
#[test]
fn ignored_fields_are_listed() {
    let (home, sets) = home();
    let template = home.path("tools.jinja");
    let source = "{% for m in messages %}<|im_user|>{{ m.get('name') or m.role }}<|im_middle|>{{ m.content }}{% for c in m.tool_calls %}\
                <call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor %}<|im_end|>{% endfor %}\
                {% if add_generation_prompt %}<|im_user|>assistant<|im_middle|>{% endif %}";
    fs::write(&template, source).unwrap();
    let record = |more: serde_json::Value| {
        let mut record = json!({"id": 1, "messages": [
            {"role": "user", "name": "Ada", "content": "Weather?", "time": "noon"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "w:0", "type": "function", "function": {"name": "w", "arguments": "{\"town\":\"Celle\"}"}}]},
            {"role": "tool", "tool_call_id": "w:0", "content": "7"},
            {"role": "assistant", "content": "Seven.", "train": false}]});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        format!("{record}\n")
    };
    let lines = [
        record(json!({})),
        record(json!({"tools": [{"type": "function"}]})),
        record(json!({"source": "x", "score": null})),
    ];
    fs::write(home.path("talk.jsonl"), lines.concat()).unwrap();
    let set = format!("data.chat_template={}", template.display());
    let more =
        ["--set", &set, "--set", "data.valid_fraction=0", "--set", "train.steps=1", "--set", "train.validate_every=0"];
    let output = home.train("noted", &arguments(&sets, &more)).output().unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    let note = "data.train: ignored fields (number of records): `id` (3), \
                `messages[].time` (3), `messages[].tool_call_id` (3), `source` (1), `tools` (1)";
    assert!(text_of(&output).contains(note), "{}", text_of(&output));
    let kept = fs::read_to_string(home.run("noted").join("data.txt")).unwrap();
    assert_eq!(kept.matches(note).count(), 1, "{kept}");
    // The turn with the call is learned as the template writes it, and the marked one is not.
    let mut command = moonlight(&["data", "inspect", "--samples", "1"]);
    let output = command.arg(home.path("recipe.toml")).args(arguments(&sets, &more[..4])).output().unwrap();
    let shown = text(&output.stdout);
    let learned = "<|im_middle|>]<call>w {\"town\":\"Celle\"}</call><|im_end|>[<|im_user|>";
    assert!(shown.contains(learned) && shown.contains("<|im_middle|>Seven.<|im_end|>]"), "{shown}");
}

fn text_of(output: &std::process::Output) -> String {
    text(&output.stderr)
}
