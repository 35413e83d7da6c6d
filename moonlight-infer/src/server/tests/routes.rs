//! Routes that do not generate, guards, and errors of every kind.

use super::*;

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let server = TestServer::new();
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!((model["id"].as_str(), model["object"].as_str()), (Some("tiny"), Some("model")));
    assert!(model["created"].as_u64().unwrap() > 1_700_000_000 && model["owned_by"].is_string());
    assert_eq!(server.get("/v1/models/tiny").await.json(), *model);
    assert_eq!(server.get("/v1/models/org/other").await.error(404), "there is no model `org/other`");
    server.engine.set_model("org/other", random_model()).unwrap();
    assert_eq!(server.get("/v1/models/org/other").await.json()["id"], "org/other");
    let unknown = server.chat(json!({"model": "gpt-4"})).await;
    assert_eq!(unknown.error(404), "there is no model `gpt-4`");
    assert_eq!(unknown.json()["error"]["code"], "model_not_found");
    assert_eq!(unknown.json()["error"]["param"], "model");
}

#[tokio::test]
async fn unknown_routes_and_methods_are_json_errors() {
    let server = TestServer::new();
    assert_eq!(server.get("/v1/nothing").await.error(404), "there is no route GET `/v1/nothing`");
    let get = server.get("/v1/completions").await;
    assert_eq!(get.error(405), "`/v1/completions` does not accept GET");
    assert_eq!(get.headers["allow"], "POST");
    assert_eq!(get.headers["x-content-type-options"], "nosniff");
    assert!(get.headers["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
}

#[tokio::test]
async fn health_needs_no_key_and_everything_else_does() {
    let options = ServerOptions { api_keys: vec!["sk-1".into(), "sk-2".into()], ..ServerOptions::default() };
    let server = TestServer::with(random_model(), text_model(), options);
    assert_eq!(server.get("/health").await.json(), json!({"status": "ok"}));
    assert_eq!(server.get("/").await.status, StatusCode::OK);
    for path in ["/v1/models", "/v1/models/tiny", "/metrics", "/nothing"] {
        let answer = server.get(path).await;
        assert_eq!(answer.error(401), "an API key is required: `Authorization: Bearer KEY`", "{path}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    for (key, status) in [("sk-2", 200), ("sk-3", 401)] {
        let request = Request::get("/v1/models").header("authorization", format!("Bearer {key}"));
        assert_eq!(server.send(request.body(Body::empty()).unwrap()).await.status.as_u16(), status, "{key}");
    }
    let refused = server.post("/v1/completions", &json!({"model": "tiny", "prompt": "x"})).await;
    assert_eq!(refused.json()["error"]["code"], "missing_api_key");
}

#[tokio::test]
async fn other_sites_are_refused_unless_they_are_allowed() {
    let allowed = "https://example.org";
    let options = ServerOptions { cors_origins: vec![allowed.into()], ..ServerOptions::default() };
    for (options, origin, status) in [
        (options.clone(), allowed, 200),
        (options.clone(), "https://other.example", 403),
        (ServerOptions::default(), allowed, 403),
        (ServerOptions { only_local_names: false, ..options.clone() }, "https://other.example", 200),
    ] {
        let server = TestServer::with(random_model(), text_model(), options);
        let request = Request::get("/v1/models").header("host", "127.0.0.1:8080").header("origin", origin);
        let answer = server.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status.as_u16(), status);
        let is_allowed = answer.headers.get("access-control-allow-origin").is_some_and(|value| value == origin);
        assert_eq!(is_allowed, origin == allowed && status == 200);
    }
    let server = TestServer::with(random_model(), text_model(), options);
    let preflight = Request::options("/v1/chat/completions")
        .header("host", "localhost:1")
        .header("origin", allowed)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,x-stainless-os");
    let answer = server.send(preflight.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.headers["access-control-allow-headers"], "authorization,content-type,x-stainless-os");
    let rebound = Request::get("/v1/models").header("host", "evil.example:8080").body(Body::empty()).unwrap();
    assert!(server.send(rebound).await.error(403).starts_with("the host `evil.example:8080` is not"));
}

#[tokio::test]
async fn metrics_count_requests_and_tokens() {
    let server = TestServer::new();
    server.complete(json!({})).await.json();
    server.complete(json!({"prompt": 3.5})).await.error(400);
    server.get("/a/path/of/a/client").await;
    // The slot is freed after the last event.
    let mut metrics = server.get("/metrics").await.text;
    while !metrics.contains("moonlight_slots_busy 0") {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        metrics = server.get("/metrics").await.text;
    }
    for line in [
        "moonlight_http_requests_total{route=\"/v1/completions\",status=\"200\"} 1",
        "moonlight_http_requests_total{route=\"/v1/completions\",status=\"400\"} 1",
        "moonlight_http_requests_total{route=\"other\",status=\"404\"} 1",
        "moonlight_slots 2",
        "moonlight_slots_busy 0",
        "moonlight_requests_waiting 0",
        "moonlight_prompt_tokens_computed_total 4",
        "moonlight_prompt_tokens_reused_total 0",
        "moonlight_generated_tokens_total 8",
        "moonlight_sequences_ended_total{reason=\"length\"} 1",
        "moonlight_time_to_first_token_seconds_count 1",
        "moonlight_time_between_tokens_seconds_count 7",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }
    assert!(!metrics.contains("client"));
}

#[tokio::test]
async fn bodies_that_are_not_requests_name_the_problem() {
    let server = TestServer::new();
    for (body, expected) in [
        ("", "the body is not JSON: EOF while parsing a value (line 1, column 0)"),
        ("{\"model\": \"tiny\",}", "the body is not JSON: trailing comma (line 1, column 18)"),
        ("[]", "the body is not a request: invalid type: sequence, expected an object (line 1, column 0)"),
        ("{}", "`model` is missing"),
        ("{\"model\": 3}", "`model` must be a string, and is `3`"),
    ] {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            assert_eq!(server.post_text(path, body).await.error(400), expected);
        }
    }
    let large = server.post_text("/v1/completions", vec![b' '; (8 << 20) + 1]).await;
    assert_eq!(large.error(413), "the body has more than 8388608 bytes");
    let long = "word ".repeat(10_000);
    let expected = |bytes: usize| format!("the prompt has {bytes} bytes, more than {CONTEXT} tokens can have");
    assert_eq!(server.complete(json!({"prompt": long})).await.error(400), expected(long.len()));
    // The texts of all fields of a message count.
    let messages = json!([{"role": "user", "content": long}]);
    assert_eq!(server.chat(json!({"messages": messages})).await.error(400), expected(long.len() + "user".len()));
}

/// Every field that is out of range, unknown or unsupported is an error that names it.
#[tokio::test]
async fn fields_are_checked() {
    let server = TestServer::new();
    let mut list = String::new();
    for (path, field, value) in [
        ("c", "prompt", json!([])),
        ("c", "prompt", json!([[-1]])),
        ("c", "prompt", json!(["a", 3])),
        ("c", "prompt", json!([4_000_000])),
        ("c", "prompt", json!("")),
        ("c", "prompt", json!("x".repeat(300))),
        ("c", "logprobs", json!(21)),
        ("c", "logprobs", json!(true)),
        ("c", "best_of", json!(3)),
        ("c", "suffix", json!("end")),
        ("c", "n", json!(129)),
        ("c", "max_tokens", json!(-1)),
        ("c", "echo", json!("yes")),
        ("c", "temperature", json!(-0.1)),
        ("c", "temperature", json!("hot")),
        ("c", "top_p", json!(1.5)),
        ("c", "top_k", json!(-2)),
        ("c", "min_p", json!(0.1)),
        ("c", "presence_penalty", json!(3)),
        ("c", "repetition_penalty", json!(0)),
        ("c", "logit_bias", json!({"a": 1})),
        ("c", "logit_bias", json!({"5": 101})),
        ("c", "logit_bias", json!({"99999": 1})),
        ("c", "seed", json!(0.5)),
        ("c", "stop", json!("")),
        ("c", "stop", json!(3)),
        ("c", "stop", json!(vec!["x"; 17])),
        ("c", "stream", json!(1)),
        ("c", "stream_options", json!({"include_usage": true})),
        ("c", "guided_json", json!({})),
        ("chat", "messages", json!([])),
        ("chat", "messages", json!("hi")),
        ("chat", "messages", json!([{"content": "x"}])),
        ("chat", "messages", json!([{"role": "robot", "content": "x"}])),
        ("chat", "messages", json!([{"role": "user"}])),
        ("chat", "messages", json!([{"role": "user", "content": 3}])),
        ("chat", "messages", json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
        ("chat", "messages", json!([{"role": "user", "content": [{"type": "text"}]}])),
        ("chat", "messages", json!([{"role": "user", "content": "x", "name": "Ada"}])),
        ("chat", "messages", json!([{"role": "user", "content": "x", "tool_calls": [{}]}])),
        (
            "chat",
            "messages",
            json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
        ),
        ("chat", "messages", json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}])),
        ("chat", "top_logprobs", json!(3)),
        ("chat", "max_tokens", json!(0)),
        ("chat", "response_format", json!({"type": "json_object"})),
        ("chat", "modalities", json!(["text", "audio"])),
        ("chat", "tools", json!([{"type": "function", "function": {"name": "f"}}])),
        ("chat", "tools", json!([{"type": "custom"}])),
        ("chat", "tools", json!([{"type": "function", "function": {"name": "f", "strict": true}}])),
        ("chat", "tool_choice", json!("required")),
        ("chat", "parallel_tool_calls", json!(false)),
        ("chat", "functions", json!([{"name": "f"}])),
        ("chat", "reasoning_effort", json!("high")),
        ("chat", "chat_template_kwargs", json!({"enable_thinking": false})),
        ("chat", "chat_template_kwargs", json!({"messages": []})),
        ("chat", "prompt", json!("x")),
    ] {
        let body = json!({field: value});
        let answer = if path == "c" { server.complete(body).await } else { server.chat(body).await };
        let message = answer.error(400);
        let (param, code) = (answer.json()["error"]["param"].clone(), answer.json()["error"]["code"].clone());
        list.push_str(&format!("{field}: {message}\n    param {param}, code {code}\n"));
    }
    insta::assert_snapshot!(list);
}

#[tokio::test]
async fn fields_without_effect_are_accepted() {
    let server = TestServer::new();
    let expected = server.chat(json!({})).await.json()["choices"][0]["message"].clone();
    let neutral = json!({
        "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "response_format": {"type": "text"},
        "tools": null, "tool_choice": "none", "parallel_tool_calls": true, "logit_bias": {}, "stop": null, "n": 1,
        "modalities": ["text"], "top_k": -1, "repetition_penalty": 1.0, "presence_penalty": 0, "seed": 5,
    });
    let answer = server.chat(neutral).await.json();
    assert_eq!(answer["choices"][0]["message"], expected);
}

#[tokio::test]
async fn a_server_that_ends_refuses_requests() {
    let server = TestServer::new();
    server.engine.shut_down().await;
    let refused = server.complete(json!({})).await;
    assert_eq!(refused.error(503), "the engine is shutting down");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(server.get("/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
}

/// The texts of all errors with their status, type, param and code.
#[test]
fn messages_of_errors() {
    use super::super::error::{ApiError, ServerError};
    use crate::engine::EngineError;
    use axum::http::Method;
    let errors = [
        ApiError::Json { problem: "not JSON: expected value".into(), line: 1, column: 2 },
        ApiError::TooManyValues { limit: 131_072 },
        ApiError::field("n", "must be an integer, and is `\"x\"`"),
        ApiError::Missing { name: "model" },
        ApiError::UnknownField { name: "temprature".into() },
        ApiError::Unsupported { name: "audio".into(), reason: None },
        ApiError::unsupported("audio", "the model only writes text"),
        ApiError::Messages { problem: "the chat template does not accept this conversation: no".into() },
        ApiError::Prompt { problem: "the tokenizer cannot encode it".into() },
        ApiError::NoChatTemplate,
        ApiError::PromptTooLarge { bytes: 8_000_000, context: 4096 },
        ApiError::Engine(EngineError::UnknownModel("gpt-4".into())),
        ApiError::Engine(EngineError::PromptTooLong { tokens: 9000, context: 4096 }),
        ApiError::Engine(EngineError::EmptyPrompt),
        ApiError::Engine(EngineError::QueueFull { waiting: 64 }),
        ApiError::Engine(EngineError::ShuttingDown),
        ApiError::Engine(EngineError::OutOfTime { limit: std::time::Duration::from_secs(60) }),
        ApiError::Engine(EngineError::NonFinite { token: 3, value: "NaN".into() }),
        ApiError::NoRoute { method: Method::GET, path: "/x".into() },
        ApiError::NoMethod { method: Method::GET, path: "/v1/completions".into() },
        ApiError::Key { given: false },
        ApiError::Key { given: true },
        ApiError::Host { host: "evil.example".into() },
        ApiError::Origin { origin: "https://evil.example".into() },
        ApiError::BodyTooLarge { limit: 1024 },
        ApiError::Body { problem: "the connection was closed".into() },
        ApiError::SlowBody { seconds: 60 },
        ApiError::TooManyBodies,
        ApiError::Internal { problem: "a panic".into() },
    ];
    // A new variant does not compile here: add an example of it above.
    let is_covered = |error: &ApiError| match error {
        ApiError::Json { .. }
        | ApiError::TooManyValues { .. }
        | ApiError::Field { .. }
        | ApiError::Missing { .. }
        | ApiError::UnknownField { .. }
        | ApiError::Unsupported { .. }
        | ApiError::Messages { .. }
        | ApiError::Prompt { .. }
        | ApiError::NoChatTemplate
        | ApiError::PromptTooLarge { .. }
        | ApiError::Engine(_)
        | ApiError::NoRoute { .. }
        | ApiError::NoMethod { .. }
        | ApiError::Key { .. }
        | ApiError::Host { .. }
        | ApiError::Origin { .. }
        | ApiError::BodyTooLarge { .. }
        | ApiError::Body { .. }
        | ApiError::SlowBody { .. }
        | ApiError::TooManyBodies
        | ApiError::Internal { .. } => true,
    };
    assert!(errors.iter().all(is_covered));
    let lines: Vec<String> =
        errors.iter().map(|error| format!("{} {}", error.status().as_u16(), error.body())).collect();
    insta::assert_snapshot!(lines.join("\n"));
    let busy = || std::io::Error::from(std::io::ErrorKind::AddrInUse);
    let errors = [
        ServerError::InvalidKey,
        ServerError::InvalidOrigin("example.org".into()),
        ServerError::Listener(busy()),
        ServerError::Threads(busy()),
    ];
    let is_covered = |error: &ServerError| match error {
        ServerError::InvalidKey
        | ServerError::InvalidOrigin(_)
        | ServerError::Listener(_)
        | ServerError::Threads(_) => true,
    };
    assert!(errors.iter().all(is_covered));
    let texts = errors.iter().map(|error| (error.to_string(), error.hint()));
    insta::assert_snapshot!("messages_of_server_errors", crate::error::tests::render(texts));
}
