//! Benchmark of the serving engine on `bench-small`. Prints lines of JSON:
//!
//! * tokens per second of the engine and of `generate_many`, in turns, for 1 and for 8 sequences;
//! * milliseconds to sample a token from Moonlight's vocabulary;
//! * whether eight sequences have the same log-probabilities as each alone, bit for bit;
//! * the longest pause of a stream while a long prompt is computed in chunks of different sizes.
//!
//! `cargo run --release -p moonlight-infer --features server --example bench_engine -- [tokens] [rounds]`

use std::time::{Duration, Instant};

use burn::tensor::Device;
use moonlight_infer::engine::{Engine, EngineOptions, Event, Events, Request};
use moonlight_infer::{Sampler, Sampling, generate_many};
use moonlight_model::{CausalLm, ModelConfig};
use serde_json::json;

/// Tokens of a prompt whose continuation is timed.
const PROMPT: u32 = 16;
/// Tokens of the prompt that interrupts a stream.
const LONG_PROMPT: u32 = 3000;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    moonlight_model::keep_freed_memory();
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (tokens, rounds) = (number(64)?, number(5)?);
    println!("{}", sampling()?);
    let model = ModelConfig::preset("bench-small")?.init(&Device::default());
    println!("{}", same_bits(&model)?);
    for batch in [1, 8] {
        println!("{}", speed(&model, batch, tokens, rounds)?);
    }
    for chunk in [32, 64, 128, 256, 512] {
        println!("{}", pause(&model, chunk)?);
    }
    Ok(())
}

fn prompt(index: u32, length: u32) -> Vec<u32> {
    (0..length).map(|position| (position * 31 + index * 977 + position * index) % 8192).collect()
}

/// The time of [`Sampler::choose`] for 163,840 logits that are about normal with a standard deviation of 2.5.
fn sampling() -> Result<serde_json::Value, Error> {
    let uniform =
        |token: u32, salt: u32| (token ^ salt).wrapping_mul(2_654_435_761).rotate_left(15) as f32 / u32::MAX as f32;
    let sum = |token: u32| (1..=12u32).map(|salt| uniform(token, salt.wrapping_mul(0x9e37_79b9)) - 0.5).sum::<f32>();
    let logits: Vec<f32> = (0..163_840).map(|token| 2.5 * sum(token)).collect();
    let milliseconds = |sampling: Sampling| -> Result<f64, Error> {
        let mut sampler = Sampler::new(sampling);
        let mut times = Vec::new();
        for _ in 0..20 {
            let start = Instant::now();
            std::hint::black_box(sampler.choose(&logits)?);
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
        Ok(median(times.into_iter()))
    };
    let sampled = Sampling { temperature: 1.0, ..Sampling::default() };
    Ok(json!({
        "greedy_milliseconds": milliseconds(Sampling::default())?,
        "top_k_40_milliseconds": milliseconds(Sampling { top_k: 40, ..sampled })?,
        "top_p_0.9_milliseconds": milliseconds(Sampling { top_p: 0.9, ..sampled })?,
        "all_tokens_milliseconds": milliseconds(sampled)?,
    }))
}

/// Generates eight texts from prompts of one token, at once and one after the other.
fn same_bits(model: &CausalLm) -> Result<serde_json::Value, Error> {
    let events = |slots: usize| -> Result<Vec<Vec<Event>>, Error> {
        let options = EngineOptions { slots, context: 64, ..EngineOptions::default() };
        let engine = Engine::start("model", model.clone(), options)?;
        let requests = (0..8).map(|token| Request { logprobs: Some(5), ..Request::new("model", vec![token], 12) });
        let texts: Result<Vec<Events>, _> = requests.map(|request| engine.submit(request)).collect();
        let read = |mut events: Events| std::iter::from_fn(move || events.blocking_next()).collect();
        Ok(texts?.into_iter().map(read).collect())
    };
    Ok(json!({"eight_sequences_have_the_bits_of_each_alone": events(1)? == events(8)?}))
}

/// Both ways in turns, so that other load on the machine affects them alike.
fn speed(model: &CausalLm, batch: usize, tokens: usize, rounds: usize) -> Result<serde_json::Value, Error> {
    let options = EngineOptions { slots: batch, context: 1024, ..EngineOptions::default() };
    let engine = Engine::start("model", model.clone(), options)?;
    let (mut engine_times, mut batch_times, mut pass_shares) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds as u32 {
        let prompts: Vec<Vec<u32>> = (0..batch as u32).map(|index| prompt(100 * round + index, PROMPT)).collect();
        let before = engine.status().pass_time;
        let start = Instant::now();
        let events: Result<Vec<Events>, _> =
            prompts.iter().map(|prompt| engine.submit(Request::new("model", prompt.clone(), tokens))).collect();
        for mut events in events? {
            while events.blocking_next().is_some() {}
        }
        let time = start.elapsed();
        let start = Instant::now();
        generate_many(model, &prompts, batch, tokens, Sampling::default(), &[], |_, _| Ok(()))?;
        // The first round only fills caches.
        if round > 0 {
            batch_times.push(start.elapsed());
            engine_times.push(time);
            pass_shares.push((engine.status().pass_time - before).as_secs_f64() / time.as_secs_f64());
        }
    }
    let rate = |times: &[Duration]| (batch * tokens) as f64 / median(times.iter().map(Duration::as_secs_f64));
    let ratios = engine_times.iter().zip(&batch_times).map(|(a, b)| b.as_secs_f64() / a.as_secs_f64());
    Ok(json!({
        "sequences": batch,
        "engine_tokens_per_second": rate(&engine_times),
        "generate_many_tokens_per_second": rate(&batch_times),
        "median_ratio": median(ratios),
        "time_outside_passes": 1.0 - median(pass_shares.into_iter()),
    }))
}

/// The pauses of a stream while another request's prompt is computed.
fn pause(model: &CausalLm, prefill_chunk: usize) -> Result<serde_json::Value, Error> {
    let options = EngineOptions { slots: 2, context: 4096, prefill_chunk, ..EngineOptions::default() };
    let engine = Engine::start("model", model.clone(), options)?;
    let mut stream = engine.submit(Request::new("model", prompt(1, PROMPT), 2000))?;
    let gap = |stream: &mut Events| {
        let start = Instant::now();
        stream.blocking_next();
        start.elapsed()
    };
    let alone: Vec<Duration> = (0..40).map(|_| gap(&mut stream)).skip(8).collect();
    let start = Instant::now();
    let mut long = engine.submit(Request::new("model", prompt(2, LONG_PROMPT), 1))?;
    let reader = std::thread::spawn(move || {
        let first = matches!(long.blocking_next(), Some(Event::Token { .. }));
        (first, start.elapsed())
    });
    let mut gaps = Vec::new();
    while !reader.is_finished() {
        gaps.push(gap(&mut stream));
    }
    let (_, first_token) = reader.join().map_err(|_| "the reader panicked")?;
    Ok(json!({
        "prefill_chunk": prefill_chunk,
        "long_prompt": LONG_PROMPT,
        "milliseconds_between_tokens": 1e3 * median(alone.iter().map(Duration::as_secs_f64)),
        "longest_pause_milliseconds": 1e3 * gaps.iter().max().map_or(0.0, Duration::as_secs_f64),
        "first_token_of_long_prompt_seconds": first_token.as_secs_f64(),
    }))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
