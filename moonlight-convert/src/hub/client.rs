//! Requests to the Hub, built by `hf-hub`'s client (its addresses and headers). Redirects are followed here, so that
//! the token is sent to its own origin only.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};

use super::error::DownloadError;
use super::listing::{FileSelection, Listing};
use super::url::Address;
use super::{RepoId, home_dir, is_commit};

/// The Hub's address, unless `HF_ENDPOINT` is set.
const ENDPOINT: &str = "https://huggingface.co";
/// Size limit of a list of files in bytes, enough for about 100,000 files.
const LONGEST_LIST: u64 = 64 << 20;
const CONNECT: Duration = Duration::from_secs(20);
/// How long a connection may be silent, unless `HF_HUB_DOWNLOAD_TIMEOUT` is set (in seconds).
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Slow transfers may take this many times the idle timeout: see [`Client::stall_timeout`].
const STALL_FACTOR: u32 = 4;
/// The most redirects of a request.
const MOST_REDIRECTS: usize = 10;
/// Length limit of a token in bytes.
const LONGEST_TOKEN: u64 = 10_000;

/// The settings from the environment.
pub(super) struct Settings {
    pub(super) cache: Cache,
    endpoint: Address,
    token: Option<String>,
    idle_timeout: Duration,
    pub(super) offline: bool,
}

impl Settings {
    pub(super) fn from_env() -> Result<Self, DownloadError> {
        let variable = |name: &str| std::env::var(name).ok().map(|value| value.trim().to_owned());
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let os = |name: &str| std::env::var_os(name);
        let seconds =
            set("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|text| text.parse::<u64>().ok()).filter(|&seconds| seconds > 0);
        let is_true = |text: String| ["1", "ON", "YES", "TRUE"].contains(&text.to_ascii_uppercase().as_str());
        let offline = set("HF_HUB_OFFLINE").is_some_and(is_true);
        // Offline, neither endpoint nor token is needed, and an invalid value is not an error.
        let endpoint = set("HF_ENDPOINT").filter(|_| !offline);
        let endpoint = Address::parse(endpoint.as_deref().unwrap_or(ENDPOINT).trim_end_matches('/'));
        Ok(Self {
            cache: Cache::new(super::cache_dir(os)),
            endpoint: endpoint.map_err(|problem| DownloadError::Endpoint { problem: problem.to_owned() })?,
            token: if offline { None } else { token()? },
            idle_timeout: seconds.map_or(IDLE_TIMEOUT, |seconds| Duration::from_secs(seconds.min(86_400))),
            offline,
        })
    }
}

/// The token from the environment: from a variable, or from the token file.
fn token() -> Result<Option<String>, DownloadError> {
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(value) = std::env::var_os(name)
            && let Some(token) = checked_token(&value.to_string_lossy(), &format!("`{name}`"))?
        {
            return Ok(Some(token));
        }
    }
    let named = std::env::var_os("HF_TOKEN_PATH").filter(|path| !path.is_empty());
    let path = named.map_or_else(|| home_dir(|name| std::env::var_os(name)).join("token"), Into::into);
    let place = format!("`{}`", path.display());
    match read_token(&path) {
        Ok(text) => checked_token(&text, &place),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(DownloadError::Token { place, problem: format!("cannot be read: {error}") }),
    }
}

fn read_token(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST_TOKEN + 1).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Checks that a text can be sent as a token; `None` if it is empty.
fn checked_token(text: &str, place: &str) -> Result<Option<String>, DownloadError> {
    let token = text.trim();
    let problem = match token.chars().find(|character| !character.is_ascii_graphic()) {
        _ if token.is_empty() => return Ok(None),
        _ if token.len() as u64 > LONGEST_TOKEN => "is longer than any token",
        None => return Ok(Some(token.to_owned())),
        Some('\n' | '\r') => "has more than one line",
        Some(character) if character.is_whitespace() => "contains white space",
        Some(character) if character.is_control() => "contains control characters",
        Some(_) => "contains characters that no token has",
    };
    Err(DownloadError::Token { place: place.to_owned(), problem: problem.to_owned() })
}

/// A client for one revision of a repository.
pub(super) struct Client {
    repo: ApiRepo,
    id: RepoId,
    revision: String,
    endpoint: Address,
    token: bool,
    idle_timeout: Duration,
}

/// Why a request for a file failed.
pub(super) enum FetchError {
    /// Repeating the request will not help.
    Permanent(DownloadError),
    /// Repeating the request may help.
    Transient(String),
    /// The requested range is beyond the end of the file.
    Range,
}

/// The response to a request for a file.
pub(super) struct FileResponse {
    /// The offset in the file at which it begins.
    pub(super) start: u64,
    pub(super) body: Box<dyn Read>,
}

type Response = ureq::http::Response<ureq::Body>;
type DownloadRequest = ureq::RequestBuilder<ureq::typestate::WithoutBody>;

impl Client {
    pub(super) fn new(settings: &Settings, id: &RepoId, revision: &str) -> Result<Self, DownloadError> {
        let Settings { cache, endpoint, token, idle_timeout, .. } = settings;
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.as_str().to_owned())
            .with_token(token.clone())
            .with_progress(false)
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| DownloadError::Network { endpoint: endpoint.to_string(), problem: error.to_string() })?;
        Ok(Self {
            repo: api.repo(id.repo(revision)),
            id: id.clone(),
            revision: revision.to_owned(),
            endpoint: endpoint.clone(),
            token: token.is_some(),
            idle_timeout: *idle_timeout,
        })
    }

    /// How long a transfer may stay below the minimum rate, and how long a list of files, which has a few kB, may take
    /// in all.
    pub(super) fn stall_timeout(&self) -> Duration {
        STALL_FACTOR * self.idle_timeout
    }

    /// Requests the list of the revision's files.
    pub(super) fn list(&self, wanted: &FileSelection) -> Result<Listing, DownloadError> {
        let what = || format!("the model `{}` with the revision `{}` at {}", self.id, self.revision, self.endpoint);
        let url = format!("{}/api/{}", self.endpoint.as_str(), self.id.repo(&self.revision).api_url());
        // `blobs=true` adds sizes and digests.
        let mut response = self.send(&format!("{url}?blobs=true"), None).map_err(|problem| {
            let endpoint = self.endpoint.to_string();
            DownloadError::Network { endpoint, problem }
        })?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(self.refused(status, what(), format!("{}/api/models/{}", self.endpoint, self.id)));
        }
        let answer = response.body_mut().with_config().limit(LONGEST_LIST).read_to_vec();
        let answer = answer.map_err(|error| self.unusable(error.to_string()))?;
        let listing = Listing::parse(&answer, wanted).map_err(|problem| self.unusable(problem))?;
        // A commit identifies its contents: an answer for another commit would be another model.
        if is_commit(&self.revision) && !self.revision.eq_ignore_ascii_case(&listing.commit) {
            let problem = format!("it is for the commit {}, not for the requested one", listing.commit);
            return Err(self.unusable(problem));
        }
        Ok(listing)
    }

    /// Requests a file, beginning at offset `start`.
    pub(super) fn file(&self, commit: &str, name: &str, start: u64) -> Result<FileResponse, FetchError> {
        let path = format!("{}/resolve/{commit}/{}", self.id, escaped(name));
        let url = format!("{}/{path}", self.endpoint);
        let response =
            self.send(&format!("{}/{path}", self.endpoint.as_str()), Some(start)).map_err(FetchError::Transient)?;
        let status = response.status().as_u16();
        let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
        let start = match status {
            200 => 0,
            206 => match range.and_then(first_of_range) {
                Some(first) if first == start => start,
                _ => return Err(FetchError::Transient("the server sent a different range than requested".into())),
            },
            416 => return Err(FetchError::Range),
            408 | 429 | 500.. => {
                return Err(FetchError::Transient(format!("the server answered with status {status}")));
            }
            _ => {
                return Err(FetchError::Permanent(self.refused(
                    status,
                    format!("the file `{name}` in `{}`", self.id),
                    url,
                )));
            }
        };
        // ureq's own limit is off: the caller stops at the listed size.
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(FileResponse { start, body: Box::new(body) })
    }

    /// Sends a request and follows redirects; returns the response of any status. `start` requests a file from that
    /// offset. The error does not show the address, which may contain a password.
    fn send(&self, url: &str, start: Option<u64>) -> Result<Response, String> {
        let endpoint = &self.endpoint;
        let mut address = Address::parse(url)?;
        let mut same_origin = true;
        for _ in 0..=MOST_REDIRECTS {
            same_origin &= address.same_origin(endpoint);
            let response = self.request(&address, start, same_origin).call().map_err(|error| match error {
                ureq::Error::BadUri(_) => "it is not a valid address".to_owned(),
                error => error.to_string(),
            })?;
            let location = response.headers().get("location").and_then(|value| value.to_str().ok());
            match (response.status().as_u16(), location) {
                (301 | 302 | 303 | 307 | 308, Some(location)) => address = address.join(location)?,
                _ => return Ok(response),
            }
        }
        Err(format!("it redirects more than {MOST_REDIRECTS} times"))
    }

    fn request(&self, address: &Address, start: Option<u64>, with_token: bool) -> DownloadRequest {
        let mut request = self.repo.info_request().uri(address.as_str());
        if !with_token && let Some(headers) = request.headers_mut() {
            headers.remove("authorization");
        }
        if let Some(start) = start {
            request = request.header("Range", format!("bytes={start}-"));
        }
        request
            .config()
            .http_status_as_error(false)
            .max_redirects(0)
            // Offsets in a compressed stream are not offsets in the file.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(self.idle_timeout))
            // A file may take hours: only pauses and a low rate end its transfer.
            .timeout_recv_body(start.is_none().then(|| self.stall_timeout()))
            .timeout_per_read(Some(self.idle_timeout))
            .build()
    }

    fn refused(&self, status: u16, what: String, url: String) -> DownloadError {
        match status {
            401 | 403 => DownloadError::Refused {
                repo: self.id.to_string(),
                status,
                token: self.token,
                page: format!("{}/{}", self.endpoint, self.id),
            },
            404 => DownloadError::NotFound { what },
            _ => DownloadError::Status { url, status },
        }
    }

    fn unusable(&self, problem: String) -> DownloadError {
        DownloadError::List { endpoint: self.endpoint.to_string(), repo: self.id.to_string(), problem }
    }
}

/// Parses `5` from `bytes 5-9/10`.
fn first_of_range(text: &str) -> Option<u64> {
    text.trim().strip_prefix("bytes")?.trim_start().split('-').next()?.parse().ok()
}

/// Escapes a path for an address.
fn escaped(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => text.push(char::from(byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_token_is_named_by_its_source_and_not_shown() {
        assert_eq!(checked_token(" hf_secret\n", "`HF_TOKEN`").unwrap().as_deref(), Some("hf_secret"));
        assert!(checked_token(" \n", "`HF_TOKEN`").unwrap().is_none());
        for (text, problem) in [
            ("hf_sec\nret", "has more than one line"),
            ("hf_sec\u{1b}ret", "contains control characters"),
            ("hf_sec ret", "contains white space"),
            ("hf_sec\u{e9}ret", "contains characters that no token has"),
            (&"s".repeat(20_000), "is longer than any token"),
        ] {
            let error = checked_token(text, "`HF_TOKEN`").unwrap_err();
            let shown = format!("{error} {error:?} {:?}", error.hint());
            assert!(shown.contains("the token in `HF_TOKEN`") && shown.contains(problem), "{shown}");
            assert!(!shown.contains("sec") && !shown.contains("ssss"), "{shown}");
        }
    }

    #[test]
    fn paths_are_escaped_and_ranges_parsed() {
        assert_eq!(escaped("a/b c-1.x?#é"), "a/b%20c-1.x%3F%23%C3%A9");
        assert_eq!(first_of_range("bytes 5-9/10"), Some(5));
        for bad in ["bytes */10", "5-9", "bytes -1", ""] {
            assert_eq!(first_of_range(bad), None, "{bad}");
        }
    }
}
