//! Tests of the engine as a whole.

mod faults;
mod limits;
mod logprobs;
mod models;
mod prefixes;
mod schedules;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use moonlight_model::{CausalLm, KvCache, ModelConfig};
use serde_json::json;

use super::*;
use crate::generate::{Sampler, Sampling, StopReason};

pub(super) const VOCAB: u32 = 32;
pub(super) const CONTEXT: usize = 48;

/// A small model with grouped-query attention.
pub(super) fn dense(seed: u64) -> CausalLm {
    init(
        json!({
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
            "initializer_range": 0.3,
        }),
        seed,
    )
}

/// A small model with latent attention and experts.
pub(super) fn latent(seed: u64) -> CausalLm {
    init(
        json!({
            "model_type": "deepseek_v3", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": null,
            "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "norm_topk_prob": true, "routed_scaling_factor": 1.0, "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5, "initializer_range": 0.3, "rope_theta": 10000.0,
        }),
        seed,
    )
}

/// A model whose matrices are larger than a block of any kernel.
pub(super) fn wide(seed: u64) -> CausalLm {
    init(
        json!({
            "model_type": "llama", "vocab_size": 3000, "hidden_size": 320, "intermediate_size": 2500,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "initializer_range": 0.05,
        }),
        seed,
    )
}

fn init(config: serde_json::Value, seed: u64) -> CausalLm {
    // The random numbers are those of the process: without the lock, tests that run at the same time would change the weights.
    static LOCK: Mutex<()> = Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let device = Device::flex();
    device.seed(seed);
    let model = ModelConfig::from_value(config).unwrap().init(&device);
    // Parameters are drawn when they are first read.
    model.forward(burn::tensor::Tensor::from_data([[1i32, 2]], &device));
    model
}

pub(super) fn options(slots: usize) -> EngineOptions {
    EngineOptions { slots, context: CONTEXT, prefill_chunk: 16, ..EngineOptions::default() }
}

pub(super) fn prompt(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|index| (index * 7 + index * index * seed + seed) % VOCAB).collect()
}

/// What a request returned.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Answer {
    pub(super) prompt: Option<Vec<Option<TokenLogprobs>>>,
    pub(super) tokens: Vec<u32>,
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) end: Option<(StopReason, Option<u32>, Usage)>,
    pub(super) error: Option<EngineError>,
}

impl Answer {
    pub(super) fn add(&mut self, event: Event) {
        assert!(self.end.is_none() && self.error.is_none(), "an event after the last");
        match event {
            Event::Prompt(scores) => {
                assert!(self.tokens.is_empty() && self.prompt.is_none());
                self.prompt = Some(scores);
            }
            Event::Token { token, logprobs } => {
                self.tokens.push(token);
                self.logprobs.extend(logprobs);
            }
            Event::End { reason, stop_token, usage, .. } => self.end = Some((reason, stop_token, usage)),
            Event::Failed(error) => self.error = Some(error),
        }
    }

    pub(super) fn usage(&self) -> Usage {
        self.end.unwrap_or_else(|| panic!("{self:?}")).2
    }
}

/// Reads a request to its end.
pub(super) fn read(mut events: Events) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = events.blocking_next() {
        answer.add(event);
    }
    answer
}

pub(super) fn ask(engine: &Engine, request: Request) -> Answer {
    read(engine.submit(request).unwrap())
}

/// Waits until the engine's status fulfills a condition.
pub(super) fn wait_until(engine: &Engine, condition: impl Fn(&EngineStatus) -> bool) -> EngineStatus {
    let start = Instant::now();
    loop {
        let status = engine.status();
        if condition(&status) {
            return status;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{status:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until nothing runs.
pub(super) fn wait_idle(engine: &Engine) -> EngineStatus {
    wait_until(engine, |status| status.busy == 0 && status.waiting == 0)
}

/// Checks an answer against the model run token by token on its own. A batch may round differently, so another token is accepted if
/// logits that differ by rounding lead to it; what follows it is then not compared.
pub(super) fn check(model: &CausalLm, request: &Request, answer: &Answer) {
    check_with_fault(model, request, answer, None);
}

/// [`check`] for a model that fails when it reads the token `fault`.
pub(super) fn check_with_fault(model: &CausalLm, request: &Request, answer: &Answer, fault: Option<u32>) {
    let capacity = CONTEXT;
    let mut cache = KvCache::new(model.config(), 1, capacity, &model.embed_tokens.weight.val().device(), model.dtype());
    let mut history: Vec<Vec<f32>> = Vec::new();
    let limit = request.max_new_tokens.min(capacity + 1 - request.prompt.len());
    let fails = |input: &[u32]| fault.is_some_and(|fault| input.contains(&fault));
    let failed = |tokens: usize| {
        let error = answer.error.as_ref();
        let expected = matches!(error, Some(EngineError::Panicked(_) | EngineError::NonFinite { .. }));
        assert!(
            expected && answer.tokens.len() == tokens,
            "it must fail after {tokens} tokens: {request:?} {answer:?}"
        );
    };
    let mut input = request.prompt.clone();
    if limit == 0 {
        input.pop(); // is not read
        if request.prompt_logprobs.is_some() && fails(&input) {
            return failed(0);
        }
    }
    for index in 0..limit {
        if fails(&input) {
            return failed(index);
        }
        let logits: Vec<f32> = model.extend(&[&input], &mut cache).into_data().try_into_vec().unwrap();
        history.push(logits);
        let expected = choose(request.sampling, &history, 0);
        let stop_token = answer.end.and_then(|(_, stop_token, _)| stop_token);
        let actual = answer.tokens.get(index).copied().or(stop_token);
        if actual != Some(expected) {
            let explained = (1..200).any(|seed| Some(choose(request.sampling, &history, seed)) == actual);
            assert!(explained, "token {index} is {actual:?}, not {expected}: {request:?} {answer:?}");
            return;
        }
        if request.stop_tokens.contains(&expected) && !request.ignore_eos {
            return check_end(request, answer, StopReason::Eos, Some(expected), index);
        }
        if let Some(scores) = answer.logprobs.get(index) {
            let expected_scores = super::logprobs::token_logprobs(&history[index], expected, request.logprobs.unwrap());
            assert!((scores.logprob - expected_scores.logprob).abs() < 2e-5, "{scores:?} {expected_scores:?}");
            assert_eq!(scores.top.len(), request.logprobs.unwrap());
        }
        input = vec![expected];
    }
    check_end(request, answer, StopReason::Length, None, limit);
}

fn check_end(request: &Request, answer: &Answer, reason: StopReason, stop_token: Option<u32>, tokens: usize) {
    let end = answer.end.unwrap_or_else(|| panic!("{request:?} {answer:?}"));
    assert_eq!((end.0, end.1, answer.tokens.len()), (reason, stop_token, tokens), "{request:?} {answer:?}");
    assert_eq!((end.2.prompt_tokens, end.2.new_tokens), (request.prompt.len(), tokens));
    assert!(end.2.reused_tokens < request.prompt.len());
    assert_eq!(answer.logprobs.len(), if request.logprobs.is_some() { tokens } else { 0 });
}

/// The token that a sampler chooses after the logits of the tokens before; with a `seed` other than 0 the last logits are changed
/// by about as much as rounding does.
fn choose(sampling: Sampling, history: &[Vec<f32>], seed: u32) -> u32 {
    let mut sampler = Sampler::new(sampling);
    let (last, before) = history.split_last().unwrap();
    for logits in before {
        sampler.choose(logits).unwrap();
    }
    let noise = |index: usize| {
        let hash = (index as u32 + 1).wrapping_mul(seed).wrapping_mul(2_654_435_761) >> 16;
        if seed == 0 { 0.0 } else { (hash as f32 / 65536.0 - 0.5) * 4e-5 }
    };
    let changed: Vec<f32> = last.iter().enumerate().map(|(index, logit)| logit + noise(index)).collect();
    sampler.choose(&changed).unwrap()
}
