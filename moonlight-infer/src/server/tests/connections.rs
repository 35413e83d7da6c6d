//! A server on a real socket: clients that vanish, are slow, or send something else than requests; and its end.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::*;

struct Running {
    address: SocketAddr,
    engine: Engine,
    end: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A scripted text without an end would need a token of its own for each position, so the random model writes it.
const ENDLESS: &str = "\"max_tokens\": 100000, \"ignore_eos\": true, \"temperature\": 0";
/// A context whose text takes far longer than the tests.
const LONG: usize = 16_000;

fn start(options: ServerOptions) -> Running {
    let model = init(json!({
        "model_type": "llama", "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": LONG, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
    }));
    let engine = Engine::start("tiny", model, EngineOptions { context: LONG, ..engine_options() }).unwrap();
    let server = Server::new(engine.clone(), text_model(), options).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (end, ended) = oneshot::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(server.serve(listener, async { drop(ended.await) })).unwrap();
    });
    Running { address, engine, end: Some(end), thread: Some(thread) }
}

impl Running {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn send(&self, path: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn end(&mut self) -> Duration {
        let started = Instant::now();
        drop(self.end.take());
        self.thread.take().unwrap().join().unwrap();
        started.elapsed()
    }
}

fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A connection that the server resets has an error after its answer.
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[track_caller]
fn wait_until(what: &str, is_reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_reached() {
        assert!(started.elapsed() < Duration::from_secs(120), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_goes_away_frees_its_slot() {
    let mut server = start(ServerOptions::default());
    for (path, stream) in [
        ("/v1/completions", true),
        ("/v1/completions", false),
        ("/v1/chat/completions", true),
        ("/v1/chat/completions", false),
    ] {
        let prompt = if path.contains("chat") {
            "\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]"
        } else {
            "\"prompt\": \"x\""
        };
        let body = format!("{{\"model\": \"tiny\", {prompt}, \"stream\": {stream}, {ENDLESS}}}");
        let mut clients = vec![server.send(path, &body), server.send(path, &body), server.send(path, &body)];
        wait_until("all slots are busy", || server.engine.status().busy == 2 && server.engine.status().waiting == 1);
        if stream {
            let mut piece = [0; 64];
            assert!(clients[0].read(&mut piece).unwrap() > 0);
        }
        drop(clients);
        wait_until("the slots are free", || server.engine.status().busy == 0 && server.engine.status().waiting == 0);
    }
    assert_eq!(server.engine.status().ended.cancelled, 12);
    assert!(server.end() < Duration::from_secs(5));
}

#[test]
fn a_slow_reader_is_cut_off_and_holds_no_slot() {
    let options = ServerOptions { write_timeout: Duration::from_millis(300), ..ServerOptions::default() };
    let mut server = start(options);
    // The prompt is repeated with 20 log-probabilities for each byte, and nothing is read, so the buffers of the sockets fill.
    let prompt = "x".repeat(12_000);
    let body = format!(
        "{{\"model\": \"tiny\", \"prompt\": \"{prompt}\", \"echo\": true, \"stream\": true, \"logprobs\": 20, {ENDLESS}}}"
    );
    let client = server.send("/v1/completions", &body);
    wait_until("it runs", || server.engine.status().busy == 1);
    wait_until("it is cut off", || server.engine.status().busy == 0);
    drop(client);
    server.end();
}

#[test]
fn what_is_not_a_request_has_an_answer_or_a_closed_connection() {
    let options = ServerOptions { header_timeout: Duration::from_millis(300), ..ServerOptions::default() };
    let mut server = start(options);
    for bytes in [
        "GET\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00",
        "GET / HTTP/9.9\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    ] {
        let mut client = server.connect();
        client.write_all(bytes.as_bytes()).unwrap();
        let answer = rest(client);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    // A head that comes a byte at a time.
    let mut client = server.connect();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(30) {
        if client.write_all(b"a").is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(started.elapsed() < Duration::from_secs(10));
    // A head without an end.
    let mut client = server.connect();
    let long = "x".repeat(1 << 20);
    let _ = write!(client, "GET /health HTTP/1.1\r\nx: {long}\r\n\r\n");
    let answer = rest(client);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer:.100}");
    // The server works as before.
    let mut client = server.connect();
    write!(client, "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    assert!(rest(client).starts_with("HTTP/1.1 200"));
    server.end();
}

#[test]
fn bodies_that_are_huge_slow_or_cut_are_refused() {
    let options =
        ServerOptions { body_timeout: Duration::from_millis(400), max_body: 4096, ..ServerOptions::default() };
    let mut server = start(options);
    let mut announced = server.connect();
    write!(announced, "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999999999999\r\n\r\n")
        .unwrap();
    assert!(rest(announced).starts_with("HTTP/1.1 413"));
    let mut chunked = server.connect();
    write!(chunked, "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(4096));
    for _ in 0..100 {
        if chunked.write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    let answer = rest(chunked);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer}");
    let mut slow = server.connect();
    write!(slow, "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{{").unwrap();
    let answer = rest(slow);
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let mut cut = server.connect();
    write!(cut, "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{{").unwrap();
    drop(cut);
    let answer = rest(server.send("/v1/completions", "{\"model\": \"tiny\", \"prompt\": \"x\", \"max_tokens\": 2}"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.end();
}

#[test]
fn connections_beyond_the_limit_wait() {
    let mut server = start(ServerOptions { max_connections: 2, ..ServerOptions::default() });
    let idle = [server.connect(), server.connect()];
    std::thread::sleep(Duration::from_millis(100));
    let mut third = server.connect();
    write!(third, "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(third.read(&mut [0; 16]).is_err());
    drop(idle);
    third.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert!(rest(third).starts_with("HTTP/1.1 200"));
    server.end();
}

#[test]
fn the_end_finishes_what_runs() {
    let mut server = start(ServerOptions::default());
    let idle = server.connect();
    let body = "{\"model\": \"tiny\", \"prompt\": \"x\", \"max_tokens\": 100, \"ignore_eos\": true, \"stream\": true}";
    let client = server.send("/v1/completions", body);
    wait_until("it runs", || server.engine.status().busy == 1);
    let reader = std::thread::spawn(move || rest(client));
    let took = server.end();
    let answer = reader.join().unwrap();
    assert!(answer.contains("\"finish_reason\":\"length\"") && answer.contains("data: [DONE]"), "{answer:.200}");
    // The idle connection did not delay it.
    assert!(took < Duration::from_secs(60), "{took:?}");
    drop(idle);
    assert!(TcpStream::connect(server.address).is_err());
}

/// What a reader leaves does not hold the server for longer than its limit.
#[test]
fn the_end_does_not_wait_for_a_slow_reader() {
    let options = ServerOptions { end_timeout: Duration::from_millis(200), ..ServerOptions::default() };
    let mut server = start(options);
    let body = "{\"model\": \"tiny\", \"prompt\": \"x\", \"max_tokens\": 1000, \"ignore_eos\": true, \"stream\": true, \"logprobs\": 20}";
    let client = server.send("/v1/completions", body);
    wait_until("it runs", || server.engine.status().busy == 1);
    assert!(server.end() < Duration::from_secs(100));
    drop(client);
}
