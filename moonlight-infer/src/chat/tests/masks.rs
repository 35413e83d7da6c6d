//! What is learned of conversations, by templates in the manner of published ones.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::templates::{folder, rendered};
use super::*;

/// The bytes, and as special tokens what a template spells as such.
fn tokenizer_of(source: &str) -> Tokenizer {
    let mut names = BTreeSet::new();
    for (begin, end) in [("<|", "|>"), ("<｜", "｜>"), ("[|", "|]"), ("[/", "]")] {
        for (at, _) in source.match_indices(begin) {
            let rest = &source[at..];
            let name = rest.find(end).map(|length| &rest[..length + end.len()]);
            names.extend(name.filter(|name| !name.contains([' ', '\'', '\n', '"']) && name.len() < 60));
        }
    }
    let more = ["[INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "<start_of_turn>", "<end_of_turn>"];
    names.extend(more.into_iter().chain(["<bos>", "<s>", "</s>"]).filter(|name| source.contains(name)));
    let mut json: Value = serde_json::from_slice(&Tokenizer::bytes_chat().companions()[0].contents).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    for name in names {
        if added.iter().all(|token| token["content"] != name) {
            let id = added.iter().map(|token| token["id"].as_u64().unwrap()).max().unwrap().max(255) + 1;
            added.push(json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}));
        }
    }
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

/// What is learned of a record, `|` between the parts, by a tokenizer that knows the template's tokens, or none of them.
fn learned_by(source: &str, record: &Value, knows: bool) -> Result<String, ChatError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), rendered()["tokens"].to_string()).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    let open = || if knows { tokenizer_of(source) } else { Tokenizer::bytes_chat() };
    let template = ChatTemplate::of_model(dir.path(), &open()).unwrap();
    let encoder = ChatEncoder::new(template, open());
    let weighted = encoder.weighted(&encoder.parse(record.to_string().as_bytes())?)?;
    let specials = open().specials();
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut inside = false;
    for (&token, &weight) in weighted.tokens.iter().zip(&weighted.weights) {
        if weight > 0.0 {
            if !inside {
                parts.push(Vec::new());
            }
            let part = parts.last_mut().unwrap();
            match specials.iter().find(|(_, id)| *id == token) {
                Some((name, _)) => part.extend(name.bytes()),
                None => part.push(token as u8),
            }
        }
        inside = weight > 0.0;
    }
    let parts: Vec<String> = parts.into_iter().map(|part| String::from_utf8(part).unwrap()).collect();
    Ok(parts.join("|"))
}

fn template(name: &str) -> String {
    fs::read_to_string(folder().join(name).with_extension("jinja")).unwrap()
}

fn user(words: &str) -> Value {
    json!({"role": "user", "content": words})
}

fn answer(words: &str) -> Value {
    json!({"role": "assistant", "content": words})
}

/// A call of a tool, with words before it or none.
fn call(words: &str) -> Value {
    let call =
        json!({"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "where"}}});
    json!({"role": "assistant", "content": words, "tool_calls": [call]})
}

fn result(words: &str) -> Value {
    json!({"role": "tool", "tool_call_id": "call00001", "name": "look", "content": words})
}

fn talk(messages: &[Value]) -> Value {
    json!({ "messages": messages })
}

fn talk_with_tools(messages: &[Value]) -> Value {
    let parameters = json!({"type": "object", "properties": {"at": {"type": "string"}}});
    let tools =
        json!([{"type": "function", "function": {"name": "look", "description": "d", "parameters": parameters}}]);
    json!({"messages": messages, "tools": tools})
}

#[test]
fn probe() {
    let Ok(file) = std::env::var("MASK_PROBE") else { return };
    let list: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    for case in list.as_array().unwrap() {
        let source = fs::read_to_string(case["template"].as_str().unwrap()).unwrap();
        for knows in [true, false] {
            let got = learned_by(&source, &case["record"], knows).map_err(|error| error.to_string());
            println!(
                "PROBE {}",
                json!({"name": case["name"], "knows": knows, "got": got.as_ref().ok(), "error": got.as_ref().err()})
            );
        }
    }
}
