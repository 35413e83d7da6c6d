use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::assistant_mask::{MAX_EXACT_TURNS, assistant_turns};
use super::*;
use crate::tokenizer::Tokenizer;

/// A `tiktoken.model` in `dir` with the 256 bytes; special tokens start at 256.
fn moonlight(dir: &Path) -> Tokenizer {
    let lines: String = (0..=255u8).map(|byte| format!("{} {byte}\n", STANDARD.encode([byte]))).collect();
    fs::write(dir.join("tiktoken.model"), lines).unwrap();
    Tokenizer::open(&dir.display().to_string()).unwrap()
}

mod masks;
mod records;
mod templates;

const IM_END: u32 = 256 + 2;
const IM_USER: u32 = 256 + 3;
const IM_ASSISTANT: u32 = 256 + 4;
const IM_SYSTEM: u32 = 256 + 10;
const IM_MIDDLE: u32 = 256 + 17;

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn a_directory_without_a_template_has_moonlights() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = moonlight(dir.path());
    let template = ChatTemplate::from_model_dir(dir.path(), &tokenizer).unwrap();
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
fn a_message_that_spells_a_special_token_stays_text() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = moonlight(dir.path());
    let template = ChatTemplate::from_model_dir(dir.path(), &tokenizer).unwrap();
    let content = "a<|im_end|>b [EOS]<|reserved_token_300|>\u{100005}";
    let encoder = ChatEncoder::new(template, tokenizer);
    let tokens = encoder.tokens(&[Message::new("user", content)], false).unwrap();
    let specials: Vec<u32> = tokens.iter().copied().filter(|&token| token > 255).collect();
    assert_eq!(specials, [IM_SYSTEM, IM_MIDDLE, IM_END, IM_USER, IM_MIDDLE, IM_END]);
    let content = bytes(content);
    assert!(tokens.windows(content.len()).any(|window| window == content), "{tokens:?}");
}

#[test]
fn a_template_of_the_directory_comes_first_and_python_methods_work() {
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
    let found = ChatTemplate::from_model_dir(dir.path(), &tokenizer).unwrap();
    assert_eq!(found.source(), &TemplateSource::File(dir.path().join("tokenizer_config.json")));
    assert_eq!(found.render(&[Message::new("user", "  hi ")], false).unwrap(), "[BOS][USER] hi\n");
    let refused = found.render(&[Message::new("tool", "x")], false).unwrap_err();
    assert!(refused.to_string().contains("no role tool"), "{refused}");

    fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let found = ChatTemplate::from_model_dir(dir.path(), &tokenizer).unwrap();
    assert_eq!(found.render(&[Message::new("user", "hi")], true).unwrap(), "hi");
    fs::write(dir.path().join("chat_template.jinja"), "a\n{% for %}").unwrap();
    let broken = ChatTemplate::from_model_dir(dir.path(), &tokenizer).unwrap_err().to_string();
    assert!(broken.contains("chat_template.jinja") && broken.contains("line 2"), "{broken}");
}

#[test]
fn a_model_without_a_template_is_an_error_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let error = ChatTemplate::from_model_dir(dir.path(), &Tokenizer::bytes()).unwrap_err();
    assert!(error.to_string().contains("has no chat template"));
    let hint = error.hint().unwrap();
    assert!(hint.contains("a text to continue") && hint.contains("`chat_template.jinja`"), "{hint}");
}

/// An encoder with the template `text` and the `bytes-chat` tokenizer.
fn encoder(text: &str) -> ChatEncoder {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("template.jinja");
    fs::write(&path, text).unwrap();
    let tokenizer = Tokenizer::bytes_chat();
    ChatEncoder::new(ChatTemplate::from_file(&path, &tokenizer).unwrap(), tokenizer)
}

/// The learned parts of a conversation of `(role, content)` as text with the names of special tokens, joined by `|`.
fn learned(encoder: &ChatEncoder, turns: &[(&str, &str)]) -> Result<String, ChatError> {
    let turns: Vec<Turn> = turns.iter().map(|&(role, content)| Turn::new(Message::new(role, content), 1.0)).collect();
    learned_of(encoder, &Conversation::from(turns))
}

/// The learned parts of any conversation.
fn learned_of(encoder: &ChatEncoder, conversation: &Conversation) -> Result<String, ChatError> {
    let weighted_tokens = encoder.weighted_tokens(conversation)?;
    // Cutting at the spans does not change the tokens here, because every byte is one.
    if conversation.fields.is_empty() {
        assert_eq!(weighted_tokens.tokens, encoder.tokens(&conversation.messages(), false).unwrap());
    }
    assert_eq!(weighted_tokens.weights.len(), weighted_tokens.tokens.len());
    let tokenizer = Tokenizer::bytes_chat();
    let specials = tokenizer.specials();
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut inside = false;
    for (&token, &weight) in weighted_tokens.tokens.iter().zip(&weighted_tokens.weights) {
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

/// Like ChatML, with special tokens of the tokenizer.
const CHATML: &str = "{% for m in messages %}{{ '<|im_middle|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<|im_middle|>assistant\n' }}{% endif %}";

#[test]
fn the_assistants_text_and_its_end_token_are_learned() {
    let moonlight = encoder(MOONLIGHT_TEMPLATE);
    assert_eq!(learned(&moonlight, &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
    assert_eq!(learned(&moonlight, &TALK[1..3]).unwrap(), "A b<|im_end|>");
    assert_eq!(learned(&moonlight, &[("assistant", "")]).unwrap(), "<|im_end|>");
    // Two answers in a row, and an end without one.
    let twice = [("user", "Q"), ("assistant", "A"), ("assistant", "B"), ("user", "R")];
    assert_eq!(learned(&moonlight, &twice).unwrap(), "A<|im_end|>|B<|im_end|>");
    // A special token that an answer spells is text: only the last token is special.
    let turns = vec![Turn::new(Message::new("assistant", "<|im_end|>"), 0.5)];
    let WeightedTokens { tokens, weights, .. } = moonlight.weighted_tokens(&turns.into()).unwrap();
    let halves: Vec<u32> = tokens.iter().zip(&weights).filter(|(_, weight)| **weight == 0.5).map(|(&t, _)| t).collect();
    assert_eq!(halves, [bytes("<|im_end|>"), vec![0xF5]].concat());
    assert!(weights.iter().all(|&weight| weight == 0.0 || weight == 0.5));
}

#[test]
fn the_end_token_is_the_one_that_the_template_writes() {
    assert_eq!(encoder(MOONLIGHT_TEMPLATE).end_token(), Some(0xF5));
    assert_eq!(encoder(CHATML).end_token(), Some(0xF5));
    assert_eq!(encoder("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").end_token(), None);
}

#[test]
fn a_line_break_after_the_end_is_not_learned() {
    assert_eq!(learned(&encoder(CHATML), &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
}

#[test]
fn templates_without_a_generation_prompt() {
    // ChatML: the template writes the header.
    let (without, _) = CHATML.split_once("{% if add").unwrap();
    assert_eq!(learned(&encoder(without), &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
    // Like Llama 2: only a space between the question and the answer, which the model has to write.
    let llama = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == \
                 'assistant' %} {{ m.content.strip() }} <|eos|>{% else %}<<SYS>>{{ m.content }}{% endif %}{% endfor %}";
    assert_eq!(learned(&encoder(llama), &TALK).unwrap(), " A b <|eos|>| C <|im_end|> <|eos|>");
    // Without an end token only the text is learned.
    let plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}\
                 assistant: {% endif %}";
    assert_eq!(learned(&encoder(plain), &TALK).unwrap(), "A b| C <|im_end|>");
}

#[test]
fn templates_that_trim_and_templates_that_rewrite() {
    let trims = CHATML.replace("m.content", "m.content.strip()");
    assert_eq!(learned(&encoder(&trims), &TALK).unwrap(), "A b<|im_end|>|C <|im_end|><|im_end|>");
    // The last answer has a tag before it, earlier ones do not: no rendering is a prefix of another.
    let rewrites = "{% for m in messages %}{{ '<|im_middle|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}\
                    <last>{% endif %}{{ m.content + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
                    {{ '<|im_middle|>assistant\n' }}{% endif %}";
    assert_eq!(learned(&encoder(rewrites), &TALK).unwrap(), "A b<|im_end|>|<last> C <|im_end|>\n<|im_end|>");
    // Without an end token, the start of the next turn is not taken for one.
    let no_end = rewrites.replace("m.content + '<|im_end|>'", "m.content");
    assert_eq!(learned(&encoder(&no_end), &TALK).unwrap(), "A b|<last> C <|im_end|>");
    // Reversed text cannot be found if an earlier turn is rewritten.
    let reversed = rewrites.replace("m.content +", "m.content|reverse +");
    let error = learned(&encoder(&reversed), &TALK).unwrap_err();
    assert!(error.to_string().contains("of message 3 is not found"), "{error}");
    assert!(error.to_string().contains("the template rewrites the conversation"), "{error}");
    assert!(error.hint().unwrap().contains("{% generation %}"));
}

#[test]
fn generation_blocks_are_learned() {
    let text = "{% for m in messages %}\n  {%- if m.role == 'assistant' %}\n<|im_middle|>\n    {%- generation -%}\n    \
                {{ m.content }}<|im_end|>\n    {% endgeneration %}\n  {%- else %}\n[{{ m.content }}]\n  {%- endif %}\n\
                {% endfor %}";
    // A block is learned verbatim, including the line break before the closing tag.
    assert_eq!(learned(&encoder(text), &TALK).unwrap(), "A b<|im_end|>\n| C <|im_end|>\n<|im_end|>\n");
    let trimmed = text.replace("<|im_end|>\n    {% endgeneration", "<|im_end|>\n    {%- endgeneration");
    assert_eq!(learned(&encoder(&trimmed), &TALK).unwrap(), "A b<|im_end|>| C <|im_end|>\n<|im_end|>");
    let never = text.replace("== 'assistant'", "== 'moderator'");
    let error = learned(&encoder(&never), &TALK).unwrap_err().to_string();
    assert!(error.contains("writes no `{% generation %}` block for 2 assistant messages"), "{error}");
}

#[test]
fn the_exception_of_a_template_is_reported() {
    let refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ \
                   m.content }}{% endfor %}";
    let error = learned(&encoder(refuses), &TALK).unwrap_err().to_string();
    assert!(error.contains("does not accept this conversation: no system here"), "{error}");
    assert!(learned(&encoder(refuses), &TALK[1..3]).is_ok());
    assert!(encoder(refuses).parse(br#"{"messages": [{"role": "system", "content": "x"}]}"#).is_err());
}

/// The tokens before a learned span equal the prompt at inference.
#[test]
fn the_prompt_is_a_prefix_of_the_learned_conversation() {
    for text in [MOONLIGHT_TEMPLATE, CHATML] {
        let encoder = encoder(text);
        let messages: Vec<Message> = TALK.iter().map(|&(role, content)| Message::new(role, content)).collect();
        let turns: Vec<Turn> = messages.iter().map(|message| Turn::new(message.clone(), 1.0)).collect();
        let WeightedTokens { tokens, weights, .. } = encoder.weighted_tokens(&turns.into()).unwrap();
        let prompt = encoder.tokens(&messages[..4], true).unwrap();
        assert_eq!(tokens[..prompt.len()], prompt);
        assert!(weights[prompt.len() - 1] == 0.0 && weights[prompt.len()] == 1.0);
    }
}

/// Hostile templates must not end the process, exhaust its memory or run for long.
mod hostile {
    use std::time::{Duration, Instant};

    use super::*;

    fn messages(count: usize) -> Vec<Message> {
        let role = |index| if index % 2 == 0 { "user" } else { "assistant" };
        (0..count).map(|index| Message::new(role(index), format!("words of turn {index}\n"))).collect()
    }

    /// The output of a template, within five seconds.
    fn answer(text: &str) -> Result<String, String> {
        let started = Instant::now();
        let rendered = ChatTemplate::from_source(text).and_then(|template| template.render(&messages(4), true));
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "{:?} for {}",
            started.elapsed(),
            &text[..text.len().min(100)]
        );
        rendered.map_err(|error| error.to_string())
    }

    fn refused(text: &str, expected: &str) {
        let error = answer(text).expect_err(&text[..text.len().min(100)]);
        assert!(error.contains(expected), "{error} for {}", &text[..text.len().min(100)]);
        assert!(!error.chars().any(char::is_control) && error.len() < 4000, "{error}");
    }

    const STEPS: &str = "exceeds the limit of 1000000 steps for 4 messages";

    #[test]
    fn endless_loops() {
        let loops: String = ["a", "b", "c"].iter().map(|x| format!("{{% for {x} in range(100000) %}}")).collect();
        refused(&format!("{loops}{}x", "{% endfor %}".repeat(3)), STEPS);
        refused(&format!("{loops}{}{}", "a".repeat(32), "{% endfor %}".repeat(3)), STEPS);
        let double = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}\
                      {% endfor %}{{ ns.x }}";
        refused(double, STEPS);
        refused(&double.replace("ns.x ~ ns.x", "ns.x + ns.x"), STEPS);
    }

    #[test]
    fn huge_texts_and_lists() {
        refused(&"{{ ('a' * 90000000) }}{{ ('a' * 90000000) * 1 }}".repeat(60), STEPS);
        refused("{{ ('a'*100000)|replace('a','a'*10000) }}", STEPS);
        refused("{{ ('a'*100000).replace('a','a'*10000) }}", STEPS);
        refused("{{ ([1]*90000000)|length }}{{ ([1]*90000000)|sort|length }}", "`*` repeats a list");
        refused("{{ (3 * [1])|length }}", "`*` repeats a list");
        refused("{{ [1]|batch(999999999999, 0)|list|length }}", "");
        refused("{{ [1]|slice(999999999999)|list|length }}", "");
        refused("{{ 'a\nb'|indent(9999999999) }}", "");
        refused("{{ '%0999999999d' % 1 }}", "");
        refused("{{ 'a'.center(9999999999) }}{{ 'a'.ljust(99999999999) }}{{'a'.zfill(9999999999)}}", "");
        refused("{{ 10**100000000 }}", "");
        refused("{{ '{:>900000000}'.format(1) }}", "limit of four digits");
        refused("{{ (('a'*1000000) ~ 'b').strip('b' * 100000) }}", STEPS);
        refused(
            "{{ ''.join(range(100000)|map('string')|list) }}{% for a in range(100) %}{{ 'x'.join('a'*100000) }}{% endfor %}",
            STEPS,
        );
        refused("{{ ('a'*3000000).split('a') }}", STEPS);
        refused("{{ 'a'.center(9999999999) }}", STEPS);
        refused("{{ 'a'.zfill(9999999999) }}", STEPS);
        refused("{{ 'a\nb'|indent(9999999999) }}", STEPS);
        refused("{{ [1]|tojson(indent=1000) }}", "exceeds the limit of 100");
        refused("{{ ('a\n'*3000000).splitlines()|length }}{{ ('a\n'*3000000)|indent(100)|length }}", STEPS);
        refused("{% for a in 'a'*9000000 %}{% endfor %}", STEPS);
        refused("{{ messages|join('a'*9000000) }}{{ messages|tojson(separators=['a'*9000000, 'b']) }}", STEPS);
        let nested = "{% set x = [1] %}".to_owned() + &"{% set x = {'a': x, 'b': x} %}".repeat(18);
        for end in ["{{ x }}", "{{ x|tojson }}", "{{ x|string }}", "{{ 'a' ~ x }}", "{{ [x]|join }}"] {
            refused(&format!("{nested}{}", end.repeat(20)), STEPS);
        }
        let twice = "{% set x = [messages, messages] %}".to_owned() + &"{% set x = [x, x] %}".repeat(60);
        refused(&format!("{twice}{{{{ x }}}}"), "exceeds the limit of");
        refused(&format!("{twice}{{{{ x in 'abc' }}}}"), "exceeds the limit of");
    }

    /// A namespace that contains itself is infinite, and nested lists are as deep as the stack allows.
    #[test]
    fn infinite_and_deep_values() {
        for end in ["{{ ns }}", "{{ ns|tojson }}", "{{ 'a' ~ ns.x }}", "{{ ns == ns.x }}", "{{ ns|items|list }}"] {
            for value in
                ["ns", "[ns]", "{'a': ns}", "ns|items", "ns.items()", "dict(ns)", "ns if true else 1", "(ns, 1)"]
            {
                let text = format!("{{% set ns = namespace(x=1) %}}{{% set ns.x = {value} %}}{end}done");
                let _ = answer(&text);
            }
        }
        let _ = answer("{% set ns = namespace() %}{% set ns.x | default(ns, true) %}{% endset %}{{ ns }}");
        for value in ["[ns.x]", "[[[[[[[[ns.x]]]]]]]]", "{'a': ns.x}", "ns.x|batch(1)", "ns.x[0:]", "ns.x|list"] {
            let grow = format!(
                "{{% set ns = namespace(x=[1]) %}}{{% for a in range(90000) %}}{{% set ns.x = {value} %}}{{% endfor %}}"
            );
            let _ = answer(&format!("{grow}{{{{ ns.x }}}}"));
        }
        refused(
            "{% set ns = namespace() %}{% for a in range(900) %}{% set ns.x = [ns.x] %}{% endfor %}",
            "limit of 64 levels",
        );
        refused("{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}", "recursion limit");
        let _ = answer("{% macro f(n) %}{{ f(n|batch(1)|batch(1)|batch(1)|list) }}{% endmacro %}{{ f([1]) }}");
        refused("{% for x in [[[1]]] recursive %}{{ loop([[1]]) }}{% endfor %}", "recursion limit");
        refused("{% include 'chat' %}", "recursion limit");
        refused("{% extends 'chat' %}", "");
        refused("{{ debug() }}", "");
    }

    #[test]
    fn deeply_nested_sources() {
        let tokens = "exceeds the limit of 4096 tokens";
        refused(&format!("{{{{ {}1 }}}}", "-".repeat(200_000)), tokens);
        refused(&format!("{{{{ 'x'{} }}}}", "|upper".repeat(100_000)), tokens);
        refused(&format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)), tokens);
        refused(&format!("{{{{ {}1{} }}}}", "(".repeat(1_000), ")".repeat(1_000)), "maximum recursion limits");
        refused(&format!("{{{{ {}{} }}}}", "[".repeat(3_000), "]".repeat(3_000)), tokens);
        refused(
            &format!("{}{}", "{% if true %}".repeat(20_000), "{% endif %}".repeat(20_000)),
            "maximum recursion limits",
        );
        refused(
            &format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(20_000)),
            "limit of 1000 `elif` branches",
        );
        refused(&"a".repeat(1 << 21), "more than the limit of 1048576");
        // Just within the limits.
        for deep in [
            format!("{{{{ {}1 }}}}", "-".repeat(4_090)),
            format!("{{{{ 'x'{} }}}}", "|upper".repeat(2_000)),
            format!("{{{{ x{} }}}}", ".x".repeat(2_000)),
            format!("{{{{ {} }}}}", "1 if 0 else ".repeat(1_300) + "1"),
            format!("{{{{ {}1 }}}}", "not ".repeat(4_000)),
            format!("{{{{ {}1 }}}}", "1 ~ ".repeat(2_000)),
            format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(990)),
        ] {
            let _ = answer(&deep);
        }
    }

    #[test]
    fn control_characters_of_templates_and_records_are_escaped_in_messages() {
        refused("{{ raise_exception('\u{1b}[2J\u{7}no') }}", "\\u{1b}[2J\\u{7}no");
        let line = "{\"messages\": [{\"role\": \"\\u001b[2J\", \"content\": \"\"}]}";
        let error = Conversation::parse(line.as_bytes(), |_| false).unwrap_err().to_string();
        assert!(error.contains("unknown role `\\u{1b}[2J`"), "{error}");
        let error = Conversation::parse(b"{\"\\u001b[2J\": 1}", |_| false).unwrap_err().to_string();
        assert!(error.contains("it has `\\u{1b}[2J`"), "{error}");
    }

    /// The guards do not change ordinary code: lists in namespaces, literals, arithmetic, macros.
    #[test]
    fn ordinary_templates_pass() {
        for (text, expected) in [
            (
                "{% set ns = namespace(l=[], n=1) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.l|join(',') }} {{ ns.n }}",
                "user,assistant,user,assistant 16",
            ),
            ("{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c = (a, b)[1] %}{{ c }}{{ 2 * 3 * (1 + a)|int }}", "12212"),
            (
                "{{ '-' * 3 }}{{ messages[0]['role'] }}{{ 'user' in [messages[0].role, 'x'] }}{{ {'a': messages|length}['a'] }}",
                "---userTrue4",
            ),
            (
                "{% set x %}a{% endset %}{% set y | upper %}b{{ x }}{% endset %}{{ y }}{{ ','.join(['a', 'b']) }}{{ 'a b'.split() }}",
                "BAa,b['a', 'b']",
            ),
            (
                "{% set messages = messages[1:] %}{{ messages[0].role }}{{ messages|length }}{%- set d = dict(a=1) -%} {{ d.a }}",
                "assistant31",
            ),
            (
                "{% macro f(x, y=[1]) -%}{{ x }}{{ y[0] }}{%- endmacro %}{{ f(2) }}{{ f('a', [3]) }}{{ ' a '.strip() }}{{ 'xax'.strip('x') }}",
                "21a3aa",
            ),
            (
                "{{ '%s-%d'|format('a', 3) }}{{ '{} {}'.format('a', 1) }}{{ messages|map(attribute='role')|unique|list|length }}",
                "a-3a 12",
            ),
        ] {
            assert_eq!(answer(text).unwrap(), expected, "{text}");
        }
    }

    /// Templates like DeepSeek's, Qwen's and Moonlight's, with ten thousand messages.
    #[test]
    fn long_conversations_pass() {
        let qwen = "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\
            {%- endif %}{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\
            {%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}\
            {%- if ns.multi_step_tool and message.role == \"user\" and message.content is string and not(\
            message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\
            {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}\
            {%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}{%- else %}\
            {%- set content = '' %}{%- endif %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}\
            {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- elif message.role == 'assistant' %}\
            {%- set reasoning_content = '' %}{%- if '</think>' in content %}{%- set reasoning_content = \
            content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- set content = \
            content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- if loop.index0 > ns.last_query_index %}\
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + \
            content.lstrip('\\n') }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}\
            {{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";
        let deepseek = "{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}{%- for message in messages %}\
            {%- if message['role'] == 'system' %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}\
            {%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}\
            {%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' \
            and message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in content %}\
            {% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + '<|end|>'}}\
            {%- set ns.is_first = true -%}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}\
            {{'<|Assistant|>'}}{% endif %}";
        let messages = messages(10_000);
        for text in [qwen, deepseek, MOONLIGHT_TEMPLATE] {
            let rendered = ChatTemplate::from_source(text).unwrap().render(&messages, true).unwrap();
            assert!(rendered.contains("words of turn 9999"));
        }
    }
}

/// In a long conversation, patterns find the same spans as the exact methods.
#[test]
fn patterns_find_the_spans_of_the_exact_methods() {
    let llama = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == \
                 'assistant' %} {{ m.content.strip() }} <|eos|>{% else %}<<SYS>>{{ m.content }}{% endif %}{% endfor %}";
    let plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}\
                 assistant: {% endif %}";
    let (without, _) = CHATML.split_once("{% if add").unwrap();
    let rewrites = "{% for m in messages %}{{ '<|im_middle|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}\
                    <last>{% endif %}{{ m.content + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
                    {{ '<|im_middle|>assistant\n' }}{% endif %}";
    let trims = CHATML.replace("m.content", "m.content.strip()");
    let words = ["A b", " C <|im_end|>\n", "", "\n", "D", " [/INST] assistant\n", "E\n\n"];
    for edges in [true, false] {
        let messages: Vec<Message> = (0..240)
            .map(|index| match index % 3 {
                0 => Message::new("user", format!("Q{index}")),
                1 => Message::new("assistant", if edges { words[index % words.len()] } else { "A" }),
                _ if index % 7 == 0 => Message::new("assistant", format!("answer {index}")),
                _ => Message::new("system", "S"),
            })
            .collect();
        for text in [MOONLIGHT_TEMPLATE, CHATML, llama, plain, without, rewrites, &trims] {
            let encoder = encoder(text);
            let input = encoder.core().template_input(messages.iter(), Map::new()).unwrap();
            let (finder, turns) = (encoder.core().finder(), assistant_turns(&input));
            assert!(turns.len() > MAX_EXACT_TURNS);
            let rendered = finder.template.render_input(&input, &input.values, false, ["", ""]).unwrap();
            let regions = finder.regions(&input, input.messages.len(), &rendered);
            let each = finder.exact_spans(&input, &turns, &rendered, &regions);
            let (Ok(each), Ok(found)) = (each, finder.spans_by_pattern(&input, &turns, &rendered, &regions)) else {
                continue;
            };
            if let Some(found) = found {
                assert_eq!(found, each, "{text}");
            } else {
                assert!(edges, "{text} makes all turns alike");
            }
        }
    }
}

#[test]
fn ten_thousand_turns_take_seconds() {
    let turns: Vec<Turn> = (0..10_000)
        .flat_map(|index| {
            [("user", format!("question {index}"), 0.0), ("assistant", format!("answer {index} \n"), 1.0)]
        })
        .map(|(role, content, weight)| Turn::new(Message::new(role, content), weight))
        .collect();
    let turns = Conversation::from(turns);
    for text in [MOONLIGHT_TEMPLATE, CHATML] {
        let started = std::time::Instant::now();
        let WeightedTokens { weights, .. } = encoder(text).weighted_tokens(&turns).unwrap();
        let learned = weights.iter().filter(|&&weight| weight > 0.0).count();
        let expected: usize = (0..10_000).map(|index: usize| format!("answer {index} \n").len() + 1).sum();
        assert_eq!(learned, expected);
        assert!(started.elapsed().as_secs() < 15, "{:?}", started.elapsed());
    }
    // This template writes into each turn how many follow, so that every turn needs a separate rendering.
    let counts = "{% for m in messages %}{{ m.role }}{{ loop.revindex }}{{ m.content|reverse }}<|im_end|>{% endfor %}";
    let error = encoder(counts).weighted_tokens(&turns).unwrap_err();
    assert!(error.to_string().contains("renders 200000000 messages, more than the limit of 8000000"), "{error}");
    assert!(error.hint().unwrap().contains("{% generation %}"));
}

#[test]
fn links_out_of_the_directory_of_a_template_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("model");
    std::fs::create_dir(&dir).unwrap();
    let tokenizer = Tokenizer::bytes_chat();
    assert_eq!(ChatTemplate::from_model_dir(&dir, &tokenizer).unwrap().source(), &TemplateSource::Moonlight);
    std::fs::write(dir.join("tokenizer_config.json"), "{\"chat_template\": ").unwrap();
    let error = ChatTemplate::from_model_dir(&dir, &tokenizer).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json` is invalid: it is not JSON"), "{error}");
    std::fs::remove_file(dir.join("tokenizer_config.json")).unwrap();
    #[cfg(unix)]
    for name in ["chat_template.jinja", "tokenizer_config.json"] {
        std::fs::write(home.path().join("secret"), "{}").unwrap();
        std::os::unix::fs::symlink("../secret", dir.join(name)).unwrap();
        let error = ChatTemplate::from_model_dir(&dir, &tokenizer).unwrap_err().to_string();
        assert!(error.contains(&format!("{name}` is invalid: it is a symbolic link")), "{error}");
        std::fs::remove_file(dir.join(name)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.join(name)).unwrap();
        assert!(ChatTemplate::from_model_dir(&dir, &tokenizer).is_err());
        assert!(ChatTemplate::from_file(&dir.join(name), &tokenizer).is_err());
        std::fs::remove_file(dir.join(name)).unwrap();
    }
}

#[test]
fn a_special_token_without_text_is_ignored() {
    let mut json: serde_json::Value = serde_json::from_slice(&Tokenizer::bytes_chat().files()[0].contents).unwrap();
    json["added_tokens"]
        .as_array_mut()
        .unwrap()
        .push(serde_json::json!({"id": 259, "content": "", "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    assert!(tokenizer.specials().iter().all(|(name, _)| !name.is_empty()));
    let encoder = ChatEncoder::new(ChatTemplate::from_source(MOONLIGHT_TEMPLATE).unwrap(), tokenizer);
    assert_eq!(learned(&encoder, &TALK[1..3]).unwrap(), "A b<|im_end|>");
}

#[test]
fn a_tag_without_content_does_not_panic() {
    for source in ["{%}", "{%%}", "{% generation", "{%-%}", "{%}{% generation %}x{% endgeneration %}"] {
        let _ = ChatTemplate::from_source(source).map(|template| template.text().to_owned());
    }
}
