//! Who may use the server: keys, host names and origins.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Uri, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::ConstantTimeEq;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::app::App;
use super::error::{ApiError, ServerError};
use super::options::ServerOptions;

/// Routes without a key: they contain nothing of a user, and a browser cannot send a key with them.
const OPEN: [&str; 2] = ["/health", "/"];
/// The files of the page.
const PAGE: &str = "/page/";

/// Checks that the options can be used.
pub(super) fn check_options(options: &ServerOptions) -> Result<(), ServerError> {
    // Other characters cannot be in a header.
    let is_valid = |key: &String| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
    if !options.api_keys.iter().all(is_valid) {
        return Err(ServerError::InvalidKey);
    }
    match options.cors_origins.iter().find(|origin| *origin != "*" && !is_origin(origin)) {
        Some(origin) => Err(ServerError::InvalidOrigin(origin.clone())),
        None => Ok(()),
    }
}

fn is_origin(text: &str) -> bool {
    let is_exact = |uri: &Uri| {
        uri.scheme_str()
            .zip(uri.authority())
            .is_some_and(|(scheme, host)| format!("{scheme}://{host}") == text && !host.as_str().contains('@'))
    };
    text.parse::<Uri>().is_ok_and(|uri| is_exact(&uri))
}

/// Headers for the pages of the allowed origins.
pub(super) fn cors(options: &ServerOptions) -> Option<CorsLayer> {
    let origins = &options.cors_origins;
    let allowed = match () {
        () if origins.is_empty() => return None,
        () if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        () => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    let methods = [axum::http::Method::GET, axum::http::Method::POST];
    // OpenAI's client for browsers sends headers of its own.
    Some(CorsLayer::new().allow_origin(allowed).allow_methods(methods).allow_headers(AllowHeaders::mirror_request()))
}

/// Refuses requests that have no valid key, or come from another site.
pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Result<Response, ApiError> {
    let headers = request.headers();
    if app.options.only_local_names {
        check_site(headers, request.uri(), &app.options.cors_origins)?;
    }
    let path = request.uri().path();
    if !OPEN.contains(&path) && !path.starts_with(PAGE) {
        check_key(headers, &app.options.api_keys)?;
    }
    Ok(next.run(request).await)
}

/// Checks the key. All keys are compared, each in a time that only depends on its length.
fn check_key(headers: &HeaderMap, keys: &[String]) -> Result<(), ApiError> {
    if keys.is_empty() {
        return Ok(());
    }
    let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let Some(given) = given.and_then(bearer) else { return Err(ApiError::Key { given: false }) };
    let matches = keys.iter().fold(subtle::Choice::from(0), |any, key| any | key.as_bytes().ct_eq(given));
    if matches.into() { Ok(()) } else { Err(ApiError::Key { given: true }) }
}

/// The key in `Bearer KEY`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// Refuses names that another site may have pointed at this machine, and pages of other sites.
fn check_site(headers: &HeaderMap, uri: &Uri, allowed: &[String]) -> Result<(), ApiError> {
    let text =
        |name| headers.get(name).map(|value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned());
    // The target of a request may contain the host, which then counts (RFC 9112, section 3.2.2).
    let host = uri.authority().map(ToString::to_string).or_else(|| text(header::HOST));
    if let Some(host) = host.clone().filter(|host| !is_local(host)) {
        return Err(ApiError::Host { host });
    }
    if let Some(origin) = text(header::ORIGIN)
        && !allowed.iter().any(|known| known == "*" || *known == origin)
        && host.is_none_or(|host| origin != format!("http://{host}"))
    {
        return Err(ApiError::Origin { origin });
    }
    Ok(())
}

/// Whether a host, with or without a port, is this machine by every resolver.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || name.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_key_is_compared_as_a_whole() {
        let keys = ["first".to_owned(), "second".to_owned()];
        let check = |value: &str| check_key(&headers(&[("authorization", value)]), &keys);
        assert_eq!(check("Bearer second"), Ok(()));
        assert_eq!(check("bearer  first "), Ok(()));
        for wrong in ["Bearer ", "Bearer firs", "Bearer firstsecond", "Bearer firsT"] {
            assert_eq!(check(wrong), Err(ApiError::Key { given: true }), "{wrong}");
        }
        for missing in ["first", "Basic first", "Bear"] {
            assert_eq!(check(missing), Err(ApiError::Key { given: false }), "{missing}");
        }
        assert_eq!(check_key(&HeaderMap::new(), &[]), Ok(()));
    }

    #[test]
    fn only_local_names_are_accepted() {
        for host in ["localhost", "LOCALHOST:80", "a.localhost:1", "127.0.0.1:8080", "127.9.9.9", "[::1]:8080", "[::1]"]
        {
            assert!(is_local(host), "{host}");
        }
        for host in
            ["example.org", "localhost.example.org", "10.0.0.1", "127.0.0.1.example.org", "[::2]:1", "", "0.0.0.0"]
        {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let check = |origin: &str, allowed: &[&str]| {
            let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
            check_site(&headers(&[("host", "127.0.0.1:8080"), ("origin", origin)]), &"/x".parse().unwrap(), &allowed)
        };
        assert_eq!(check("http://127.0.0.1:8080", &[]), Ok(()));
        assert_eq!(check("https://example.org", &["https://example.org"]), Ok(()));
        assert_eq!(check("https://example.org", &["*"]), Ok(()));
        for origin in ["https://example.org", "null", "http://127.0.0.1:3000"] {
            assert_eq!(check(origin, &[]), Err(ApiError::Origin { origin: origin.into() }));
        }
        let rebound = check_site(&headers(&[("host", "evil.example")]), &"/".parse().unwrap(), &[]);
        assert_eq!(rebound, Err(ApiError::Host { host: "evil.example".into() }));
    }

    #[test]
    fn origins_and_keys_are_checked_at_the_start() {
        for origin in ["https://example.org", "http://localhost:3000"] {
            assert!(is_origin(origin), "{origin}");
        }
        for origin in ["https://example.org/", "example.org", "https://", "https://a@b", ""] {
            assert!(!is_origin(origin), "{origin}");
        }
        let options = |key: &str| ServerOptions { api_keys: vec![key.into()], ..ServerOptions::default() };
        assert!(check_options(&options("sk-1")).is_ok());
        assert!(matches!(check_options(&options("")), Err(ServerError::InvalidKey)));
        assert!(matches!(check_options(&options("a b")), Err(ServerError::InvalidKey)));
    }
}
