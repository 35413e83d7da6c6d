//! `/metrics`, in the text format of Prometheus.

use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::engine::Engine;

/// Upper ends of the buckets of the time to the first token, in seconds.
const FIRST_TOKEN: [f64; 14] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0];
/// Upper ends of the buckets of the time between tokens, in seconds.
const BETWEEN_TOKENS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    status: u16,
}

/// The metrics of a server.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    connections: Gauge,
    first_token: Histogram,
    between_tokens: Histogram,
}

impl Metrics {
    pub(super) fn new(engine: Engine) -> Self {
        let mut registry = Registry::with_prefix("moonlight");
        let metrics = Self {
            requests: Family::default(),
            connections: Gauge::default(),
            first_token: Histogram::new(FIRST_TOKEN),
            between_tokens: Histogram::new(BETWEEN_TOKENS),
            registry: Registry::default(),
        };
        registry.register("http_requests", "Responses by route and status", metrics.requests.clone());
        registry.register("http_connections", "Open connections", metrics.connections.clone());
        registry.register_with_unit(
            "time_to_first_token",
            "Time from the submission of a sequence to its first token",
            Unit::Seconds,
            metrics.first_token.clone(),
        );
        registry.register_with_unit(
            "time_between_tokens",
            "Time from a token of a sequence to the next",
            Unit::Seconds,
            metrics.between_tokens.clone(),
        );
        registry.register_collector(Box::new(EngineCollector(engine)));
        Self { registry, ..metrics }
    }

    /// Counts a response.
    pub(super) fn response(&self, route: &'static str, status: u16) {
        self.requests.get_or_create(&RequestLabels { route, status }).inc();
    }

    /// Counts a token that came `pause` after the one before it, or after its sequence was submitted.
    pub(super) fn token(&self, is_first: bool, pause: Duration) {
        let histogram = if is_first { &self.first_token } else { &self.between_tokens };
        histogram.observe(pause.as_secs_f64());
    }

    /// Counts a connection while the returned value exists.
    pub(super) fn connection(&self) -> OpenConnection {
        self.connections.inc();
        OpenConnection(self.connections.clone())
    }

    /// All metrics as text.
    pub(super) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// An open connection, for the gauge.
#[derive(Debug)]
pub(super) struct OpenConnection(Gauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Reads the engine's counters when the metrics are read.
#[derive(Debug)]
struct EngineCollector(Engine);

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let status = self.0.status();
        for (name, help, value) in [
            ("slots", "Sequences that can be generated at once", status.slots),
            ("slots_busy", "Slots with a sequence", status.busy),
            ("requests_waiting", "Sequences that wait for a slot", status.waiting),
            ("cache_tokens", "Tokens in the KV cache", status.cached_tokens),
            ("cache_capacity_tokens", "Tokens that the KV cache has room for", status.cache_capacity),
            ("cache_bytes", "Bytes of the KV cache", status.cache_bytes as usize),
        ] {
            let gauge = ConstGauge::new(value as i64);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        for (name, help, value) in [
            ("prompt_tokens_computed", "Tokens of prompts that were computed", status.prompt_tokens_computed),
            ("prompt_tokens_reused", "Tokens of prompts that were in the cache", status.prompt_tokens_reused),
            ("generated_tokens", "New tokens", status.tokens_generated),
            ("forward_passes", "Forward passes", status.passes),
            ("sequences_refused", "Sequences that the engine refused", status.refused),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let seconds = ConstCounter::new(status.pass_time.as_secs_f64());
        let help = "Time in forward passes, sampling included";
        let unit = Unit::Seconds;
        seconds.encode(encoder.encode_descriptor("forward_pass_time", help, Some(&unit), seconds.metric_type())?)?;
        let help = "Sequences that ended, by reason";
        let kind = ConstCounter::new(0u64).metric_type();
        let mut ended = encoder.encode_descriptor("sequences_ended", help, None, kind)?;
        for (reason, value) in [
            ("eos", status.ended.eos),
            ("length", status.ended.length),
            ("stop_string", status.ended.interrupted),
            ("cancelled", status.ended.cancelled),
            ("out_of_time", status.ended.out_of_time),
            ("failed", status.ended.failed),
        ] {
            ConstCounter::new(value).encode(ended.encode_family(&[("reason", reason)])?)?;
        }
        Ok(())
    }
}
