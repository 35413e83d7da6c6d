//! Batched generation: continues many prompts, several at a time (continuous batching).

use moonlight_model::CausalLm;

use super::{
    Generated, INITIAL_CACHE_TOKENS, Sampler, Sampling, StopReason, check_prompt, grow_cache, logit_rows, new_cache,
};
use crate::error::InferError;

/// A sequence that is being generated.
struct ActiveSequence {
    /// The index of its prompt.
    prompt: usize,
    sampler: Sampler,
    /// The new tokens.
    tokens: Vec<u32>,
    /// The input of the next forward pass: the prompt, then the last token.
    input: Vec<u32>,
}

/// Continues each of `prompts`, up to `batch` of them at a time. When a sequence ends, the next prompt takes its row in the
/// batch. `each` is called with the index of a prompt and its continuation, in the order in which the continuations end.
///
/// The continuation of prompt `i` equals that of [`generate`](super::generate) with the seed `sampling.seed + i`, whatever the
/// batch size, except that a batch may sum in a different order and round differently.
///
/// # Errors
///
/// Those of [`check_prompt`] for any prompt, before anything is generated; [`InferError::NonFinite`]; and those of `each`.
pub fn generate_many(
    model: &CausalLm,
    prompts: &[Vec<u32>],
    batch: usize,
    max_new_tokens: usize,
    sampling: Sampling,
    eos: &[u32],
    mut each: impl FnMut(usize, Generated) -> Result<(), InferError>,
) -> Result<(), InferError> {
    let config = model.config();
    for prompt in prompts {
        check_prompt(prompt, config.vocab_size, config.max_position_embeddings)?;
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut slots: Vec<Option<ActiveSequence>> = (0..batch.clamp(1, prompts.len().max(1))).map(|_| None).collect();
    let max_tokens = longest.saturating_add(max_new_tokens).min(config.max_position_embeddings);
    let mut cache = new_cache(model, slots.len(), max_tokens.min(longest + INITIAL_CACHE_TOKENS));
    let mut waiting = prompts.iter().enumerate();
    loop {
        for (sequence, slot) in slots.iter_mut().enumerate().filter(|(_, slot)| slot.is_none()) {
            *slot = waiting.next().map(|(index, prompt)| {
                cache.truncate(sequence, 0); // drops the keys and values of the sequence that ended
                let sampling = Sampling { seed: sampling.seed.wrapping_add(index as u64), ..sampling };
                ActiveSequence {
                    prompt: index,
                    sampler: Sampler::new(sampling),
                    tokens: Vec::new(),
                    input: prompt.clone(),
                }
            });
        }
        for (sequence, slot) in slots.iter_mut().enumerate() {
            let is_full = |active: &ActiveSequence| {
                active.tokens.len() == max_new_tokens || cache.lengths()[sequence] + active.input.len() > max_tokens
            };
            if let Some(ended) = slot.take_if(|active| is_full(active)) {
                each(ended.prompt, Generated { tokens: ended.tokens, stop: StopReason::Length, stop_token: None })?;
            }
        }
        // An empty slot has an empty input and no row in the logits.
        let inputs: Vec<&[u32]> =
            slots.iter().map(|slot| slot.as_ref().map_or(&[][..], |active| &active.input)).collect();
        if inputs.iter().all(|input| input.is_empty()) {
            if waiting.len() == 0 {
                return Ok(());
            }
            continue; // every sequence of the batch has just ended: start the next prompts
        }
        let needed = cache.lengths().iter().zip(&inputs).map(|(length, input)| length + input.len()).max();
        grow_cache(&mut cache, needed.unwrap_or(0), max_tokens);
        let mut logits = logit_rows(model.extend(&inputs, &mut cache)).into_iter();
        for slot in &mut slots {
            let Some(active) = slot else { continue };
            let next = active.sampler.choose(&logits.next().expect("each sequence with an input has logits"))?;
            if eos.contains(&next) {
                if let Some(ended) = slot.take() {
                    each(
                        ended.prompt,
                        Generated { tokens: ended.tokens, stop: StopReason::Eos, stop_token: Some(next) },
                    )?;
                }
            } else {
                active.tokens.push(next);
                active.input = vec![next];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use moonlight_model::ModelConfig;
    use serde_json::json;

    use super::super::generate;
    use super::*;

    fn model() -> CausalLm {
        let shape = json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 24, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
        });
        let device = Device::flex();
        device.seed(7);
        ModelConfig::from_value(shape).unwrap().init(&device)
    }

    #[test]
    fn a_batch_generates_the_same_as_each_prompt_alone() {
        let model = model();
        // More prompts than slots, and one that ends at the context.
        let prompts: Vec<Vec<u32>> =
            [3, 1, 20, 7, 5].iter().map(|&length| (0..length).map(|index| index * 5 % 32).collect()).collect();
        for temperature in [0.0, 1.0] {
            let sampling = |seed| Sampling { temperature, seed, ..Default::default() };
            let alone = |eos: &[u32]| -> Vec<Generated> {
                let texts = prompts.iter().zip(11..);
                texts.map(|(prompt, seed)| generate(&model, prompt, 9, sampling(seed), eos, |_| {}).unwrap()).collect()
            };
            // The first sequence ends at its fifth token.
            let eos = [alone(&[])[0].tokens[4]];
            for batch in [1, 3, 99] {
                let mut texts = vec![None; prompts.len()];
                generate_many(&model, &prompts, batch, 9, sampling(11), &eos, |index, text| {
                    assert!(texts[index].replace(text).is_none(), "each text ends once");
                    Ok(())
                })
                .unwrap();
                let texts: Vec<Generated> = texts.into_iter().map(Option::unwrap).collect();
                assert_eq!(texts, alone(&eos), "batch of {batch}, temperature {temperature}");
            }
        }
        assert!(generate_many(&model, &[vec![1], vec![]], 2, 3, Sampling::default(), &[], |_, _| Ok(())).is_err());
    }

    #[test]
    fn zero_new_tokens_end_at_once() {
        let model = model();
        let mut ended = Vec::new();
        let prompts = [vec![1], vec![2, 3], vec![4]];
        generate_many(&model, &prompts, 2, 0, Sampling::default(), &[], |index, text| {
            ended.push((index, text.tokens.len(), text.stop));
            Ok(())
        })
        .unwrap();
        assert_eq!(ended, [(0, 0, StopReason::Length), (1, 0, StopReason::Length), (2, 0, StopReason::Length)]);
    }

    /// Even with the largest context that a config can have, memory grows only with the tokens, and a cache that grows
    /// keeps its contents.
    #[test]
    fn a_cache_grows_with_its_tokens() {
        let shape = json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 4294967295u64, "rms_norm_eps": 1e-5,
            "initializer_range": 0.3,
        });
        let device = Device::flex();
        device.seed(7);
        let model = ModelConfig::from_value(shape).unwrap().init(&device);
        let prompt = vec![1, 2, 3];
        let count = super::super::INITIAL_CACHE_TOKENS + 100;
        let mut session = super::super::Session::new(&model, usize::MAX);
        let mut sampler = Sampler::new(Sampling::default());
        let each = |_| std::ops::ControlFlow::Continue(());
        let grown = session.generate(&prompt, count, &mut sampler, &[], each).unwrap();
        let mut cache = moonlight_model::KvCache::new(model.config(), 1, 2 * count, &device, model.dtype());
        let mut input = prompt.clone();
        for token in &grown.tokens {
            let logits = logit_rows(model.extend(&[&input], &mut cache)).remove(0);
            assert_eq!(sampler.choose(&logits).unwrap(), *token);
            input = vec![*token];
        }
        let many = [prompt.clone(), vec![4]];
        generate_many(&model, &many, 2, count, Sampling::default(), &[], |index, text| {
            assert!(index > 0 || text == grown);
            Ok(())
        })
        .unwrap();
        // Damaged weights are an error.
        let mut model = model;
        model.norm.weight = model.norm.weight.map(|weight| weight * f32::NAN);
        let error = generate(&model, &prompt, 3, Sampling::default(), &[], |_| {}).unwrap_err();
        assert!(matches!(error, InferError::NonFinite { .. }), "{error}");
        let error = generate_many(&model, &many, 2, 3, Sampling::default(), &[], |_, _| Ok(())).unwrap_err();
        assert!(matches!(error, InferError::NonFinite { .. }), "{error}");
        let error = crate::score::score(&model, &prompt).unwrap_err();
        assert!(error.to_string().contains("token 2 of the sequence is non-finite"), "{error}");
    }
}
