//! Tests of the routes over a real engine with small models.

mod chat;
mod completions;
mod connections;
mod routes;
mod scripted;

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use burn::tensor::Device;
use http_body_util::BodyExt;
use moonlight_model::{CausalLm, ModelConfig};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{SamplingDefaults, Server, ServerOptions, TextModel};
use crate::chat::{ChatEncoder, ChatTemplate};
use crate::engine::{Engine, EngineOptions};
use crate::tokenizer::{EOS, Tokenizer};

const CONTEXT: usize = 192;

/// A small model of random weights over bytes.
fn random_model() -> CausalLm {
    let shape = json!({
        "model_type": "llama", "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
    });
    init(shape)
}

fn init(shape: Value) -> CausalLm {
    // The random numbers are those of the process, and the parameters are drawn when they are first read.
    static LOCK: Mutex<()> = Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let device = Device::flex();
    device.seed(3);
    let model = ModelConfig::from_value(shape).unwrap().init(&device);
    model.forward(burn::tensor::Tensor::from_data([[1i32, 2]], &device));
    model
}

fn text_model() -> TextModel {
    let tokenizer = Tokenizer::bytes_chat();
    let template = ChatTemplate::for_tokenizer(&tokenizer).unwrap();
    let chat = ChatEncoder::new(template, tokenizer.clone());
    let end = chat.end_token().unwrap();
    TextModel {
        tokenizer,
        chat: Some(Arc::new(chat)),
        eos: vec![EOS],
        end_of_turn: vec![EOS, end],
        defaults: SamplingDefaults::default(),
    }
}

fn engine_options() -> EngineOptions {
    EngineOptions { slots: 2, context: CONTEXT, prefill_chunk: 64, max_waiting: 4, ..EngineOptions::default() }
}

/// A server whose routes are called without a network.
struct TestServer {
    engine: Engine,
    router: Router,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The message of an error with a status.
    #[track_caller]
    fn error(&self, status: u16) -> String {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let error = &self.json()["error"];
        assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(), "{error}");
        error["message"].as_str().unwrap().to_owned()
    }

    /// The data of the events of a stream, which ends with `[DONE]`.
    #[track_caller]
    fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let mut data: Vec<&str> =
            self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).map(str::trim_end).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

impl TestServer {
    fn new() -> Self {
        Self::with(random_model(), text_model(), ServerOptions::default())
    }

    fn with(model: CausalLm, text: TextModel, options: ServerOptions) -> Self {
        let engine = Engine::start("tiny", model, engine_options()).unwrap();
        let server = Server::new(engine.clone(), text, options).unwrap();
        Self { engine, router: server.router() }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    async fn post_text(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()).await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, body.to_string()).await
    }

    /// A completion with the fields of `body`.
    async fn complete(&self, body: Value) -> Answer {
        let mut request = json!({"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 0});
        request.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        self.post("/v1/completions", &request).await
    }

    /// An answer in a chat with the fields of `body`.
    async fn chat(&self, body: Value) -> Answer {
        let messages = json!([{"role": "user", "content": "Hello"}]);
        let mut request = json!({"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0});
        request.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        self.post("/v1/chat/completions", &request).await
    }
}
