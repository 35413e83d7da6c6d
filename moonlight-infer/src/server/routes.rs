//! The routes.

use std::any::Any;
use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;

use super::app::App;
use super::chat::chat_completions;
use super::completions::completions;
use super::error::ApiError;
use super::{guard, page};
use crate::engine::{EngineError, Health};

/// The content type of Prometheus' text format.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All routes, with those of the caller.
pub(super) fn router(app: Arc<App>, more: Router) -> Router {
    let routes = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .merge(page::router())
        .with_state(app.clone())
        .merge(more)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(CatchPanicLayer::custom(defect))
        .layer(from_fn_with_state(app.clone(), guard::guard));
    let routes = match guard::cors(&app.options) {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    routes.layer(from_fn(add_headers)).layer(from_fn_with_state(app, count))
}

async fn no_route(request: Request) -> ApiError {
    ApiError::NoRoute { method: request.method().clone(), path: request.uri().path().to_owned() }
}

async fn no_method(request: Request) -> ApiError {
    ApiError::NoMethod { method: request.method().clone(), path: request.uri().path().to_owned() }
}

/// The response to a request whose handler panicked. The panic hook has printed where.
fn defect(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    ApiError::Internal { problem: text.unwrap_or_else(|| "a panic".into()) }.into_response()
}

/// Counts the response, with the pattern of its route.
async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = label(request.uri().path());
    let response = next.run(request).await;
    app.metrics.response(route, response.status().as_u16());
    response
}

/// A path as a label of metrics: one of a fixed list, so that clients cannot add labels.
fn label(path: &str) -> &'static str {
    const ROUTES: [&str; 6] = ["/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics", "/"];
    match ROUTES.into_iter().find(|route| *route == path) {
        Some(route) => route,
        None if path.starts_with("/v1/models/") => "/v1/models/{id}",
        None => "other",
    }
}

/// Keeps browsers from guessing the type of a response, and from showing one within a page of another site.
async fn add_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::X_FRAME_OPTIONS).or_insert(HeaderValue::from_static("DENY"));
    headers.entry(header::REFERRER_POLICY).or_insert(HeaderValue::from_static("no-referrer"));
    let policy = HeaderName::from_static("cross-origin-resource-policy");
    headers.entry(policy).or_insert(HeaderValue::from_static("same-origin"));
    // Only the page has a policy of its own; nothing else is a document.
    let nothing = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(nothing);
    response
}

fn model_object(app: &App, name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": app.created, "owned_by": "moonlight", "max_model_len": app.context(),
    })
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let list: Vec<Value> = app.engine.models().iter().map(|name| model_object(&app, name)).collect();
    Json(json!({"object": "list", "data": list}))
}

/// A name may contain slashes, as those of the Hub do.
async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    match app.engine.models().contains(&name) {
        true => Ok(Json(model_object(&app, &name))),
        false => Err(EngineError::UnknownModel(name).into()),
    }
}

/// 200 if the server takes requests and the last forward pass succeeded, else 503.
async fn health(State(app): State<Arc<App>>) -> Response {
    let (status, text) = match app.engine.status().health {
        _ if app.is_ending() => (StatusCode::SERVICE_UNAVAILABLE, "shutting down"),
        Health::Failing => (StatusCode::SERVICE_UNAVAILABLE, "failing"),
        Health::Stopped => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
        Health::ShuttingDown | Health::Ready => (StatusCode::OK, "ok"),
    };
    (status, Json(json!({"status": text}))).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text =
        app.metrics.text().map_err(|_| ApiError::Internal { problem: "the metrics cannot be written".into() })?;
    Ok(([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response())
}
