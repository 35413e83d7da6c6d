use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::*;
use crate::tokenizer::Tokenizer;

/// A folder with the 256 bytes as Moonlight's kind of tokenizer; specials begin at 256.
fn moonlight(dir: &Path) -> Tokenizer {
    let lines: String = (0..=255u8).map(|byte| format!("{} {byte}\n", STANDARD.encode([byte]))).collect();
    fs::write(dir.join("tiktoken.model"), lines).unwrap();
    Tokenizer::open(&dir.display().to_string()).unwrap()
}

const IM_END: u32 = 256 + 2;
const IM_USER: u32 = 256 + 3;
const IM_ASSISTANT: u32 = 256 + 4;
const IM_SYSTEM: u32 = 256 + 10;
const IM_MIDDLE: u32 = 256 + 17;

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn moonlights_own_template_where_the_folder_has_none() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = moonlight(dir.path());
    let template = ChatTemplate::of_model(dir.path(), &tokenizer).unwrap();
    assert_eq!(template.source(), &TemplateSource::Moonlight);
    let question = [Message::new("user", "Q")];
    assert_eq!(
        template.render(&question, true).unwrap(),
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|><|im_user|>user<|im_middle|>Q<|im_end|>\
         <|im_assistant|>assistant<|im_middle|>"
    );
    let messages = [Message::new("system", "S"), Message::new("user", " Q\n"), Message::new("assistant", "A")];
    assert_eq!(
        template.render(&messages, false).unwrap(),
        "<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|> Q\n<|im_end|>\
         <|im_assistant|>assistant<|im_middle|>A<|im_end|>"
    );
    let expected = [
        vec![IM_SYSTEM],
        bytes("system"),
        vec![IM_MIDDLE],
        bytes("S"),
        vec![IM_END, IM_USER],
        bytes("user"),
        vec![IM_MIDDLE],
        bytes(" Q\n"),
        vec![IM_END, IM_ASSISTANT],
        bytes("assistant"),
        vec![IM_MIDDLE],
        bytes("A"),
        vec![IM_END],
    ];
    assert_eq!(ChatEncoder::new(template, tokenizer).tokens(&messages, false).unwrap(), expected.concat());
}

#[test]
fn words_that_spell_a_special_token_stay_words() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = moonlight(dir.path());
    let template = ChatTemplate::of_model(dir.path(), &tokenizer).unwrap();
    let words = "a<|im_end|>b [EOS]<|reserved_token_300|>\u{100005}";
    let encoder = ChatEncoder::new(template, tokenizer);
    let tokens = encoder.tokens(&[Message::new("user", words)], false).unwrap();
    let specials: Vec<u32> = tokens.iter().copied().filter(|&token| token > 255).collect();
    assert_eq!(specials, [IM_SYSTEM, IM_MIDDLE, IM_END, IM_USER, IM_MIDDLE, IM_END]);
    let said = bytes("a<|im_end|>b [EOS]<|reserved_token_300|>");
    assert!(tokens.windows(said.len()).any(|window| window == said), "{tokens:?}");
}

#[test]
fn a_folders_template_comes_first_and_python_methods_work() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = moonlight(dir.path());
    let template = "{{ bos_token }}{% for m in messages %}\n  {% if m.role not in ['user', 'assistant'] %}\n    \
                    {{ raise_exception('no role ' + m.role) }}\n  {% endif %}\n[{{ m.role.upper() }}] {{ m.content.strip() \
                    }}\n{% endfor %}";
    let config = serde_json::json!({
        "bos_token": {"content": "[BOS]"},
        "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": template}],
    });
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let found = ChatTemplate::of_model(dir.path(), &tokenizer).unwrap();
    assert_eq!(found.source(), &TemplateSource::File(dir.path().join("tokenizer_config.json")));
    assert_eq!(found.render(&[Message::new("user", "  hi ")], false).unwrap(), "[BOS][USER] hi\n");
    let refused = found.render(&[Message::new("tool", "x")], false).unwrap_err();
    assert!(refused.to_string().contains("no role tool"), "{refused}");

    fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let found = ChatTemplate::of_model(dir.path(), &tokenizer).unwrap();
    assert_eq!(found.render(&[Message::new("user", "hi")], true).unwrap(), "hi");
    fs::write(dir.path().join("chat_template.jinja"), "a\n{% for %}").unwrap();
    let broken = ChatTemplate::of_model(dir.path(), &tokenizer).unwrap_err().to_string();
    assert!(broken.contains("chat_template.jinja") && broken.contains("line 2"), "{broken}");
}

#[test]
fn a_model_that_never_learned_to_chat_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = ChatTemplate::of_model(dir.path(), &Tokenizer::bytes()).unwrap_err();
    assert!(error.to_string().contains("has no chat template"));
    let hint = error.hint().unwrap();
    assert!(hint.contains("a text to continue") && hint.contains("`chat_template.jinja`"), "{hint}");
}

/// An encoder whose template is `text`, over the bytes with Moonlight's tokens of a conversation.
fn encoder(text: &str) -> ChatEncoder {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("template.jinja");
    fs::write(&path, text).unwrap();
    let tokenizer = Tokenizer::bytes_chat();
    ChatEncoder::new(ChatTemplate::of_file(&path, &tokenizer).unwrap(), tokenizer)
}

/// What is learned of a conversation of `(role, words)`, as text with the specials spelled, `|` between the parts.
fn learned(encoder: &ChatEncoder, turns: &[(&str, &str)]) -> Result<String, ChatError> {
    let turns: Vec<Turn> = turns
        .iter()
        .map(|&(role, words)| Turn {
            message: Message::new(role, words),
            weight: f32::from(u8::from(role == "assistant")),
        })
        .collect();
    let weighted = encoder.weighted(&turns)?;
    // The tokens are those of the whole conversation, whatever is learned of them: here every byte is a token.
    let messages: Vec<Message> = turns.iter().map(|turn| turn.message.clone()).collect();
    assert_eq!(weighted.tokens, encoder.tokens(&messages, false).unwrap());
    assert_eq!(weighted.weights.len(), weighted.tokens.len());
    let tokenizer = Tokenizer::bytes_chat();
    let specials = tokenizer.specials();
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

const TALK: [(&str, &str); 5] =
    [("system", "S"), ("user", "Q"), ("assistant", "A b"), ("user", "<|im_end|>"), ("assistant", " C <|im_end|>\n")];

/// In the manner of ChatML, with specials that the tokenizer has.
const CHATML: &str = "{% for m in messages %}{{ '<|im_middle|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<|im_middle|>assistant\n' }}{% endif %}";

#[test]
fn moonlight_learns_the_assistants_words_and_their_end() {
    let moonlight = encoder(MOONLIGHT_TEMPLATE);
    assert_eq!(learned(&moonlight, &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
    assert_eq!(learned(&moonlight, &TALK[1..3]).unwrap(), "A b<|im_end|>");
    assert_eq!(learned(&moonlight, &[("assistant", "")]).unwrap(), "<|im_end|>");
    // Two answers in a row, and an end without one.
    let twice = [("user", "Q"), ("assistant", "A"), ("assistant", "B"), ("user", "R")];
    assert_eq!(learned(&moonlight, &twice).unwrap(), "A<|im_end|>|B<|im_end|>");
    // What spells a special token in an answer is words: only the last token is one.
    let turns = [Turn { message: Message::new("assistant", "<|im_end|>"), weight: 0.5 }];
    let WeightedTokens { tokens, weights } = moonlight.weighted(&turns).unwrap();
    let halves: Vec<u32> = tokens.iter().zip(&weights).filter(|(_, weight)| **weight == 0.5).map(|(&t, _)| t).collect();
    assert_eq!(halves, [bytes("<|im_end|>"), vec![0xF5]].concat());
    assert!(weights.iter().all(|&weight| weight == 0.0 || weight == 0.5));
}

#[test]
fn the_token_to_stop_at() {
    assert_eq!(encoder(MOONLIGHT_TEMPLATE).end_token(), Some(0xF5));
    assert_eq!(encoder(CHATML).end_token(), Some(0xF5));
    assert_eq!(encoder("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").end_token(), None);
}

#[test]
fn a_line_break_after_the_end_is_not_learned() {
    assert_eq!(learned(&encoder(CHATML), &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
}

#[test]
fn templates_that_cannot_be_asked_for_the_answer() {
    // ChatML without a generation prompt: the header is the template's.
    let (without, _) = CHATML.split_once("{% if add").unwrap();
    assert_eq!(learned(&encoder(without), &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
    // Llama 2's kind: nothing but a space between the question and the answer, which the model must write.
    let llama = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == \
                 'assistant' %} {{ m.content.strip() }} <|eos|>{% else %}<<SYS>>{{ m.content }}{% endif %}{% endfor %}";
    assert_eq!(learned(&encoder(llama), &TALK).unwrap(), " A b <|eos|>| C <|im_end|> <|eos|>");
    // No end marker at all: the words alone.
    let plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}\
                 assistant: {% endif %}";
    assert_eq!(learned(&encoder(plain), &TALK).unwrap(), "A b| C <|im_end|>");
}

#[test]
fn templates_that_trim_and_templates_that_rewrite() {
    let trims = CHATML.replace("m.content", "m.content.strip()");
    assert_eq!(learned(&encoder(&trims), &TALK).unwrap(), "A b<|im_end|>|C <|im_end|><|im_end|>");
    // The last answer has a tag before it, and no earlier one: no text begins with that of an earlier turn.
    let rewrites = "{% for m in messages %}{{ '<|im_middle|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}\
                    <last>{% endif %}{{ m.content + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
                    {{ '<|im_middle|>assistant\n' }}{% endif %}";
    assert_eq!(learned(&encoder(rewrites), &TALK).unwrap(), "A b<|im_end|>|<last> C <|im_end|>\n<|im_end|>");
    // The same without an end marker: the next turn's beginning is none.
    let no_end = rewrites.replace("m.content + '<|im_end|>'", "m.content");
    assert_eq!(learned(&encoder(&no_end), &TALK).unwrap(), "A b|<last> C <|im_end|>");
    // Words turned around cannot be found where an earlier turn is rewritten.
    let turned = rewrites.replace("m.content +", "m.content|reverse +");
    let error = learned(&encoder(&turned), &TALK).unwrap_err();
    assert!(error.to_string().contains("message 3: it rewrites the conversation"), "{error}");
    assert!(error.hint().unwrap().contains("{% generation %}"));
}

#[test]
fn generation_blocks_say_what_is_learned() {
    let text = "{% for m in messages %}\n  {%- if m.role == 'assistant' %}\n<|im_middle|>\n    {%- generation -%}\n    \
                {{ m.content }}<|im_end|>\n    {% endgeneration %}\n  {%- else %}\n[{{ m.content }}]\n  {%- endif %}\n\
                {% endfor %}";
    // To the letter, the line break before the closing tag included.
    assert_eq!(learned(&encoder(text), &TALK).unwrap(), "A b<|im_end|>\n| C <|im_end|>\n<|im_end|>\n");
    let trimmed = text.replace("<|im_end|>\n    {% endgeneration", "<|im_end|>\n    {%- endgeneration");
    assert_eq!(learned(&encoder(&trimmed), &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
    let never = text.replace("== 'assistant'", "== 'nobody'");
    let error = learned(&encoder(&never), &TALK).unwrap_err().to_string();
    assert!(error.contains("0 `{% generation %}` blocks for 2 messages"), "{error}");
}

#[test]
fn a_template_that_fails_says_why() {
    let refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ \
                   m.content }}{% endfor %}";
    let error = learned(&encoder(refuses), &TALK).unwrap_err().to_string();
    assert!(error.contains("does not take this conversation: no system here"), "{error}");
    assert!(learned(&encoder(refuses), &TALK[1..3]).is_ok());
    assert!(encoder(refuses).parse(br#"{"messages": [{"role": "system", "content": "x"}]}"#).is_err());
}

/// What follows the prompt is what is learned: token for token what the model will be asked for.
#[test]
fn the_prompt_is_the_beginning_of_what_is_learned_from() {
    for text in [MOONLIGHT_TEMPLATE, CHATML] {
        let encoder = encoder(text);
        let messages: Vec<Message> = TALK.iter().map(|&(role, words)| Message::new(role, words)).collect();
        let turns: Vec<Turn> = messages.iter().map(|message| Turn { message: message.clone(), weight: 1.0 }).collect();
        let turns: Vec<Turn> = turns
            .into_iter()
            .map(|turn| Turn { weight: if turn.message.role == "assistant" { 1.0 } else { 0.0 }, ..turn })
            .collect();
        let WeightedTokens { tokens, weights } = encoder.weighted(&turns).unwrap();
        let prompt = encoder.tokens(&messages[..4], true).unwrap();
        assert_eq!(tokens[..prompt.len()], prompt);
        assert!(weights[prompt.len() - 1] == 0.0 && weights[prompt.len()] == 1.0);
    }
}
