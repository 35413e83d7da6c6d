//! [`ServerOptions`]: who may use a server, and its limits.

use std::time::Duration;

use super::error::ServerError;
use super::guard::check_options;

/// Who may use a server, and its limits. Those on sequences are the engine's
/// ([`EngineOptions`](crate::engine::EngineOptions)).
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Keys; a client must send one of them, except for `/health` and the page; none for no check.
    pub api_keys: Vec<String>,
    /// Origins (`https://example.org`) whose pages may use the server from a browser; `*` for all. By default none.
    pub cors_origins: Vec<String>,
    /// Whether only requests for a local name (`localhost`, `127.0.0.1`) are answered, and from a browser only those of the
    /// server's own page or of `cors_origins`. Without a key this keeps other sites out of a server on the loopback
    /// interface, also by DNS rebinding.
    pub only_local_names: bool,
    /// Connections at once; further ones wait.
    pub max_connections: usize,
    /// The most bytes of a body.
    pub max_body: usize,
    /// The most bytes of all bodies that are being read and encoded.
    pub body_memory: usize,
    /// Prompts that are parsed and encoded at once, each on a thread.
    pub encoders: usize,
    /// The most time for the head of a request, and between two requests of a connection.
    pub header_timeout: Duration,
    /// The most time for the body of a request.
    pub body_timeout: Duration,
    /// The most time in which a client does not read any of an answer.
    pub write_timeout: Duration,
    /// The most time for the rest of the answers after the last sequence, when the server ends.
    pub end_timeout: Duration,
}

impl ServerOptions {
    /// Checks what [`Server::new`](super::Server::new) would refuse.
    ///
    /// # Errors
    ///
    /// [`ServerError::InvalidKey`], [`ServerError::InvalidOrigin`].
    pub fn check(&self) -> Result<(), ServerError> {
        check_options(self)
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            only_local_names: true,
            max_connections: 512,
            max_body: 8 << 20,
            body_memory: 64 << 20,
            encoders: std::thread::available_parallelism().map_or(2, |threads| threads.get().min(4)),
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            end_timeout: Duration::from_secs(5),
        }
    }
}
