use proptest::prelude::*;

use super::*;

/// The deltas for a text in pieces, with neighbors joined and ids that are random replaced.
fn parts(format: ToolFormat, pieces: &[&str]) -> Vec<Delta> {
    let mut parser = ToolParser::new(format);
    let mut deltas: Vec<Delta> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    deltas.extend(parser.finish());
    let mut joined: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (joined.last_mut(), delta) {
            (Some(Delta::Content(last)), Delta::Content(text)) => last.push_str(&text),
            (Some(Delta::CallArguments { text: last, .. }), Delta::CallArguments { text, .. }) => last.push_str(&text),
            (_, Delta::CallStart { index, id, name }) if id.starts_with("call_") => {
                assert_eq!(id.len(), 29);
                joined.push(Delta::CallStart { index, id: "call_".into(), name });
            }
            (_, delta) => joined.push(delta),
        }
    }
    joined
}

fn content(text: &str) -> Delta {
    Delta::Content(text.into())
}

fn start(index: usize, id: &str, name: &str) -> Delta {
    Delta::CallStart { index, id: id.into(), name: name.into() }
}

fn arguments(index: usize, text: &str) -> Delta {
    Delta::CallArguments { index, text: text.into() }
}

const TWO_KIMI: &str = "I will look. <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0\
    <|tool_call_argument_begin|>{\"city\": \"Turin\"}<|tool_call_end|>\n<|tool_call_begin|>functions.now:1\
    <|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>";

const TWO_HERMES: &str = "I will look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Turin\"}}\n\
    </tool_call>\n<tool_call>{\"name\": \"now\"}</tool_call>\n";

#[test]
fn calls_of_kimi_have_the_models_ids() {
    let expected = [
        content("I will look."),
        start(0, "functions.get_weather:0", "get_weather"),
        arguments(0, "{\"city\": \"Turin\"}"),
        start(1, "functions.now:1", "now"),
        arguments(1, "{}"),
    ];
    assert_eq!(parts(ToolFormat::Kimi, &[TWO_KIMI]), expected);
    let bare = "<|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>";
    assert_eq!(parts(ToolFormat::Kimi, &[bare]), [start(0, "functions.now:0", "now"), arguments(0, "{}")]);
    // The end of the text within the arguments leaves them incomplete, as OpenAI does.
    let cut = "<|tool_call_begin|>functions.a.b:7<|tool_call_argument_begin|>{\"x\": <|tool_c";
    assert_eq!(parts(ToolFormat::Kimi, &[cut]), [start(0, "functions.a.b:7", "a.b"), arguments(0, "{\"x\": <|tool_c")]);
}

#[test]
fn calls_of_hermes_are_json_in_tags() {
    let expected = [
        content("I will look."),
        start(0, "call_", "get_weather"),
        arguments(0, "{\"city\": \"Turin\"}"),
        start(1, "call_", "now"),
        arguments(1, "{}"),
    ];
    assert_eq!(parts(ToolFormat::Hermes, &[TWO_HERMES]), expected);
    let quoted = "<tool_call>{\"name\": \"a\", \"arguments\": \"{\\\"x\\\": 1}\"}";
    assert_eq!(parts(ToolFormat::Hermes, &[quoted]), [start(0, "call_", "a"), arguments(0, "{\"x\": 1}")]);
}

#[test]
fn what_is_not_a_call_is_content() {
    for text in ["<tool_call>{\"name\": 3}</tool_call>", "<tool_call>{\"na", "a < b </tool_call> c", "  \n", " x \n"] {
        assert_eq!(parts(ToolFormat::Hermes, &[text]), [content(text)]);
    }
    for text in ["<|tool_call_begin|>functions.x:0", "a <|tool_call_argument_begin|> b", "<|tool_calls_sect", "x\n"] {
        assert_eq!(parts(ToolFormat::Kimi, &[text]), [content(text)]);
    }
}

#[test]
fn the_format_is_that_of_the_template() {
    let kimi = "{{ '<|tool_call_begin|>' }}{{ id }}{{ '<|tool_call_argument_begin|>' }}";
    assert_eq!(ToolFormat::of_template(kimi), Some(ToolFormat::Kimi));
    assert_eq!(ToolFormat::of_template("{{ '<tool_call>\\n{\"name\": ' }}"), Some(ToolFormat::Hermes));
    assert_eq!(ToolFormat::of_template("{{ '<tool_call>\\n<function=' }}"), None);
    assert_eq!(ToolFormat::of_template("{{ tools | tojson }}"), None);
}

proptest! {
    #[test]
    fn the_parts_do_not_depend_on_how_the_text_is_divided(
        words in prop::collection::vec(0usize..14, 0..14),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        const WORDS: [&str; 14] = [
            kimi::CALL, kimi::ARGUMENTS, "<|tool_call_end|>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
            hermes::CALL, "</tool_call>", "functions.f:0", "{\"name\": \"f\", \"arguments\": {\"é\": 1}}", "\n", " ", "<", "é",
            "text",
        ];
        let text: String = words.iter().map(|&word| WORDS[word]).collect();
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).filter(|&cut| text.is_char_boundary(cut)).collect();
        ends.extend([0, text.len()]);
        ends.sort_unstable();
        let pieces: Vec<&str> = ends.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        for format in [ToolFormat::Kimi, ToolFormat::Hermes] {
            prop_assert_eq!(parts(format, &pieces), parts(format, &[&text]));
        }
    }
}
