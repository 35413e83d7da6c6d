//! Prefill and decode: running new tokens through the model with a [`KvCache`].

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::cache::KvCache;
use crate::forward::{DecodeContext, ForwardContext};
use crate::kernels::CacheSpan;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens::{self, Decoder, Output, Positions, Store};
use crate::model::CausalLm;
use crate::rayon_pool::run_in_pool;

/// Tokens of one pass of [`CausalLm::extend`], which bounds the memory of a long prompt. Each of Moonlight's 64 experts then gets
/// 48 rows on average (512 tokens, 6 experts each), enough for its product to be bound by arithmetic and not by memory.
const CHUNK_TOKENS: usize = 512;

impl CausalLm {
    /// Appends new tokens to every sequence of the cache, and returns the logits of each token. There is no gradient.
    ///
    /// ```
    /// use burn::tensor::{Device, Int, Tensor};
    /// use moonlight_model::{KvCache, ModelConfig};
    ///
    /// let mut config = ModelConfig::preset("bench-small")?;
    /// config.num_hidden_layers = 2;
    /// let device = Device::default();
    /// let model = config.init(&device);
    /// let mut cache = KvCache::new(&config, 1, 16, &device, model.dtype());
    /// model.decode(Tensor::<2, Int>::from_data([[1, 2, 3]], &device), &mut cache); // the prompt
    /// let logits = model.decode(Tensor::<2, Int>::from_data([[4]], &device), &mut cache); // one more token
    /// assert_eq!((logits.dims(), cache.len()), ([1, 1, 8192], 4));
    /// # Ok::<(), moonlight_model::ConfigError>(())
    /// ```
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, new]`
    /// - output: `[batch, new, vocab]`
    ///
    /// # Panics
    ///
    /// If the cache has no room for the tokens, or was made for another batch size or model.
    pub fn decode(&self, tokens: Tensor<2, Int>, cache: &mut KvCache) -> Tensor<3> {
        let [batch, new] = tokens.dims();
        let device = tokens.device();
        let spans = cache.append(&vec![new; batch]);
        #[cfg(feature = "cpu")]
        if let Some(decoder) = self.decoder(batch * new, cache) {
            let tokens: Vec<u32> = tokens.into_data().iter::<u32>().collect();
            let all: Vec<usize> = (0..tokens.len()).collect();
            let logits = self.decode_few(&decoder, &tokens, &spans, &all, cache, Output::Logits);
            return logits.reshape([batch, new, self.config().vocab_size]);
        }
        run_in_pool(&device, || {
            let hidden = self.decode_layers(tokens.reshape([1, batch * new]), spans, cache);
            self.head(hidden).reshape([batch, new, self.config().vocab_size])
        })
    }

    /// Appends new tokens to some sequences of the cache, and returns for each of these the logits of its next token. There is no
    /// gradient.
    ///
    /// `tokens` has a slice for every sequence of the cache, empty for sequences without new tokens. Prompts and single
    /// tokens may be mixed. Long prompts are processed in chunks, and the head runs for the last token of each sequence
    /// only.
    ///
    /// # Shapes
    ///
    /// - output: `[sequences with new tokens, vocab]`, in the order of the cache
    ///
    /// # Panics
    ///
    /// If the cache has no room for the tokens, or was made for another batch size or model; if no sequence has new tokens.
    pub fn extend(&self, tokens: &[&[u32]], cache: &mut KvCache) -> Tensor<2> {
        let wanted: Vec<usize> = tokens.iter().map(|tokens| tokens.len().min(1)).collect();
        #[cfg(feature = "cpu")]
        if let Some(decoder) = self.decoder(tokens.iter().map(|tokens| tokens.len()).sum(), cache) {
            let Chunk { tokens, counts, wanted } = next_chunk(&mut tokens.to_vec(), &wanted);
            let spans = cache.append(&counts);
            return self.decode_few(&decoder, &tokens, &spans, &wanted, cache, Output::Logits);
        }
        run_in_pool(&self.device(), || {
            self.head(self.extend_layers(tokens, &wanted, cache).expect("some sequence has new tokens"))
        })
    }

    /// [`extend`](CausalLm::extend) without the head: appends new tokens to some sequences of the cache, and returns the last
    /// layer's output for the last `wanted[i]` of the new tokens of sequence `i`. `None` if no token is wanted.
    ///
    /// The head is the widest matrix, so a part of a prompt whose logits are not used runs without it, and a caller that needs
    /// the logits of many tokens can pass them to [`decode_head`](CausalLm::decode_head) in pieces: for 8,192 tokens and a
    /// vocabulary of 163,840 all of them are 5.4 GB in f32.
    ///
    /// # Shapes
    ///
    /// - output: `[sum of wanted, hidden]`, in the order of the cache
    ///
    /// # Panics
    ///
    /// If the cache has no room for the tokens, or was made for another batch size or model; if more tokens are wanted than
    /// are new.
    pub fn extend_hidden(&self, tokens: &[&[u32]], wanted: &[usize], cache: &mut KvCache) -> Option<Tensor<2>> {
        assert_eq!(wanted.len(), tokens.len(), "there must be one number of wanted tokens for each sequence");
        let fits = tokens.iter().zip(wanted).all(|(tokens, wanted)| *wanted <= tokens.len());
        assert!(fits, "more tokens are wanted than are new");
        run_in_pool(&self.device(), || self.extend_layers(tokens, wanted, cache))
    }

    /// [`head`](CausalLm::head) for the output of [`extend_hidden`](CausalLm::extend_hidden), as fast as within
    /// [`extend`](CausalLm::extend). There is no gradient.
    ///
    /// # Shapes
    ///
    /// - hidden: `[tokens, hidden]`
    /// - output: `[tokens, vocab]`
    pub fn decode_head(&self, hidden: Tensor<2>) -> Tensor<2> {
        #[cfg(feature = "cpu")]
        if hidden.dims()[0] <= few_tokens::MAX_TOKENS
            && let (Some(head), Some(values)) = (self.decoder_of(Vec::new()), few_tokens::vector(hidden.clone()))
        {
            return head.head(&values);
        }
        run_in_pool(&self.device(), || self.head(hidden))
    }

    /// The dtype for a [`KvCache`] of this model: bf16 if its weights are quantized, whose own error is larger, else
    /// [`dtype`](CausalLm::dtype).
    pub fn cache_dtype(&self) -> DType {
        if self.is_quantized() && self.device().supports_dtype(DType::BF16) { DType::BF16 } else { self.dtype() }
    }

    fn device(&self) -> Device {
        self.embed_tokens.weight.val().device()
    }

    fn extend_layers(&self, tokens: &[&[u32]], wanted: &[usize], cache: &mut KvCache) -> Option<Tensor<2>> {
        let device = self.device();
        let mut rest = tokens.to_vec();
        let mut parts = Vec::new();
        while rest.iter().any(|rest| !rest.is_empty()) {
            let Chunk { tokens, counts, wanted } = next_chunk(&mut rest, wanted);
            let spans = cache.append(&counts);
            let count = tokens.len();
            #[cfg(feature = "cpu")]
            if let Some(decoder) = self.decoder(count, cache) {
                if wanted.is_empty() {
                    // Only the cache is wanted.
                    self.decode_few(&decoder, &tokens, &spans, &[0], cache, Output::Hidden);
                } else {
                    parts.push(self.decode_few(&decoder, &tokens, &spans, &wanted, cache, Output::Hidden));
                }
                continue;
            }
            let tokens = tokens.iter().map(|&token| token as i32).collect();
            let tokens = Tensor::from_data(TensorData::new::<i32, _>(tokens, [1, count]), &device);
            let hidden = self.decode_layers(tokens, spans, cache);
            if wanted.len() == count {
                parts.push(hidden);
            } else if !wanted.is_empty() {
                let wanted: Vec<i32> = wanted.iter().map(|&index| index as i32).collect();
                let wanted = Tensor::<1, Int>::from_data(TensorData::from(wanted.as_slice()), &device);
                parts.push(hidden.select(0, wanted));
            }
        }
        // `cat` would copy a single part.
        if parts.len() < 2 { parts.pop() } else { Some(Tensor::cat(parts, 0)) }
    }

    /// The model as the CPU's kernel for few tokens reads it. `None` if there are too many tokens, or if the kernel does not have what
    /// the model needs.
    ///
    /// It is made once for each cache, so weights must not change while a cache is in use.
    #[cfg(feature = "cpu")]
    fn decoder(&self, tokens: usize, cache: &mut KvCache) -> Option<Arc<Decoder>> {
        if tokens > few_tokens::MAX_TOKENS {
            return None;
        }
        if cache.decoder.is_none() {
            let decoder = self.few_tokens(cache).map(Arc::new);
            cache.decoder = Some(decoder);
        }
        cache.decoder.clone().flatten()
    }

    #[cfg(feature = "cpu")]
    fn few_tokens(&self, cache: &mut KvCache) -> Option<Decoder> {
        if self.device() != Device::flex() || !cache.layers.iter().all(|layer| Store::accepts(&layer.rows())) {
            return None;
        }
        let layers = self.layers.iter().zip(&mut cache.layers).map(|(layer, cache)| layer.few_tokens(cache));
        let layers: Vec<_> = layers.collect::<Option<_>>()?;
        self.decoder_of(layers)
    }

    #[cfg(feature = "cpu")]
    fn decoder_of(&self, layers: Vec<few_tokens::Layer>) -> Option<Decoder> {
        let head = match (&self.head_quantized, &self.lm_head) {
            (Some(head), _) => Some(head.few_tokens()?),
            (None, Some(head)) => Some(few_tokens::Matrix::new(head.weight.val())?),
            (None, None) => None,
        };
        let embedding = few_tokens::Table::new(self.embed_tokens.weight.val())?;
        Some(Decoder::new(embedding, layers, self.norm.few_tokens()?, head))
    }

    /// Runs all layers over new tokens, and returns the output of those that are wanted.
    #[cfg(feature = "cpu")]
    fn decode_few(
        &self,
        decoder: &Decoder,
        tokens: &[u32],
        spans: &[CacheSpan],
        wanted: &[usize],
        cache: &mut KvCache,
        output: Output,
    ) -> Tensor<2> {
        let positions: Vec<u32> = spans.iter().flat_map(|span| span.start as u32..span.end() as u32).collect();
        let (cos, sin) = self.rotary().cos_sin(&positions);
        let positions = Positions { spans, cos: &cos, sin: &sin, interleave: self.rotary().interleaves() };
        let mut stores: Vec<Store> = cache.layers.iter_mut().map(|layer| Store::new(layer.take())).collect();
        let result = decoder.decode(tokens, positions, &mut stores, wanted, output);
        cache.layers.iter_mut().zip(stores).for_each(|(layer, store)| layer.put_back(store.into_tensor()));
        result
    }

    /// Runs the layers over `[1, tokens]`, which `spans` assigns to sequences; returns `[tokens, hidden]`.
    fn decode_layers(&self, tokens: Tensor<2, Int>, spans: Arc<Vec<CacheSpan>>, cache: &mut KvCache) -> Tensor<2> {
        let positions: Vec<u32> = spans.iter().flat_map(|span| span.start as u32..span.end() as u32).collect();
        let rotation = self.rotary().at(&positions, &tokens.device());
        // For a single span the causal mask suffices.
        let starts = (spans.len() > 1).then(|| span_starts(&spans));
        let new = DecodeContext { tokens: ForwardContext::decoding(rotation, positions.len(), starts), spans };
        let layers = self.layers.iter().zip(&mut cache.layers);
        layers.fold(self.embed(tokens), |x, (layer, cache)| layer.decode(x, &new, cache))
    }
}

/// Tokens of one pass.
struct Chunk {
    tokens: Vec<u32>,
    /// The number of tokens from each sequence.
    counts: Vec<usize>,
    /// The indices in `tokens` of those whose output is wanted.
    wanted: Vec<usize>,
}

/// Removes up to [`CHUNK_TOKENS`] tokens from the front of the sequences, in order. The last `wanted[i]` tokens of sequence `i` are
/// wanted.
fn next_chunk(rest: &mut [&[u32]], wanted: &[usize]) -> Chunk {
    let mut chunk = Chunk { tokens: Vec::new(), counts: Vec::with_capacity(rest.len()), wanted: Vec::new() };
    for (rest, wanted) in rest.iter_mut().zip(wanted) {
        let first = chunk.tokens.len();
        let (taken, after) = rest.split_at(rest.len().min(CHUNK_TOKENS - first));
        chunk.tokens.extend(taken);
        chunk.counts.push(taken.len());
        let skipped = rest.len().saturating_sub(*wanted).min(taken.len());
        chunk.wanted.extend(first + skipped..chunk.tokens.len());
        *rest = after;
    }
    chunk
}

/// For each token the index of its span's first token.
fn span_starts(spans: &[CacheSpan]) -> Vec<u32> {
    let mut first = 0;
    spans
        .iter()
        .flat_map(|span| {
            let start = first;
            first += span.count as u32;
            std::iter::repeat_n(start, span.count)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_have_every_token_once_and_mark_those_that_are_wanted() {
        let long: Vec<u32> = (0..CHUNK_TOKENS as u32 + 3).collect();
        let mut rest: [&[u32]; 4] = [&[7, 8], &[], &long, &[9]];
        // Of the long sequence the last token of the first chunk is wanted, and all of the second.
        let wanted = [1, 0, 6, 0];
        let chunk = next_chunk(&mut rest, &wanted);
        assert_eq!((chunk.tokens.len(), chunk.counts), (CHUNK_TOKENS, vec![2, 0, CHUNK_TOKENS - 2, 0]));
        assert_eq!(chunk.wanted, [1, CHUNK_TOKENS - 1]);
        let chunk = next_chunk(&mut rest, &wanted);
        assert_eq!((chunk.tokens.last(), chunk.counts), (Some(&9), vec![0, 0, 5, 1]));
        assert_eq!(chunk.wanted, [0, 1, 2, 3, 4]);
        assert!(rest.iter().all(|rest| rest.is_empty()));
    }

    /// Of a later piece of a prompt keys and values are expanded if it is long, and queries are moved to the latents if it is short.
    #[test]
    fn pieces_of_a_prompt_attend_as_the_whole_does() {
        let device = Device::default();
        let config = serde_json::json!({
            "model_type": "deepseek_v3", "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "initializer_range": 0.2, "q_lora_rank": null, "kv_lora_rank": 40, "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6, "v_head_dim": 7, "n_routed_experts": 4, "num_experts_per_tok": 4,
            "moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.446, "rope_theta": 50000.0,
        });
        let model = crate::ModelConfig::from_value(config).unwrap().init(&device);
        let tokens: Vec<u32> = (0..1000).map(|index| (index * 37 + index / 5) % 61).collect();
        let whole: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let whole = model.forward(Tensor::from_data(TensorData::new(whole, [1, tokens.len()]), &device));
        let mut cache = KvCache::new(model.config(), 2, tokens.len(), &device, model.dtype());
        let mut start = 0;
        for count in [300, 200, 12, 488] {
            let piece = &tokens[start..start + count];
            // A sequence at another position in the same call.
            let other = &tokens[start / 2..start / 2 + count / 2];
            let hidden = model.extend_hidden(&[piece, other], &[count, 0], &mut cache).unwrap();
            let expected = whole.clone().slice_dim(1, start..start + count).squeeze_dim::<2>(0);
            let off = (model.head(hidden) - expected).abs().max().into_scalar::<f32>();
            assert!(off < 2e-4, "tokens from {start}: {off:e}");
            start += count;
        }
    }

    #[test]
    fn each_token_has_the_start_of_its_span() {
        let span = |sequence, count| CacheSpan { sequence, start: 4, count };
        assert_eq!(span_starts(&[span(0, 2), span(3, 3)]), [0, 0, 2, 2, 2]);
    }
}
