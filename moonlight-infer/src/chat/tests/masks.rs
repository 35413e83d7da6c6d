//! The learned spans of conversations under templates like published ones.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::templates::folder;
use super::*;

/// The `bytes-chat` tokenizer, with a special token for everything in a template that looks like one.
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
    let mut json: Value = serde_json::from_slice(&Tokenizer::bytes_chat().files()[0].contents).unwrap();
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

/// A template, with a tokenizer that has all of its special tokens or none.
struct Learner {
    encoder: ChatEncoder,
    specials: Vec<(String, u32)>,
}

impl Learner {
    fn new(source: &str, knows: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tokens = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"});
        fs::write(dir.path().join("tokenizer_config.json"), tokens.to_string()).unwrap();
        fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
        let tokenizer = if knows { tokenizer_of(source) } else { Tokenizer::bytes_chat() };
        let specials = tokenizer.specials();
        let template = ChatTemplate::from_model_dir(dir.path(), &tokenizer).unwrap();
        Self { encoder: ChatEncoder::new(template, tokenizer), specials }
    }

    /// The text of a record, and its learned parts joined by `|`.
    fn learned(&self, record: &Value) -> Result<[String; 2], ChatError> {
        let weighted_tokens = self.encoder.weighted_tokens(&self.encoder.parse(record.to_string().as_bytes())?)?;
        let mut texts = [Vec::new(), Vec::new()];
        let mut inside = true;
        for (&token, &weight) in weighted_tokens.tokens.iter().zip(&weighted_tokens.weights) {
            let special = self.specials.iter().find(|(_, id)| *id == token);
            let bytes = special.map_or(vec![token as u8], |(name, _)| name.as_bytes().to_vec());
            texts[0].extend(&bytes);
            if weight > 0.0 {
                if !inside && !texts[1].is_empty() {
                    texts[1].push(b'|');
                }
                texts[1].extend(&bytes);
            }
            inside = weight > 0.0;
        }
        Ok(texts.map(|text| String::from_utf8(text).unwrap()))
    }
}

fn learned_by(name: &str, record: &Value) -> String {
    let learner = Learner::new(&template(name), true);
    learner.learned(record).unwrap_or_else(|error| panic!("{name}: {error}"))[1].clone()
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

/// A tool call, with content or without.
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

fn thought(thought: &str, words: &str) -> Value {
    answer(&format!("<think>\n{thought}\n</think>\n\n{words}"))
}

/// Most reasoning data sets have the reasoning in the content. Templates drop it from earlier turns, and some from all turns.
#[test]
fn reasoning_in_the_content_is_learned_where_the_template_writes_it() {
    let record = talk(&[user("Q"), thought("r1", "A"), user("R"), thought("r2", "B")]);
    for (name, expected) in [
        ("qwen3", "A<|im_end|>|<think>\nr2\n</think>\n\nB<|im_end|>"),
        ("glm45", "\n<think></think>\nA|\n<think>r2</think>\nB"),
        ("nemotron", "A|B"),
        ("hunyuan", "A<|eos|>|B<|eos|>"),
        ("qwq", "A<|im_end|>|B<|im_end|>"),
        ("deepseek_r1", "\n\nA<|end_of_sentence|>|\n\nB<|end_of_sentence|>"),
        ("seed_oss", "<think>\nr1\n</think>\n\nA</s>|<think>\nr2\n</think>\n\nB</s>"),
    ] {
        assert_eq!(learned_by(name, &record), expected, "{name}");
    }
    // A single turn.
    let record = talk(&[user("Q"), thought("r", "A")]);
    assert_eq!(learned_by("deepseek_r1", &record), "\n\nA<|end_of_sentence|>");
    assert_eq!(learned_by("qwen3", &record), "<think>\nr\n</think>\n\nA<|im_end|>");
    // A user message that the template mistakes for a tool's result.
    let answered = user("<tool_response>\nR\n</tool_response>");
    let record = talk(&[user("Q"), thought("r1", "A"), user("P"), thought("r2", "B"), answered, thought("r3", "C")]);
    let expected = "A<|im_end|>|<think>\nr2\n</think>\n\nB<|im_end|>|<think>\nr3\n</think>\n\nC<|im_end|>";
    assert_eq!(learned_by("qwen3", &record), expected);
    // A turn of reasoning only, which is dropped.
    let record = talk(&[user("Q"), thought("r", ""), user("R"), answer("B")]);
    assert_eq!(learned_by("qwen3", &record), "<|im_end|>|<think>\n\n</think>\n\nB<|im_end|>");
}

/// Like Gemma 4: a tool call, its result and the content of the call are one turn.
const ONE_TURN: &str = "{%- for m in messages -%}{%- if m.role != 'tool' -%}\
    {%- if not (loop.previtem and loop.previtem.role == 'tool') -%}<|im_user|>{{ m.role }}<|im_middle|>{%- endif -%}\
    {%- for c in m.tool_calls or [] -%}<call>{{ c.function.name }}</call>{%- endfor -%}\
    {%- if m.tool_calls and loop.nextitem -%}<result>{{ loop.nextitem.content }}</result>{%- endif -%}\
    {{- m.content -}}{%- if not m.tool_calls -%}<|im_end|>{%- endif -%}{%- endif -%}{%- endfor -%}\
    {%- if add_generation_prompt and messages[-1].role != 'tool' -%}<|im_user|>assistant<|im_middle|>{%- endif -%}";

#[test]
fn the_result_of_a_tool_is_never_learned() {
    let learner = Learner::new(ONE_TURN, true);
    let record = |words: &str| talk_with_tools(&[user("Q"), call(words), result("SECRET"), answer("A")]);
    assert_eq!(learner.learned(&record("")).unwrap()[1], "<call>look</call>|A<|im_end|>");
    let error = learner.learned(&record("let me look")).unwrap_err();
    let error_text = error.to_string();
    assert!(
        error_text.contains("of message 2 ") && error_text.contains("the text of message 3 is within it"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("{% generation %}"));
    // The header of the result also names the function.
    let call_of = " to=functions.look<|channel|>commentary json<|message|>{\"at\": \"where\"}<|call|>";
    assert_eq!(learned_by("gpt_oss", &record("")), format!("{call_of}|<|channel|>final<|message|>A<|return|>"));
    // The header of the assistant starts like that of any other role.
    for knows in [true, false] {
        let learner = Learner::new(&template("seed_oss"), knows);
        let learned = learner.learned(&record("a")).unwrap()[1].clone();
        assert_eq!(learned, "<call look at=where><s>assistant\na</s>|A</s>");
    }
}

#[test]
fn an_end_token_of_the_last_turn_alone() {
    let record = talk(&[user("Q"), answer("A"), user("R"), answer("B")]);
    let expected = "<|channel|>final<|message|>A<|end|>|<|channel|>final<|message|>B<|return|>";
    assert_eq!(learned_by("gpt_oss", &record), expected);
}

/// Everything after the header of a plain answer is learned.
#[test]
fn tool_calls_are_learned_from_start_to_end() {
    let calls = talk_with_tools(&[user("Q"), call("")]);
    let mistral = "[TOOL_CALLS] [{\"name\": \"look\", \"arguments\": {\"at\": \"where\"}, \"id\": \"call00001\"}]</s>";
    assert_eq!(learned_by("mistral_v3", &calls), mistral);
    assert_eq!(learned_by("magistral", &calls), "[TOOL_CALLS]look[ARGS]{\"at\": \"where\"}</s>");
    let answered = talk_with_tools(&[user("Q"), call(""), result("R"), answer("A")]);
    assert_eq!(learned_by("mistral_v3", &answered), format!("{mistral}| A</s>"));
    let glm = "\n<think></think>\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>where</arg_value>\n</tool_call>";
    assert_eq!(learned_by("glm45", &answered), format!("{glm}|\n<think></think>\nA"));
    let command = "Action: ```json\n[\n    {\n        \"tool_name\": \"look\",\n        \"parameters\": {\n            \
                   \"at\": \"where\"\n        }\n    }\n]```";
    assert_eq!(learned_by("command_r_tools", &answered), format!("{command}|A"));
    assert!(learned_by("xlam", &answered).starts_with("look(at='where')]|A"));
}

/// The generation prompt opens a reasoning block, and the turns have none.
#[test]
fn no_header_is_learned() {
    let record = talk(&[user("Q"), answer("A")]);
    assert_eq!(learned_by("qwq", &record), "A<|im_end|>");
    assert_eq!(learned_by("deepseek_r1", &record), "A<|end_of_sentence|>");
    // A call that the template does not write is an error of the record.
    let error = Learner::new(&template("qwq"), true).learned(&talk_with_tools(&[user("Q"), call("")])).unwrap_err();
    assert!(error.to_string().contains("does not read `tool_calls`"), "{error}");
}

#[test]
fn line_ends_of_a_template_become_line_feeds() {
    let template =
        ChatTemplate::from_source("a\r\n{% for m in messages %}\r\n{{ m.content }}\rb{{ '\\r' }}\r\n{% endfor %}");
    let text = template.unwrap().render(&[Message::new("user", "Q\r\n")], false).unwrap();
    assert_eq!(text, "a\nQ\r\n\nb\r\n");
}

/// Conversations in which every word is unique and names its author: `u`ser, `s`ystem, `t`ool, `a`ssistant, `r`easoning,
/// ar`g`uments.
fn conversations() -> Vec<Value> {
    let mut next = 0;
    let mut word = |of: &str| {
        next += 1;
        format!("{of}{of}{next}{of}")
    };
    let mut conversations = Vec::new();
    for shape in ["ua", "uaua", "suaua", "uyuy", "uxux", "uc", "uk", "ucta", "ukta", "uktaua", "uauktcta", "uyukta"] {
        let messages = shape.chars().map(|kind| match kind {
            'u' => user(&word("u")),
            's' => json!({"role": "system", "content": word("s")}),
            't' => result(&word("t")),
            'a' => answer(&word("a")),
            'x' => json!({"role": "assistant", "content": word("a"), "reasoning_content": word("r")}),
            'y' => thought(&word("r"), &word("a")),
            kind => {
                let words = if kind == 'k' { word("a") } else { String::new() };
                let mut message = call(&words);
                message["tool_calls"][0]["function"]["arguments"]["at"] = word("g").into();
                message
            }
        });
        let messages: Vec<Value> = messages.collect();
        conversations.push(if shape.contains('t') { talk_with_tools(&messages) } else { talk(&messages) });
    }
    conversations
}

fn words_of<'a>(text: &'a str, of: &'a str) -> BTreeSet<&'a str> {
    let words = text.split(|character: char| !character.is_ascii_alphanumeric());
    words.filter(|word| word.starts_with(&of.repeat(2)) && word.contains(char::is_numeric)).collect()
}

#[test]
fn no_word_of_another_author_is_learned_and_every_word_of_the_assistant_is() {
    let (mut learned, mut refused) = (0, 0);
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "jinja") {
            continue;
        }
        for knows in [true, false] {
            let learner = Learner::new(&fs::read_to_string(&path).unwrap(), knows);
            for record in conversations() {
                let Ok([text, ours]) = learner.learned(&record) else {
                    refused += 1;
                    continue;
                };
                learned += 1;
                for other in ["u", "s", "t"] {
                    assert!(words_of(&ours, other).is_empty(), "{}: {record}: {ours}", path.display());
                }
                for own in ["a", "g"] {
                    assert_eq!(words_of(&ours, own), words_of(&text, own), "{}: {record}: {ours}", path.display());
                }
            }
        }
    }
    println!("{learned} records learned from, {refused} refused");
    assert!(learned > 700, "{learned} {refused}");
}
