//! Connections: accepted up to a limit, with limits on time, until the server ends.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;

use super::app::App;
use super::error::ServerError;

/// The pause after a connection could not be accepted, for example because the process has too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// The most bytes of the head of a request. hyper also limits its fields to 100.
const MAX_HEAD: usize = 64 << 10;

/// Serves connections until `end` is ready; then finishes the requests that run.
pub(super) async fn serve(
    app: Arc<App>,
    router: Router,
    listener: TcpListener,
    end: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    listener.set_nonblocking(true).map_err(ServerError::Listener)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(ServerError::Listener)?;
    let places = Arc::new(Semaphore::new(app.options.max_connections.clamp(1, Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    tokio::pin!(end);
    loop {
        let accepted = async {
            // A place comes before the connection, so that those beyond the limit wait in the system's queue.
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        tokio::select! {
            () = &mut end => break,
            Some(_) = connections.join_next() => {}
            (place, accepted) = accepted => match accepted {
                Ok((stream, _)) => {
                    let connection = graceful.watch(connection(&app, router.clone(), stream));
                    let open = app.metrics.connection();
                    connections.spawn(async move {
                        // An error is that of one client: it sent something else than HTTP, was too slow, or went away.
                        if let Err(error) = connection.await {
                            tracing::debug!("a connection ended: {error}");
                        }
                        drop((place, open));
                    });
                }
                Err(error) => {
                    tracing::debug!("a connection was not accepted: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    app.end();
    let unfinished = async {
        app.engine.shut_down().await;
        // What is left is the rest of answers, which a slow reader must not delay forever.
        tokio::time::sleep(app.options.end_timeout).await;
    };
    tokio::select! {
        () = graceful.shutdown() => {}
        () = unfinished => {}
    }
    connections.shutdown().await;
    app.engine.shut_down().await;
    Ok(())
}

type Connection = http1::Connection<TokioIo<std::pin::Pin<Box<TimeoutStream<TcpStream>>>>, TowerToHyperService<Router>>;

/// A connection that serves the routes.
fn connection(app: &App, router: Router, stream: TcpStream) -> Connection {
    // Tokens are small, and each is sent when it comes.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    // Only for writing: while an answer is computed there is nothing to read.
    stream.set_write_timeout(Some(app.options.write_timeout));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.options.header_timeout)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router))
}
