//! `moonlight serve`.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use moonlight_convert::adapter::{is_adapter, load_adapter_with_head};
use moonlight_convert::{Checkpoint, Printable};
use moonlight_infer::engine::{Engine, EngineError, EngineOptions};
use moonlight_infer::server::{Server, ServerError, ServerOptions, TextModel};
use moonlight_infer::{InferError, OpenOptions, OpenedModel, resolve_weights};
use tokio::sync::Notify;

use super::model::QuantizeTo;
use super::output::print;
use super::signals::{self, Response};
use super::{old_names, units};
use crate::error::TrainError;
use crate::serve::{Follower, Following, router};

/// The variable with a key, which other users cannot see in the list of processes.
const KEY_VARIABLE: &str = "MOONLIGHT_API_KEY";
/// Threads for connections; the model runs on threads of its own.
const CONNECTION_THREADS: usize = 2;
/// The limit of threads that parse, tokenize or read files of runs.
const BLOCKING_THREADS: usize = 16;

/// Serve models over HTTP: OpenAI's API, and a page to chat and to watch runs
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// A Hugging Face directory, a GGUF file, a checkpoint or folder of a run, or `org/name` in the Hub's cache
    #[arg(long, value_name = "DIR", required_unless_present = "follow")]
    model: Option<PathBuf>,
    /// The name of the model in the API [default: that of its directory]
    #[arg(long, requires = "model")]
    name: Option<String>,
    /// Serve the model with a LoRA adapter under another name; may be given several times, over one copy of the weights
    #[arg(long = "adapter", value_name = "NAME=DIR", requires = "model", value_parser = named_dir)]
    adapters: Vec<(String, PathBuf)>,
    /// Serve the newest checkpoint of a run, also while it is training; adapters are applied to `--model` if it is given
    #[arg(long, value_name = "RUN")]
    follow: Option<PathBuf>,
    /// Show the runs in this folder on the page
    #[arg(long, value_name = "DIR")]
    runs: Option<PathBuf>,
    #[command(flatten)]
    network: NetworkArguments,
    #[command(flatten)]
    limits: LimitArguments,
    /// Quantize the weights of the layers [default: on the CPU as stored, elsewhere dequantized]
    #[arg(long, alias = old_names::QUANTIZE, value_enum)]
    quantize: Option<QuantizeTo>,
    /// cpu, cuda[:N], wgpu[:N], vulkan[:N], metal, or auto for the first that this build has
    #[arg(long, default_value = "auto")]
    device: String,
    /// f32, bf16, f16, or auto (f32 on the CPU, as stored on GPUs)
    #[arg(long, default_value = "auto")]
    dtype: String,
}

/// Where to listen, and for whom.
#[derive(Debug, Args)]
struct NetworkArguments {
    /// The address to listen on: 127.0.0.1 for programs of this machine, 0.0.0.0 for all networks
    #[arg(long, default_value = "127.0.0.1", help_heading = "Network")]
    host: String,
    /// The port to listen on; 0 for any that is free
    #[arg(long, default_value_t = 8080, help_heading = "Network")]
    port: u16,
    /// A key that clients must send; may be given several times, or as MOONLIGHT_API_KEY [default: none]
    #[arg(long = "api-key", value_name = "KEY", help_heading = "Network")]
    api_keys: Vec<String>,
    /// Allow the pages of this origin to use the server, such as `https://example.org`, or * for all; may be given several times
    #[arg(long = "cors-origin", value_name = "ORIGIN", help_heading = "Network")]
    cors_origins: Vec<String>,
}

/// What the engine may take.
#[derive(Debug, Args)]
struct LimitArguments {
    /// The number of sequences that are generated at once
    #[arg(long, default_value = "8", help_heading = "Limits")]
    slots: NonZeroUsize,
    /// The most tokens of a sequence, prompt and answer together
    #[arg(long, default_value = "4096", value_name = "TOKENS", help_heading = "Limits")]
    context: NonZeroUsize,
    /// The number of sequences that may wait for a slot; further requests are refused
    #[arg(long, default_value_t = 64, value_name = "SEQUENCES", help_heading = "Limits")]
    max_waiting: usize,
    /// The most seconds of a sequence, from its request to its end [default: no limit]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Limits")]
    max_time: Option<Duration>,
}

fn named_dir(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => Ok((name.to_owned(), dir.into())),
        _ => Err("expected NAME=DIR".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).ok_or_else(|| "must be above 0".into())
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    // Everything that can fail is checked before the model is loaded, which may take minutes, and the port is opened after it,
    // so that a client that connects is answered.
    let keys = arguments.network.keys();
    let address = arguments.network.address()?;
    drop(listen(address)?);
    let options = ServerOptions {
        only_local_names: address.ip().is_loopback() && keys.is_empty(),
        cors_origins: arguments.network.cors_origins.clone(),
        api_keys: keys,
        ..ServerOptions::default()
    };
    options.check().map_err(server_error)?;
    if let Some(runs) = &arguments.runs {
        check_folder(runs)?;
    }
    let Served { engine, text, following } = arguments.start()?;
    let mut server = Server::new(engine, text, options.clone()).map_err(server_error)?;
    if let Some(runs) = &arguments.runs {
        server = server.with_routes(router(runs.clone()));
    }
    let listener = listen(address)?;
    let address = listener.local_addr().map_err(|error| unavailable(address, &error))?;
    if !address.ip().is_loopback() && options.api_keys.is_empty() {
        tracing::warn!(
            "every machine that reaches {address} can use this server: there is no key; give one as `--api-key` or \
             {KEY_VARIABLE}"
        );
    }
    let end = Arc::new(Notify::new());
    let asked = end.clone();
    let mut is_first = true;
    signals::handle(move |_| {
        if !std::mem::replace(&mut is_first, false) {
            return Response::End;
        }
        tracing::info!("finishing what runs; a second signal ends at once");
        asked.notify_one();
        Response::Handled
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONNECTION_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("server")
        .enable_all()
        .build()
        .map_err(|error| server_error(ServerError::Threads(error)))?;
    print(&format!("listening on http://{address}\n"))?;
    let served = runtime.block_on(server.serve(listener, async move { end.notified().await }));
    drop(following);
    // A template that is still running must not delay the end.
    runtime.shutdown_background();
    served.map_err(server_error)
}

/// What is served.
struct Served {
    engine: Engine,
    text: TextModel,
    /// Keeps the models those of the run's newest checkpoint.
    following: Option<Following>,
}

impl Arguments {
    /// Loads the models and starts the engine.
    fn start(&self) -> Result<Served, TrainError> {
        let options = self.open_options();
        if let Some(run) = self.follow.as_deref().filter(|run| !run.is_dir()) {
            return Err(TrainError::Request {
                problem: format!("there is no run `{}` to follow", Printable(run.display())),
                hint: Some("pass the folder that `moonlight train` writes; it may have no checkpoint yet".into()),
            });
        }
        let Some(model) = &self.model else {
            // clap requires one of the two.
            let run = self.follow.as_deref().unwrap_or(Path::new(""));
            return self.start_with_run(run, options);
        };
        let dir = moonlight_infer::resolve_model(model).map_err(InferError::from)?;
        if !self.adapters.is_empty() && is_adapter(&dir) {
            return Err(InferError::AdapterOnAdapter(model.clone()).into());
        }
        let name = self.name.clone().unwrap_or_else(|| default_name(model));
        let mut follower = self.follow.as_deref().map(|run| Follower::new(run, options.clone()));
        self.check_names(&name, follower.as_ref())?;
        let opened = options.open(model)?;
        let text = TextModel::of(&opened)?;
        if let Some(run) = follower {
            follower = Some(run.with_base(&opened)?);
        }
        let engine = self.start_engine(&name, &opened)?;
        for (name, dir) in &self.adapters {
            self.add_adapter(&engine, &opened, name, dir)?;
        }
        let following = match follower {
            None => None,
            Some(mut follower) => {
                if follower.update(&engine).is_none() {
                    tracing::info!("`{}` has no checkpoint that can be served yet", Printable(follower.name()));
                }
                Some(follower.start(engine.clone())?)
            }
        };
        Ok(Served { engine, text, following })
    }

    /// Serves only a run.
    fn start_with_run(&self, run: &Path, options: OpenOptions) -> Result<Served, TrainError> {
        let mut follower = Follower::new(run, options);
        let Some(opened) = follower.open()? else {
            return Err(TrainError::Request {
                problem: format!("`{}` has no complete checkpoint", Printable(run.display())),
                hint: Some("wait for the first one, or give the model that is trained as `--model`".into()),
            });
        };
        let text = TextModel::of(&opened)?;
        let engine = self.start_engine(follower.name(), &opened)?;
        follower.adopt(&engine, &opened).map_err(engine_error)?;
        Ok(Served { text, following: Some(follower.start(engine.clone())?), engine })
    }

    fn open_options(&self) -> OpenOptions {
        let options = OpenOptions::new().with_device(&self.device).with_dtype(&self.dtype);
        match self.quantize {
            Some(quantize) => options.with_quantization(quantize.quantization()),
            None => options,
        }
    }

    fn start_engine(&self, name: &str, opened: &OpenedModel) -> Result<Engine, TrainError> {
        let LimitArguments { slots, context, max_waiting, max_time } = self.limits;
        let options = EngineOptions {
            slots: slots.get(),
            context: context.get(),
            max_waiting,
            max_time,
            ..EngineOptions::default()
        };
        let config = opened.model.config();
        let options = EngineOptions {
            context: options.capacity(config),
            prefill_chunk: options.prefill_chunk.max(options.slots),
            ..options
        };
        let cache = units::bytes(options.cache_bytes(config, opened.model.cache_dtype()));
        tracing::info!(
            "serving `{}`: {} of KV cache for {} x {} tokens",
            Printable(name),
            cache,
            options.slots,
            options.context
        );
        Engine::start(name, opened.model.clone(), options).map_err(engine_error)
    }

    fn add_adapter(&self, engine: &Engine, base: &OpenedModel, name: &str, dir: &Path) -> Result<(), TrainError> {
        // Only the headers of the files are read again.
        let head = Checkpoint::open(&base.dir)?.tied_head();
        let dir = resolve_weights(dir)?;
        let model = load_adapter_with_head(base.model.clone(), head, &dir)?;
        engine.set_model(name, model).map_err(engine_error)?;
        tracing::info!("serving `{}`: the adapter in `{}`", Printable(name), Printable(dir.display()));
        Ok(())
    }

    /// Two models with one name would replace each other.
    fn check_names(&self, name: &str, follower: Option<&Follower>) -> Result<(), TrainError> {
        let mut names = vec![name];
        for other in self.adapters.iter().map(|(name, _)| name.as_str()).chain(follower.map(Follower::name)) {
            if names.contains(&other) {
                return Err(TrainError::Request {
                    problem: format!("two models have the name `{}`", Printable(other)),
                    hint: Some("choose another one by `--name`, or before the `=` of `--adapter`".into()),
                });
            }
            names.push(other);
        }
        Ok(())
    }
}

/// The name of a model: the last part of its path, without `.gguf`; a name of the Hub is kept.
fn default_name(model: &Path) -> String {
    let text = model.display().to_string();
    if !model.exists() && text.split('/').count() == 2 {
        return text;
    }
    // The name of `.` and of a link is that of what it stands for.
    let real = std::fs::canonicalize(model).unwrap_or_else(|_| model.to_owned());
    let name = real.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

impl NetworkArguments {
    /// The keys of the options and of the environment.
    fn keys(&self) -> Vec<String> {
        let from_environment = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty());
        self.api_keys.iter().cloned().chain(from_environment).collect()
    }

    fn address(&self) -> Result<SocketAddr, TrainError> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        found.ok().and_then(|mut found| found.next()).ok_or_else(|| TrainError::Request {
            problem: format!("there is no address `{}`", Printable(&self.host)),
            hint: Some("give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all".into()),
        })
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener, TrainError> {
    TcpListener::bind(address).map_err(|error| unavailable(address, &error))
}

fn unavailable(address: SocketAddr, error: &std::io::Error) -> TrainError {
    let hint = match error.kind() {
        std::io::ErrorKind::AddrInUse => Some("choose another port by `--port`, or 0 for any that is free".into()),
        std::io::ErrorKind::PermissionDenied => Some("choose a port above 1023 by `--port`".into()),
        _ => None,
    };
    TrainError::Request { problem: format!("{address} cannot be listened on: {error}"), hint }
}

fn check_folder(folder: &Path) -> Result<(), TrainError> {
    std::fs::read_dir(folder).map(drop).map_err(TrainError::read(folder))
}

fn server_error(error: ServerError) -> TrainError {
    TrainError::Request { hint: error.hint(), problem: error.to_string() }
}

fn engine_error(error: EngineError) -> TrainError {
    TrainError::Request { hint: error.hint(), problem: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_has_the_name_of_its_directory() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("smol");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(home.path().join("tiny.gguf"), "").unwrap();
        assert_eq!(default_name(&dir), "smol");
        assert_eq!(default_name(&dir.join("..").join("smol/")), "smol");
        assert_eq!(default_name(&home.path().join("tiny.gguf")), "tiny");
        assert_eq!(default_name(Path::new("moonshotai/Moonlight-16B-A3B")), "moonshotai/Moonlight-16B-A3B");
        assert_eq!(default_name(Path::new("/nowhere/model")), "model");
    }

    #[test]
    fn an_adapter_has_a_name_and_a_directory() {
        assert_eq!(named_dir("law=runs/law"), Ok(("law".into(), "runs/law".into())));
        assert_eq!(named_dir("a=b=c"), Ok(("a".into(), "b=c".into())));
        for wrong in ["law", "=x", "x=", ""] {
            assert!(named_dir(wrong).is_err(), "{wrong}");
        }
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        for wrong in ["0", "-1", "nan", "inf", "1e30", "x"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
