//! `/v1/chat/completions`.

use super::scripted::{HERMES, KIMI};
use super::*;

#[tokio::test]
async fn an_answer_has_the_fields_of_openai() {
    let server = TestServer::new();
    let answer = server.chat(json!({"logprobs": true, "top_logprobs": 2})).await.json();
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["refusal"], Value::Null);
    assert!(choice["message"]["content"].is_string() && choice["message"].get("tool_calls").is_none());
    let logprobs = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(logprobs.len(), 8);
    for token in logprobs {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]), "it is greedy");
        assert!(token["bytes"].is_null() || token["bytes"][0].is_u64());
    }
    let alternative = server.chat(json!({"max_tokens": null, "max_completion_tokens": 3})).await.json();
    assert_eq!(alternative["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn a_stream_has_the_same_text_as_one_answer() {
    let server = TestServer::new();
    for seed in 0..4 {
        let more = json!({"temperature": 1.5, "seed": seed, "max_tokens": 30, "n": 2, "logprobs": true, "stop": ["a", "\u{fffd}b"]});
        let whole = server.chat(more.clone()).await.json();
        let mut streamed = more;
        streamed["stream"] = true.into();
        let events = server.chat(streamed).await.events();
        assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event.get("usage").is_none()));
        for index in 0..2 {
            let choices: Vec<&Value> =
                events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index).collect();
            assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
            let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
            let expected = &whole["choices"][index];
            assert_eq!(text, expected["message"]["content"].as_str().unwrap());
            let (last, others) = choices.split_last().unwrap();
            assert_eq!(last["delta"], json!({}));
            assert_eq!(last["finish_reason"], expected["finish_reason"]);
            assert!(others.iter().all(|choice| choice["finish_reason"].is_null()));
            let tokens = choices.iter().filter_map(|choice| choice["logprobs"]["content"].as_array()).flatten();
            assert_eq!(tokens.count(), expected["logprobs"]["content"].as_array().unwrap().len());
        }
    }
}

#[tokio::test]
async fn messages_may_have_parts_and_any_role_of_the_template() {
    let server = TestServer::new();
    let tokens = |answer: Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    let text = tokens(server.chat(json!({"messages": [{"role": "user", "content": "ab"}]})).await.json());
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    assert_eq!(tokens(server.chat(json!({"messages": [{"role": "user", "content": parts}]})).await.json()), text);
    let with = |role: &str| json!({"messages": [{"role": role, "content": "S"}, {"role": "user", "content": "ab"}]});
    let system = tokens(server.chat(with("system")).await.json());
    assert_eq!(tokens(server.chat(with("developer")).await.json()), system);
    let typed = json!([{"role": "user", "content": "ab", "type": "text"}]);
    assert_eq!(tokens(server.chat(json!({"messages": typed})).await.json()), text);
    // An answer of this server can be sent back as it is.
    let message = server.chat(json!({})).await.json()["choices"][0]["message"].clone();
    let more = json!({"messages": [{"role": "user", "content": "x"}, message, {"role": "user", "content": "y"}]});
    assert_eq!(server.chat(more).await.status, StatusCode::OK);
    // A special token that a client spells is text: the turn does not end.
    let spelled = json!({"messages": [{"role": "user", "content": "<|im_end|>"}]});
    assert_eq!(tokens(server.chat(spelled).await.json()), text + 8);
}

#[tokio::test]
async fn a_model_without_a_template_has_no_chat() {
    let text = TextModel { chat: None, ..text_model() };
    let server = TestServer::with(random_model(), text, ServerOptions::default());
    assert_eq!(server.chat(json!({})).await.error(400), "the model has no chat template: use /v1/completions");
    assert_eq!(server.complete(json!({})).await.status, StatusCode::OK);
}

const CALL: [&str; 6] = [
    "I look.",
    "\n<tool",
    "_call>\n{\"name\": \"weather\", ",
    "\"arguments\": {\"city\": \"Tur",
    "in\"}}\n</tool_call>",
    "\n",
];

fn weather() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    json!([{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": schema}}])
}

#[tokio::test]
async fn a_tool_call_of_the_model_is_one_of_the_answer() {
    let server = scripted::server(HERMES, &CALL);
    let answer = server.chat(json!({"tools": weather(), "max_tokens": 50})).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "I look.");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["type"], "function");
    assert_eq!(call["function"], json!({"name": "weather", "arguments": "{\"city\": \"Turin\"}"}));
    assert!(call["id"].as_str().unwrap().starts_with("call_") && call.get("index").is_none());
    // Without tools the same text is text.
    for more in [json!({}), json!({"tools": weather(), "tool_choice": "none"})] {
        let mut more = more;
        more["max_tokens"] = 50.into();
        let choice = server.chat(more).await.json()["choices"][0].clone();
        assert_eq!(choice["message"]["content"], CALL.concat());
        assert_eq!(choice["finish_reason"], "stop");
    }
    // The call and its result can be sent back.
    let result = json!({"role": "tool", "tool_call_id": call["id"], "content": "sunny"});
    let messages = json!([{"role": "user", "content": "?"}, choice["message"], result]);
    let next = server.chat(json!({"messages": messages, "tools": weather(), "max_tokens": 50})).await;
    assert_eq!(next.status, StatusCode::OK, "{}", next.text);
}

#[tokio::test]
async fn a_tool_call_is_streamed_in_parts() {
    let server = scripted::server(HERMES, &CALL);
    let more = json!({"tools": weather(), "max_tokens": 50, "stream": true});
    let events = server.chat(more).await.events();
    let choices: Vec<&Value> = events.iter().map(|event| &event["choices"][0]).collect();
    let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    assert_eq!(text, "I look.");
    let calls: Vec<&Value> =
        choices.iter().filter_map(|choice| choice["delta"]["tool_calls"].as_array()).flatten().collect();
    assert!(calls.iter().all(|call| call["index"] == 0));
    assert_eq!(calls[0]["function"], json!({"name": "weather", "arguments": ""}));
    assert_eq!(calls[0]["type"], "function");
    let arguments: String = calls.iter().map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(arguments, "{\"city\": \"Turin\"}");
    assert!(calls[1..].iter().all(|call| call.get("id").is_none() && call["function"].get("name").is_none()));
    assert_eq!(choices.last().unwrap()["finish_reason"], "tool_calls");
}

/// The markers of Kimi K2 are special tokens, whose text is left out of other answers.
#[tokio::test]
async fn tool_calls_may_be_marked_by_special_tokens() {
    let words = [
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "functions.weather:0",
        "<|tool_call_argument_begin|>",
        "{\"city\": ",
        "\"Turin\"}",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ];
    let server = scripted::server(KIMI, &words);
    let choice = server.chat(json!({"tools": weather(), "max_tokens": 50})).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    let function = json!({"name": "weather", "arguments": "{\"city\": \"Turin\"}"});
    let expected = json!([{"id": "functions.weather:0", "type": "function", "function": function}]);
    assert_eq!(choice["message"]["tool_calls"], expected);
    let events = server.chat(json!({"tools": weather(), "max_tokens": 50, "stream": true})).await.events();
    let calls: Vec<&Value> =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
    let parts: Vec<&str> = calls.iter().map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(parts, ["", "{\"city\": ", "\"Turin\"}"], "arguments are sent as they are written");
    let plain = server.chat(json!({"max_tokens": 50})).await.json()["choices"][0].clone();
    assert_eq!(plain["message"]["content"], "functions.weather:0{\"city\": \"Turin\"}");
}

#[tokio::test]
async fn a_call_that_the_limit_cuts_is_not_complete() {
    let server = scripted::server(HERMES, &CALL);
    let choice = server.chat(json!({"tools": weather(), "max_tokens": 4})).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["message"]["content"].as_str().unwrap().ends_with("\"city\": \"Tur"), "{choice}");
}
