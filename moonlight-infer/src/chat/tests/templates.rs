//! Templates like published ones, and expressions, compared with what transformers renders (written by
//! `scripts/parity/check_templates.py`).

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::super::template_input::{TemplateInput, with_reasoning};
use super::*;

pub(super) fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures/templates")
}

fn rendered() -> Value {
    serde_json::from_slice(&fs::read(folder().join("rendered.json")).unwrap()).unwrap()
}

/// An encoder with the template `source`, and with `tokens` as its `tokenizer_config.json`.
fn encoder_of(source: &str, tokens: &Value) -> ChatEncoder {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), tokens.to_string()).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    let template = ChatTemplate::from_model_dir(dir.path(), &Tokenizer::bytes_chat()).unwrap();
    ChatEncoder::new(template, Tokenizer::bytes_chat())
}

/// The messages and variables of a record, unchanged.
fn template_input(record: &Map<String, Value>) -> TemplateInput {
    let mut variables = record.clone();
    let messages = variables.remove("messages").unwrap();
    variables.insert("date_string".into(), "26 Jul 2024".into());
    let fields = |message: &Value| message.as_object().unwrap().clone();
    let messages = messages.as_array().unwrap().iter().map(|message| Message::from_fields(fields(message)).unwrap());
    let messages = messages.map(|message| with_reasoning(message.fields().clone())).collect();
    TemplateInput::new(messages, variables)
}

#[test]
fn templates_are_rendered_as_transformers_renders_them() {
    let all = rendered();
    let (mut count, mut refused, mut masks) = (0, 0, 0);
    for (name, cases) in all["templates"].as_object().unwrap() {
        let source = fs::read_to_string(folder().join(name).with_extension("jinja")).unwrap();
        let encoder = encoder_of(&source, &all["tokens"]);
        for (conversation, cases) in cases.as_object().unwrap() {
            let input = template_input(all["conversations"][conversation].as_object().unwrap());
            for (prompt, expected) in [false, true].into_iter().zip(cases.as_array().unwrap()) {
                let ours = encoder.template().render_input(&input, &input.values, prompt, ["", ""]);
                count += 1;
                match (ours, expected["text"].as_str()) {
                    (Ok(text), Some(expected)) => assert_eq!(text, expected, "{name}: {conversation}"),
                    (Err(_), None) => refused += 1,
                    (ours, _) => panic!("{name}: {conversation}: {ours:?} and {expected}"),
                }
                let Some(spans) = expected["spans"].as_array().filter(|spans| !spans.is_empty()) else { continue };
                let (text, ours) = encoder.core().finder().spans(&input).unwrap();
                let characters = |at: usize| text[..at].chars().count() as u64;
                let ours: Vec<[u64; 2]> = ours.iter().map(|span| [span.start, span.end].map(characters)).collect();
                assert_eq!(serde_json::json!(ours), serde_json::json!(spans), "{name}: {conversation}");
                masks += 1;
            }
        }
    }
    println!("{count} renderings equal, {refused} of them refused by both; {masks} masks equal");
    assert!(count > 2000 && masks > 20, "{count} {masks}");
}

#[test]
fn expressions_have_the_values_of_python() {
    let all = rendered();
    let (mut equal, mut known) = (0, 0);
    for case in all["expressions"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let variables = all["variables"].as_object().unwrap().clone();
        let input = TemplateInput::new(Vec::new(), variables);
        let ours = ChatTemplate::from_source(source)
            .and_then(|template| template.render_input(&input, &input.values, false, ["", ""]));
        let is = match (&ours, case["text"].as_str()) {
            (Ok(text), Some(expected)) if text == expected => None,
            (Err(_), None) => None,
            (Err(_), Some(_)) => Some("refused"),
            (Ok(_), _) => Some("differs"),
        };
        assert_eq!(is, case["ours"].as_str(), "{source}\n{ours:?}\n{case}");
        *(if is.is_none() { &mut equal } else { &mut known }) += 1;
    }
    println!("{equal} expressions equal, {known} known to be refused or to differ");
    assert!(equal > 250, "{equal}");
}

#[test]
fn the_last_answer_is_learned_with_every_template() {
    let all = rendered();
    let mut learned_from = 0;
    for name in all["templates"].as_object().unwrap().keys() {
        let source = fs::read_to_string(folder().join(name).with_extension("jinja")).unwrap();
        let encoder = encoder_of(&source, &all["tokens"]);
        for (conversation, record) in all["conversations"].as_object().unwrap() {
            let Ok(read) = encoder.parse(record.to_string().as_bytes()) else { continue };
            let Ok(weighted_tokens) = encoder.weighted_tokens(&read) else { continue };
            learned_from += 1;
            let ours: Vec<u8> = weighted_tokens
                .tokens
                .iter()
                .zip(&weighted_tokens.weights)
                .filter(|(_, weight)| **weight > 0.0)
                .map(|(token, _)| *token as u8)
                .collect();
            let ours = String::from_utf8_lossy(&ours).into_owned();
            // The last answer is within the learned text.
            let last = read.turns.iter().rfind(|turn| turn.message.role() == "assistant").unwrap();
            if let Some(words) = last.message.text() {
                let words = words.rsplit("</think>").next().unwrap().trim();
                assert!(ours.contains(words), "{name}: {conversation}: {ours}");
            }
        }
    }
    println!("{learned_from} records learned from");
    assert!(learned_from > 600, "{learned_from}");
}

#[test]
fn strftime_now_is_the_current_date() {
    let render = |format: &str| {
        ChatTemplate::from_source(&format!("{{{{ strftime_now('{format}') }}}}")).unwrap().render(&[], false)
    };
    assert_eq!(render("%Y-%m-%d").unwrap(), chrono::Local::now().format("%Y-%m-%d").to_string());
    assert!(render("%Q").unwrap_err().to_string().contains("does not support `%Q`"));
    assert!(ChatTemplate::from_source("{{ strftime_now('%d %b %Y') }}").unwrap().uses_date());
    assert!(!ChatTemplate::from_source(MOONLIGHT_TEMPLATE).unwrap().uses_date());
}
