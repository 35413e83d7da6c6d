//! Records as data sets store them: which fields reach the template, which text is learned, and which records are refused.

use serde_json::{Value, json};

use super::*;

/// A template with tools and reasoning.
const TOOLS: &str = "{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}\
    {%- for m in messages -%}{%- if m['role'] == 'user' -%}<|im_user|>{%- elif m['role'] == 'assistant' -%}<|im_assistant|>\
    {%- else -%}<|im_system|>{%- endif -%}{{- m.get('name') or m['role'] -}}<|im_middle|>\
    {%- if m['role'] == 'tool' -%}## Return of {{ m.get('tool_call_id') }}: {% endif -%}\
    {%- if m.get('reasoning_content') -%}<think>{{ m['reasoning_content'] }}</think>{%- endif -%}\
    {%- if m['content'] -%}{{ m['content'] }}{%- endif -%}{%- for c in m.get('tool_calls') or [] -%}\
    <call>{{ c['id'] }} {{ c['function']['name'] }} {{ c['function']['arguments'] }}</call>{%- endfor -%}<|im_end|>{%- endfor -%}\
    {%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}";

fn read(encoder: &ChatEncoder, record: &Value) -> Result<(String, String, Vec<String>), String> {
    let conversation = encoder.parse(record.to_string().as_bytes()).map_err(|error| error.to_string())?;
    let learned = learned_of(encoder, &conversation).map_err(|error| error.to_string())?;
    let weighted_tokens = encoder.weighted_tokens(&conversation).unwrap();
    let specials = Tokenizer::bytes_chat().specials();
    let mut text = Vec::new();
    for token in weighted_tokens.tokens {
        match specials.iter().find(|(_, id)| *id == token) {
            Some((name, _)) => text.extend(name.bytes()),
            None => text.push(token as u8),
        }
    }
    Ok((String::from_utf8(text).unwrap(), learned, weighted_tokens.unread))
}

#[test]
fn every_field_of_a_message_reaches_the_template() {
    let encoder = encoder(TOOLS);
    let mut record = json!({
        "id": 7,
        "tools": [{"type": "function", "function": {"name": "w"}}],
        "messages": [
            {"role": "user", "name": "Ada", "content": "Weather?", "time": "noon"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "w:0", "type": "function", "function": {"name": "w", "arguments": "{\"town\":\"Celle\"}"}}]},
            {"role": "tool", "tool_call_id": "w:0", "content": "7"},
            {"role": "assistant", "reasoning_content": "it says 7", "content": "Seven."}],
    });
    let (text, learned, unread) = read(&encoder, &record).unwrap();
    assert_eq!(
        text,
        "<|im_system|>tool_declare<|im_middle|>[{\"type\": \"function\", \"function\": {\"name\": \"w\"}}]<|im_end|>\
         <|im_user|>Ada<|im_middle|>Weather?<|im_end|><|im_assistant|>assistant<|im_middle|><call>w:0 w {\"town\":\"Celle\"}\
         </call><|im_end|><|im_system|>tool<|im_middle|>## Return of w:0: 7<|im_end|><|im_assistant|>assistant<|im_middle|>\
         <think>it says 7</think>Seven.<|im_end|>"
    );
    assert_eq!(learned, "<call>w:0 w {\"town\":\"Celle\"}</call><|im_end|>|<think>it says 7</think>Seven.<|im_end|>");
    assert_eq!(unread, ["id", "messages[].time"]);
    // Null content as OpenAI writes it with tool calls, reasoning under another name, tools and calls as strings of JSON.
    for content in [json!(null), json!("")] {
        record["messages"][1]["content"] = content;
        assert_eq!(read(&encoder, &record).unwrap(), (text.clone(), learned.clone(), unread.clone()));
    }
    record["messages"][1].as_object_mut().unwrap().remove("content");
    let thought = record["messages"][3].as_object_mut().unwrap().remove("reasoning_content").unwrap();
    record["messages"][3]["reasoning"] = thought;
    record["tools"] = record["tools"].to_string().into();
    record["messages"][1]["tool_calls"] = record["messages"][1]["tool_calls"].to_string().into();
    assert_eq!(read(&encoder, &record).unwrap(), (text.clone(), learned.clone(), unread.clone()));
    // Nulls count as absent.
    record["documents"] = Value::Null;
    record["conversations"] = Value::Null;
    for message in record["messages"].as_array_mut().unwrap() {
        for name in ["name", "tool_calls", "reasoning_content", "function_call", "weight"] {
            message.as_object_mut().unwrap().entry(name).or_insert(Value::Null);
        }
    }
    assert_eq!(read(&encoder, &record).unwrap(), (text, learned, unread));
}

/// A call that the template does not write would be learned as an empty answer. If the message also has text, the call is
/// only reported.
#[test]
fn a_call_that_the_template_does_not_write_is_refused() {
    let encoder = encoder(&CHATML.replace("m.content", "(m.content or '')"));
    let call = json!([{"type": "function", "function": {"name": "w", "arguments": {}}}]);
    let record_with = |content: Value| json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content, "tool_calls": call}]});
    for content in [json!(""), json!(null)] {
        let error = read(&encoder, &record_with(content)).unwrap_err();
        let expected = "message 2 has only tool calls, and the chat template does not read `tool_calls`";
        assert_eq!(error, expected);
    }
    assert_eq!(read(&encoder, &record_with("I look".into())).unwrap().2, ["messages[].tool_calls"]);
    let thinks = json!({"messages": [{"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "reasoning_content": "so"}]});
    assert_eq!(
        read(&encoder, &thinks).unwrap_err(),
        "message 2 has only reasoning, and the chat template does not read `reasoning_content`"
    );
    let nothing =
        json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": null, "id": 3}]});
    assert_eq!(read(&encoder, &nothing).unwrap_err(), "`messages[1]` has no content");
}

#[test]
fn sharegpt_is_converted_to_openais_format() {
    let encoder = encoder(TOOLS);
    let tools = "[{\"name\": \"w\", \"description\": \"d\"}]";
    let record = json!({
        "system": "S",
        "tools": tools,
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": "{\"name\": \"w\", \"arguments\": {\"town\": \"Celle\"}}"},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "Seven."}],
    });
    let (text, learned, unread) = read(&encoder, &record).unwrap();
    assert_eq!(
        text,
        "<|im_system|>tool_declare<|im_middle|>[{\"type\": \"function\", \"function\": {\"name\": \"w\", \"description\": \"d\"}}]\
         <|im_end|><|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>Weather?<|im_end|>\
         <|im_assistant|>assistant<|im_middle|><call> w {'town': 'Celle'}</call><|im_end|><|im_system|>tool<|im_middle|>\
         ## Return of : 7<|im_end|><|im_assistant|>assistant<|im_middle|>Seven.<|im_end|>"
            .replace("Return of :", "Return of None:")
    );
    assert_eq!(learned, "<call> w {'town': 'Celle'}</call><|im_end|>|Seven.<|im_end|>");
    assert!(unread.is_empty(), "{unread:?}");
    let record_with = |from: &str, value: &str| json!({"conversations": [{"from": "human", "value": "Q"}, {"from": from, "value": value}]});
    assert!(
        read(&encoder, &record_with("function_call", "<think>so</think>\n[{\"name\": \"a\"}, {\"name\": \"b\"}]"))
            .unwrap()
            .1
            .starts_with("<think>so</think><call> a </call><call> b </call>")
    );
    let error = read(&encoder, &record_with("function_call", "w(1)")).unwrap_err();
    assert!(error.starts_with("`conversations[1]` is a call that is not JSON"), "{error}");
    // A system message of the conversation takes precedence over that of the record, which is reported.
    let mut both = record_with("gpt", "A");
    both["system"] = "other".into();
    both["conversations"].as_array_mut().unwrap().insert(0, json!({"from": "system", "value": "S"}));
    let (text, _, unread) = read(&encoder, &both).unwrap();
    assert!(text.starts_with("<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>"), "{text}");
    assert_eq!(unread, ["system"]);
    // A template without tools does not know the role of a tool's result.
    let plain = moonlight_encoder();
    assert!(read(&plain, &record).unwrap_err().contains("unknown role `observation`"));
}

fn moonlight_encoder() -> ChatEncoder {
    encoder(MOONLIGHT_TEMPLATE)
}

#[test]
fn a_system_prompt_of_the_record_becomes_the_first_message() {
    for key in ["messages", "conversations"] {
        let record = json!({"system": "Answer in one word.", key: [
            {"role": "user", "content": "Capital of Spain?"}, {"role": "assistant", "content": "Madrid."}]});
        let (text, learned, unread) = read(&moonlight_encoder(), &record).unwrap();
        assert!(text.starts_with("<|im_system|>system<|im_middle|>Answer in one word.<|im_end|>"), "{text}");
        assert_eq!((learned.as_str(), unread.len()), ("Madrid.<|im_end|>", 0));
    }
}

#[test]
fn turns_with_a_weight_of_zero_are_not_learned() {
    let record_with = |mark: Value| {
        let mut old = json!({"role": "assistant", "content": "old"});
        old.as_object_mut().unwrap().extend(mark.as_object().unwrap().clone());
        json!({"messages": [{"role": "user", "content": "Q"}, old, {"role": "user", "content": "R", "train": false},
            {"role": "assistant", "content": "new", "train": true, "loss_mask": 1}]})
    };
    for mark in [
        json!({"train": false}),
        json!({"training": false}),
        json!({"loss_mask": 0}),
        json!({"weight": 0}),
        json!({"loss": false}),
        json!({"train": false, "weight": 1}),
        json!({"train": false, "loss_mask": 0}),
    ] {
        let (_, learned, unread) = read(&moonlight_encoder(), &record_with(mark.clone())).unwrap();
        assert_eq!((learned.as_str(), unread.len()), ("new<|im_end|>", 0), "{mark}");
    }
    let (_, learned, _) = read(&moonlight_encoder(), &record_with(json!({"train": null, "weight": null}))).unwrap();
    assert_eq!(learned, "old<|im_end|>|new<|im_end|>");
    let detail = record_with(json!({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": false}]}));
    assert!(read(&moonlight_encoder(), &detail).unwrap_err().contains("`messages[1]` has `train_detail`"));
    let mut user = record_with(json!({}));
    user["messages"][0]["train"] = true.into();
    let error = read(&moonlight_encoder(), &user).unwrap_err();
    assert!(error.contains("`messages[0]` is marked as learned by `train`"), "{error}");
}

#[test]
fn only_the_completion_of_a_prompt_is_learned() {
    let record = json!({
        "prompt": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R"}],
        "completion": [{"role": "assistant", "content": "B"}],
    });
    let (text, learned, _) = read(&moonlight_encoder(), &record).unwrap();
    assert!(text.contains("A<|im_end|>"), "{text}");
    assert_eq!(learned, "B<|im_end|>");
    for (key, value, problem) in [
        ("chosen", json!([{"role": "assistant", "content": "B"}]), "a preference record (it has `chosen`)"),
        ("rejected", json!([{"role": "assistant", "content": "C"}]), "a preference record (it has `rejected`)"),
        ("label", json!(false), "a preference record (it has `label`)"),
        ("prompt", json!("Q"), "`prompt` is a string, not a list of messages"),
    ] {
        let mut other = record.clone();
        other[key] = value;
        let error = read(&moonlight_encoder(), &other).unwrap_err();
        assert!(error.contains(problem), "{error}");
    }
    // With `messages`, the preference fields are only reported.
    let both = json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        "chosen": [{"role": "assistant", "content": "A"}], "prompt": "Q"});
    assert_eq!(read(&moonlight_encoder(), &both).unwrap().2, ["chosen", "prompt"]);
}

#[test]
fn nulls_and_empty_lists_count_as_absent() {
    let expected = read(
        &moonlight_encoder(),
        &json!({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}),
    )
    .unwrap();
    for record in [
        json!({"messages": null, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
            "instruction": null}),
        json!({"messages": [], "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}),
        json!({"conversations": [{"role": null, "content": null, "from": "human", "value": "Q"},
            {"role": null, "content": null, "from": "gpt", "value": "A"}]}),
        json!({"conversations": [{"role": "user", "content": "Q", "from": null, "value": null},
            {"role": "assistant", "content": "A", "from": "assistant", "value": "A"}]}),
        json!({"conversations": null, "instruction": "Q", "input": null, "output": "A", "history": null, "system": null}),
    ] {
        assert_eq!(read(&moonlight_encoder(), &record).unwrap(), expected, "{record}");
    }
    let differ =
        json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "value": "B"}]});
    let error = read(&moonlight_encoder(), &differ).unwrap_err();
    assert_eq!(error, "`messages[1]` has both `content` and `value`, and they differ");
}

#[test]
fn content_parts_are_joined_where_the_template_does_not_handle_lists() {
    let parts = json!([{"type": "text", "text": "a", "image_url": null}, {"type": "text", "text": "<|im_end|>b"}]);
    let record = json!({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]});
    // The first template would print the list, the second would fail.
    for text in [MOONLIGHT_TEMPLATE, CHATML] {
        let (text, learned, _) = read(&encoder(text), &record).unwrap();
        assert!(text.contains("a<|im_end|>b<|im_end|>") && !text.contains('['), "{text}");
        assert_eq!(learned, "a<|im_end|>b<|im_end|>");
    }
    let takes = "{% for m in messages %}<|im_user|>{{ m.role }}<|im_middle|>{% if m.content is string %}{{ m.content }}{% else %}\
        {% for p in m.content %}{% if 'image_url' in p %}IMAGE{% endif %}({{ p.text }}){% endfor %}{% endif %}<|im_end|>{% endfor %}\
        {% if add_generation_prompt %}<|im_user|>assistant<|im_middle|>{% endif %}";
    let (text, learned, _) = read(&encoder(takes), &record).unwrap();
    assert!(text.contains("<|im_middle|>(a)(<|im_end|>b)<|im_end|>"), "{text}");
    assert_eq!(learned, "(a)(<|im_end|>b)<|im_end|>");
    let mut image = record.clone();
    image["messages"][0]["content"][0] = json!({"type": "image_url", "image_url": {"url": "x"}});
    let error = read(&encoder(takes), &image).unwrap_err();
    assert_eq!(error, "`messages[0]` has a part of the type `image_url`, and only text is supported");
}

#[test]
fn fields_that_the_template_reads_are_variables() {
    let text = "{{ mode | default('none') }}{{ tools is defined }}{{ tools is none }}{{ documents is none }}"
        .to_owned()
        + CHATML;
    let read_with = |more: Value| {
        let mut record = json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        read(&encoder(&text), &record)
    };
    let (plain, _, _) = read_with(json!({})).unwrap();
    assert!(plain.starts_with("noneTrueTrueTrue<"), "{plain}");
    for more in [json!({"mode": "fast"}), json!({"chat_template_kwargs": {"mode": "fast"}})] {
        let (text, learned, unread) = read_with(more).unwrap();
        assert!(text.starts_with("fastTrueTrueTrue<"), "{text}");
        assert_eq!((learned.as_str(), unread.len()), ("A<|im_end|>", 0));
    }
    let given = |more: Value| {
        let mut record = json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "tools": [], "other": 1});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let encoder = encoder(&text);
        encoder.weighted_tokens(&encoder.parse(record.to_string().as_bytes()).unwrap()).unwrap().given
    };
    assert_eq!(given(json!({"mode": "fast"})), ["mode"]);
    assert!(given(json!({"chat_template_kwargs": {"mode": "fast"}})).is_empty());
    assert_eq!(
        read_with(json!({"chat_template_kwargs": {"other": 1}, "other": 2, "add_generation_prompt": true})).unwrap().2,
        ["chat_template_kwargs.other", "other", "add_generation_prompt"]
    );
    for name in ["messages", "tools", "bos_token", "add_generation_prompt", "moonlight_generation_begin"] {
        let error = read_with(json!({"chat_template_kwargs": {name: "x"}})).unwrap_err();
        assert_eq!(error, format!("`chat_template_kwargs` sets the reserved variable `{name}`"));
    }
    assert_eq!(read_with(json!({"documents": ["x"]})).unwrap_err(), "`documents` is not a list of objects");
    assert_eq!(read_with(json!({"tools": "x"})).unwrap_err(), "`tools` is a string that is not JSON");
    assert_eq!(read_with(json!({"tools": {"a": 1}})).unwrap_err(), "`tools` is not a list of tools");
    let (text, ..) = read_with(json!({"tools": ""})).unwrap();
    assert!(text.contains("TrueTrueTrue"));
}

/// The expected values are those of Python 3.11's `json.dumps` and `str`.
#[test]
fn integers_reach_the_template_digit_by_digit() {
    let text =
        CHATML.replace("m.content", "m.content ~ (m.n.a | tojson if m.n is defined) ~ (m.n.a if m.n is defined)");
    let encoder = encoder(&text);
    let answer = |digits: &str, name: &str| {
        let record = format!(
            r#"{{"id": {0}, "messages": [{{"role": "user", "content": "Q"}}, {{"role": "assistant", "content": "A", "{name}":
                {{"a": {0}}}}}]}}"#,
            digits
        );
        let conversation = encoder.parse(record.as_bytes()).unwrap();
        learned_of(&encoder, &conversation).map_err(|error| error.to_string())
    };
    for digits in [
        "12345678901234567890123",
        "-9223372036854775809",
        "18446744073709551616",
        "340282366920938463463374607431768211455",
    ] {
        assert_eq!(answer(digits, "n").unwrap(), format!("A{digits}{digits}<|im_end|>"));
    }
    assert_eq!(answer("-0", "n").unwrap(), "A00<|im_end|>");
    assert_eq!(answer("1E400", "n").unwrap(), "AInfinityinf<|im_end|>");
    let long = "7".repeat(400);
    assert_eq!(answer(&long, "other").unwrap(), "A<|im_end|>");
    let error = answer(&long, "n").unwrap_err();
    assert!(error.contains("an integer has 400 digits"), "{error}");
    // Also in strings of JSON.
    let record = json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "",
        "tool_calls": "[{\"id\": 1, \"function\": {\"name\": \"w\", \"arguments\": 12345678901234567890123}}]"}]});
    let learned = read(&super::encoder(TOOLS), &record).unwrap().1;
    assert_eq!(learned, "<call>1 w 12345678901234567890123</call><|im_end|>");
}

/// Messages may contain private-use characters: Apple's fonts have symbols from U+100000 on.
#[test]
fn private_use_characters_of_messages_are_kept() {
    let words = "x\u{100000}y\u{10fffa}z\u{10fff0}\u{10fff7}<|im_end|>\u{100005}\u{e000}\u{f0001}\u{f1af0}\u{ffffd}\u{10fffd}\u{100fff}";
    let record = json!({"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": words}]});
    for text in [MOONLIGHT_TEMPLATE, CHATML] {
        let (text, learned, _) = read(&encoder(text), &record).unwrap();
        assert_eq!(text.matches(words).count(), 2, "{text}");
        assert_eq!(learned, format!("{words}<|im_end|>"));
    }
    let record = json!({"messages": [{"role": "user", "content": "\u{f8001}"}, {"role": "assistant", "content": "A"}]});
    let error = read(&moonlight_encoder(), &record).unwrap_err();
    assert!(error.starts_with("the conversation contains the character U+F8001"), "{error}");
}

/// A special token that is spelled in a message is text, whatever the field.
#[test]
fn special_tokens_spelled_in_any_field_are_text() {
    let encoder = encoder(TOOLS);
    let end = "<|im_end|>";
    let record = json!({
        "tools": [{"type": "function", "function": {"name": end, "parameters": {end: [end, {"x": end}]}}}],
        "messages": [
            {"role": "user", "name": end, "content": end},
            {"role": "assistant", "content": end, "reasoning_content": end, "tool_calls": [
                {"id": end, "function": {"name": end, "arguments": {end: end, "y": [end]}}}]},
            {"role": "tool", "tool_call_id": end, "content": {end: end}},
            {"role": "assistant", "content": "A"}],
    });
    let conversation = encoder.parse(record.to_string().as_bytes()).unwrap();
    let weighted_tokens = encoder.weighted_tokens(&conversation).unwrap();
    // One for the tool declaration, and one for each of the four messages.
    assert_eq!(weighted_tokens.tokens.iter().filter(|&&token| token == 0xF5).count(), 5);
    let text: Vec<u8> = weighted_tokens.tokens.iter().map(|&token| token as u8).collect();
    assert_eq!(text.windows(end.len()).filter(|window| *window == end.as_bytes()).count(), 16);
}

/// The template drops the reasoning of earlier turns; its generation prompt may open a reasoning block.
#[test]
fn turns_that_are_rewritten_are_learned_as_they_are_written() {
    let reasons = "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}\
        {%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}<|im_user|>{{ m.role }}<|im_middle|>\
        {%- if m.reasoning_content and loop.index0 > ns.last -%}<think>\n{{ m.reasoning_content }}\n</think>\n{%- endif -%}\
        {{- m.content -}}{%- for c in m.tool_calls -%}<call>{\"name\": \"{{ c.function.name }}\", \"arguments\": \
        {{ c.function.arguments | tojson }}}</call>{%- endfor -%}<|im_end|>\n{%- endfor -%}\
        {%- if add_generation_prompt -%}<|im_user|>assistant<|im_middle|>{%- endif -%}";
    let call = json!([{"function": {"name": "w", "arguments": {"n": 3, "town": "Celle", "x": 1.5e-7}}}]);
    let record = json!({"messages": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "reasoning_content": "first", "tool_calls": call},
        {"role": "user", "content": "R"},
        {"role": "assistant", "content": "", "reasoning_content": "second", "tool_calls": call},
    ]});
    let learned_with = |text: &str| read(&encoder(text), &record).unwrap().1;
    let written =
        "<call>{\"name\": \"w\", \"arguments\": {\"n\": 3, \"town\": \"Celle\", \"x\": 1.5e-07}}</call><|im_end|>";
    assert_eq!(learned_with(reasons), format!("{written}|<think>\nsecond\n</think>{written}"));
    // The prompt opens a reasoning block, which no earlier turn has.
    let opens = reasons.replace("<|im_user|>assistant<|im_middle|>", "<|im_user|>assistant<|im_middle|><think>\n");
    assert_eq!(learned_with(&opens), format!("{written}|\nsecond\n</think>{written}"));
    let never = opens.replace("loop.index0 > ns.last", "false");
    assert_eq!(learned_with(&never), format!("{written}|{written}"));
}

#[test]
fn patterns_find_the_spans_of_turns_with_tool_calls() {
    let mut messages = Vec::new();
    for index in 0..60 {
        messages.push(json!({"role": "user", "content": format!("Q{index}")}));
        messages.push(match index % 3 {
            0 => json!({"role": "assistant", "content": "", "tool_calls": [{"id": format!("c{index}"),
                "function": {"name": "w", "arguments": format!("{{\"n\": {index}}}")}}]}),
            1 => json!({"role": "assistant", "content": format!("A{index}"), "reasoning_content": "so"}),
            _ => json!({"role": "assistant", "content": format!(" B{index}\n")}),
        });
    }
    let encoder = encoder(TOOLS);
    let record = json!({ "messages": messages });
    let conversation = encoder.parse(record.to_string().as_bytes()).unwrap();
    let input = encoder.core().template_input(conversation.messages().iter(), Map::new()).unwrap();
    let (finder, turns) = (encoder.core().finder(), assistant_turns(&input));
    assert!(turns.len() > MAX_EXACT_TURNS);
    let text = finder.template.render_input(&input, &input.values, false, ["", ""]).unwrap();
    let regions = finder.regions(&input, input.messages.len(), &text);
    let each = finder.exact_spans(&input, &turns, &text, &regions).unwrap();
    assert_eq!(finder.spans_by_pattern(&input, &turns, &text, &regions).unwrap(), Some(each));
}

#[test]
fn several_generation_blocks_of_a_turn_need_equal_weights() {
    let text = "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content %}<|im_user|>{% generation %}\
        {% set x = 'in' %}{{ m.reasoning_content }}{% endgeneration %}{{ x }}{% endif %}<|im_middle|>{% generation %}{{ m.content }}\
        {% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}";
    let mut record = json!({"messages": [{"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "reasoning_content": "so"}, {"role": "user", "content": "R"},
        {"role": "assistant", "content": "B"}]});
    assert_eq!(read(&encoder(text), &record).unwrap().1, "so|A|B");
    record["messages"][1]["weight"] = 0.into();
    let error = read(&encoder(text), &record).unwrap_err();
    assert!(error.contains("3 `{% generation %}` blocks for 2 assistant messages"), "{error}");
}

#[test]
fn the_template_named_tool_use_renders_conversations_with_tools() {
    let dir = tempfile::tempdir().unwrap();
    let config =
        json!({"chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]});
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    fs::write(dir.path().join("special_tokens_map.json"), json!({"bos_token": {"content": "<s>"}}).to_string())
        .unwrap();
    let template = ChatTemplate::from_model_dir(dir.path(), &Tokenizer::bytes_chat()).unwrap();
    assert!(template.fingerprint().contains("tool_declare") && template.fingerprint().contains("<s>"));
    let encoder = ChatEncoder::new(template, Tokenizer::bytes_chat());
    let mut record = json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]});
    assert!(read(&encoder, &record).unwrap().0.starts_with("<|im_middle|>user\nQ"));
    record["tools"] = json!([{"type": "function"}]);
    assert!(read(&encoder, &record).unwrap().0.starts_with("<|im_system|>tool_declare"));
}
