//! Requests to the Hub, through `hf-hub`'s own client: its address, its headers, its rule for tokens and redirects.

use std::io::Read;
use std::time::Duration;

use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};

use super::error::DownloadError;
use super::list::{Listing, Wanted};
use super::{RepoId, home_dir};

/// Where models come from unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// The longest list of files that is read: some 100,000 of them.
const LONGEST_LIST: u64 = 64 << 20;
const CONNECT: Duration = Duration::from_secs(20);
/// The longest that nothing may come, unless `HF_HUB_DOWNLOAD_TIMEOUT` says otherwise (in seconds).
const SILENCE: Duration = Duration::from_secs(30);

/// What the environment says of the Hub.
pub(super) struct Settings {
    pub(super) cache: Cache,
    endpoint: String,
    token: Option<String>,
    silence: Duration,
    pub(super) offline: bool,
}

impl Settings {
    pub(super) fn from_env() -> Self {
        let variable = |name: &str| std::env::var(name).ok().map(|value| value.trim().to_owned());
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let os = |name: &str| std::env::var_os(name);
        let token_of = |path: String| std::fs::read_to_string(path).ok().map(|token| token.trim().to_owned());
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| set("HF_TOKEN_PATH").and_then(token_of))
            .or_else(|| Cache::new(home_dir(os).join("hub")).token())
            .filter(|token| !token.is_empty());
        let seconds = set("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|text| text.parse().ok()).filter(|&seconds| seconds > 0);
        let yes = |text: String| ["1", "ON", "YES", "TRUE"].contains(&text.to_ascii_uppercase().as_str());
        Self {
            cache: Cache::new(super::cache_dir(os)),
            endpoint: set("HF_ENDPOINT").map_or(ENDPOINT.into(), |text| text.trim_end_matches('/').to_owned()),
            token,
            silence: seconds.map_or(SILENCE, Duration::from_secs),
            offline: set("HF_HUB_OFFLINE").is_some_and(yes),
        }
    }
}

/// A repository of the Hub, at a revision.
pub(super) struct Client {
    repo: ApiRepo,
    id: RepoId,
    revision: String,
    endpoint: String,
    token: bool,
    silence: Duration,
}

/// Why a file did not come.
pub(super) enum Refusal {
    /// It will not come another time either.
    Final(DownloadError),
    /// It may come if it is asked for again.
    ForNow(String),
    /// The file has no such part.
    Range,
}

/// A file that comes.
pub(super) struct Answer {
    /// The place in the file that it begins at.
    pub(super) start: u64,
    pub(super) body: Box<dyn Read>,
}

type Response = ureq::http::Response<ureq::Body>;

impl Client {
    pub(super) fn new(settings: &Settings, id: &RepoId, revision: &str) -> Result<Self, DownloadError> {
        let Settings { cache, endpoint, token, silence, .. } = settings;
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.clone())
            .with_token(token.clone())
            .with_progress(false)
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| DownloadError::Network { endpoint: endpoint.clone(), problem: error.to_string() })?;
        Ok(Self {
            repo: api.repo(id.repo(revision)),
            id: id.clone(),
            revision: revision.to_owned(),
            endpoint: endpoint.clone(),
            token: token.is_some(),
            silence: *silence,
        })
    }

    /// The files of the revision.
    pub(super) fn list(&self, wanted: &Wanted) -> Result<Listing, DownloadError> {
        let what = || format!("model `{}` with a revision `{}` at {}", self.id, self.revision, self.endpoint);
        let mut response = match self.send(None, None) {
            Ok(response) => response,
            Err(error) => {
                return Err(DownloadError::Network { endpoint: self.endpoint.clone(), problem: error.to_string() });
            }
        };
        let status = response.status().as_u16();
        if status != 200 {
            return Err(self.refused(status, what(), format!("{}/api/models/{}", self.endpoint, self.id)));
        }
        let answer = response.body_mut().with_config().limit(LONGEST_LIST).read_to_vec();
        let answer = answer.map_err(|error| self.unusable(error.to_string()))?;
        Listing::parse(&answer, wanted).map_err(|problem| self.unusable(problem))
    }

    /// A file from a place in it on.
    pub(super) fn file(&self, commit: &str, name: &str, start: u64) -> Result<Answer, Refusal> {
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.id, escaped(name));
        let response = self.send(Some(&url), Some(start)).map_err(|error| Refusal::ForNow(error.to_string()))?;
        let status = response.status().as_u16();
        let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
        let start = match status {
            200 => 0,
            206 => match range.and_then(first_of_range) {
                Some(first) if first == start => start,
                _ => return Err(Refusal::ForNow("the server sends another part than was asked for".into())),
            },
            416 => return Err(Refusal::Range),
            408 | 429 | 500.. => return Err(Refusal::ForNow(format!("the server answers with status {status}"))),
            _ => return Err(Refusal::Final(self.refused(status, format!("file `{name}` in `{}`", self.id), url))),
        };
        // As long as the file is: the limit is ours, not the library's.
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(Answer { start, body: Box::new(body) })
    }

    fn send(&self, url: Option<&str>, start: Option<u64>) -> Result<Response, ureq::Error> {
        let mut request = self.repo.info_request();
        request = match url {
            // Sizes and digests are asked for, too.
            None => request.query("blobs", "true"),
            Some(url) => request.uri(url),
        };
        if let Some(start) = start {
            request = request.header("Range", format!("bytes={start}-"));
        }
        request
            .config()
            .http_status_as_error(false)
            // Places in a compressed stream are not places in the file.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(self.silence))
            .timeout_per_read(Some(self.silence))
            .build()
            .call()
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
        DownloadError::List { endpoint: self.endpoint.clone(), repo: self.id.to_string(), problem }
    }
}

/// `5` of `bytes 5-9/10`.
fn first_of_range(text: &str) -> Option<u64> {
    text.trim().strip_prefix("bytes")?.trim_start().split('-').next()?.parse().ok()
}

/// A path as part of an address.
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
    fn addresses_and_ranges() {
        assert_eq!(escaped("a/b c-1.x?#é"), "a/b%20c-1.x%3F%23%C3%A9");
        assert_eq!(first_of_range("bytes 5-9/10"), Some(5));
        for bad in ["bytes */10", "5-9", "bytes -1", ""] {
            assert_eq!(first_of_range(bad), None, "{bad}");
        }
    }
}
