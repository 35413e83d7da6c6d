//! The page at `/`: a chat, and the curves of training runs. Its files are part of the program.
//!
//! The page loads nothing from elsewhere, and its content security policy forbids that. There is no script or style in its
//! HTML, so whatever a model writes cannot become one.

use std::hash::Hasher;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use rustc_hash::FxHasher;

/// A file of the page.
struct Asset {
    path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

macro_rules! assets {
    ($($path:literal $file:literal $content_type:expr),* $(,)?) => {
        &[$(Asset { path: $path, content_type: $content_type, text: include_str!(concat!("page/", $file)) }),*]
    };
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

const ASSETS: &[Asset] = assets![
    "/" "index.html" HTML,
    "/page/style.css" "style.css" CSS,
    "/page/theme.js" "theme.js" SCRIPT,
    "/page/app.js" "app.js" SCRIPT,
    "/page/api.js" "api.js" SCRIPT,
    "/page/chart.js" "chart.js" SCRIPT,
    "/page/chat.js" "chat.js" SCRIPT,
    "/page/dom.js" "dom.js" SCRIPT,
    "/page/runs.js" "runs.js" SCRIPT,
    "/page/series.js" "series.js" SCRIPT,
    "/page/store.js" "store.js" SCRIPT,
    "/page/text.js" "text.js" SCRIPT,
    "/page/icon.svg" "icon.svg" SVG,
];

/// Only files of this server, and no inline code. Nothing may frame the page, so no other page can make a user click in it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The routes of the page: `/`, and its files under `/page/`. They need no API key: a user enters it on the page.
pub(super) fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    ASSETS.iter().fold(Router::new(), |router, asset| {
        router.route(asset.path, get(move |headers: HeaderMap| async move { answer(asset, &headers) }))
    })
}

fn answer(asset: &Asset, request: &HeaderMap) -> Response {
    let tag = tag(asset.text);
    let known = request.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let is_known =
        known.is_some_and(|known| known.split(',').any(|known| known.trim().trim_start_matches("W/") == tag));
    let headers = [
        (header::ETAG, HeaderValue::from_str(&tag).unwrap_or(HeaderValue::from_static("\"\""))),
        // Browsers ask each time, so that a page is never older than its server.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    if is_known {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    (headers, [(header::CONTENT_TYPE, asset.content_type)], asset.text).into_response()
}

/// The entity tag of a file: a hash of its text.
fn tag(text: &str) -> String {
    let mut hasher = FxHasher::default();
    hasher.write(text.as_bytes());
    format!("\"{:016x}\"", hasher.finish())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    fn get(path: &str, known: Option<&str>) -> (StatusCode, HeaderMap, String) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut request = Request::get(path);
            if let Some(known) = known {
                request = request.header(header::IF_NONE_MATCH, known);
            }
            let answer = router().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
            let (parts, body) = answer.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            (parts.status, parts.headers, String::from_utf8(body.to_vec()).unwrap())
        })
    }

    #[test]
    fn every_file_is_served_with_its_type_and_the_policy() {
        for asset in ASSETS {
            let (status, headers, body) = get(asset.path, None);
            assert_eq!(status, StatusCode::OK, "{}", asset.path);
            assert_eq!(headers[header::CONTENT_TYPE], asset.content_type);
            assert_eq!(headers[header::CONTENT_SECURITY_POLICY], POLICY);
            assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
            assert!(body == asset.text);
        }
        assert_eq!(get("/page/other.js", None).0, StatusCode::NOT_FOUND);
    }

    #[test]
    fn a_file_that_the_browser_has_is_not_sent_again() {
        let tag = get("/", None).1[header::ETAG].to_str().unwrap().to_owned();
        for known in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}")] {
            let (status, headers, body) = get("/", Some(&known));
            assert_eq!((status, body.as_str()), (StatusCode::NOT_MODIFIED, ""));
            assert_eq!(headers[header::ETAG], tag);
        }
        assert_eq!(get("/", Some("\"other\"")).0, StatusCode::OK);
        let tags: std::collections::HashSet<String> = ASSETS.iter().map(|asset| self::tag(asset.text)).collect();
        assert_eq!(tags.len(), ASSETS.len());
    }

    /// The policy would block such a script or style, and the page would be broken without an error on this side.
    #[test]
    fn the_page_has_nothing_inline_and_nothing_from_elsewhere() {
        let html = ASSETS[0].text;
        for tag in html.split("<script").skip(1) {
            assert!(tag.starts_with(" src=\"") || tag.starts_with(" type=\"module\" src=\""), "{tag:.60}");
        }
        for forbidden in [" style=", "<style", " onclick=", " onload=", "javascript:"] {
            assert!(!html.contains(forbidden), "{forbidden}");
        }
        let is_namespace = |address: &str| address.starts_with("http://www.w3.org/");
        for asset in ASSETS {
            for at in ["http://", "https://"] {
                let addresses = asset.text.match_indices(at).map(|(start, _)| &asset.text[start..]);
                assert!(addresses.clone().all(is_namespace), "{}", asset.path);
            }
            for forbidden in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"]
            {
                assert!(!asset.text.contains(forbidden), "{}: {forbidden}", asset.path);
            }
        }
    }

    #[test]
    fn every_file_that_the_page_names_is_served() {
        let is_served = |path: &str| ASSETS.iter().any(|asset| asset.path == path);
        for asset in ASSETS {
            let after =
                |mark: &'static str| asset.text.match_indices(mark).map(move |(at, _)| &asset.text[at + mark.len()..]);
            let name = |rest: &'static str| rest.split(['"', '\'', ')', '#']).next().unwrap_or_default();
            for file in after("\"/page/").chain(after(" from \"./")).map(name) {
                assert!(is_served(&format!("/page/{file}")), "{}: {file}", asset.path);
            }
        }
    }
}
