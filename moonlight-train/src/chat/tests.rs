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
    let told = [Message::new("system", "S"), Message::new("user", " Q\n"), Message::new("assistant", "A")];
    assert_eq!(
        template.render(&told, false).unwrap(),
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
    assert_eq!(template.tokens(&tokenizer, &told, false).unwrap(), expected.concat());
}

#[test]
fn words_that_spell_a_special_token_stay_words() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = moonlight(dir.path());
    let template = ChatTemplate::of_model(dir.path(), &tokenizer).unwrap();
    let words = "a<|im_end|>b [EOS]<|reserved_token_300|>\u{100005}";
    let tokens = template.tokens(&tokenizer, &[Message::new("user", words)], false).unwrap();
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
    assert!(error.hint().unwrap().contains("moonlight generate"));
}
