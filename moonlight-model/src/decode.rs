//! Prefill and decode: running new tokens through the model with a [`KvCache`].

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData};

use crate::cache::KvCache;
use crate::forward::{DecodeContext, ForwardContext};
use crate::kernels::CacheSpan;
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
        let device = self.embed_tokens.weight.val().device();
        let mut rest = tokens.to_vec();
        run_in_pool(&device, || {
            let mut ends = Vec::new();
            while rest.iter().any(|rest| !rest.is_empty()) {
                let (chunk, counts, last) = next_chunk(&mut rest);
                let spans = cache.append(&counts);
                let chunk = TensorData::new(chunk, [1, counts.iter().sum()]);
                let hidden = self.decode_layers(Tensor::from_data(chunk, &device), spans, cache);
                // Only the last token of a sequence goes to the head, the widest matrix: other logits are not used.
                if !last.is_empty() {
                    let last = Tensor::<1, Int>::from_data(TensorData::from(last.as_slice()), &device);
                    ends.push(hidden.select(0, last));
                }
            }
            self.head(Tensor::cat(ends, 0))
        })
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

/// Removes up to [`CHUNK_TOKENS`] tokens from the front of the sequences, in order. Returns the tokens, the number from each
/// sequence, and the positions in the chunk of those that are the last of their sequence.
fn next_chunk(rest: &mut [&[u32]]) -> (Vec<i32>, Vec<usize>, Vec<i32>) {
    let (mut chunk, mut counts, mut last) = (Vec::new(), Vec::with_capacity(rest.len()), Vec::new());
    for rest in rest {
        let (taken, after) = rest.split_at(rest.len().min(CHUNK_TOKENS - chunk.len()));
        chunk.extend(taken.iter().map(|&token| token as i32));
        counts.push(taken.len());
        if !taken.is_empty() && after.is_empty() {
            last.push(chunk.len() as i32 - 1);
        }
        *rest = after;
    }
    (chunk, counts, last)
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
    fn chunks_have_every_token_once_and_mark_the_last() {
        let long: Vec<u32> = (0..CHUNK_TOKENS as u32 + 3).collect();
        let mut rest: [&[u32]; 4] = [&[7, 8], &[], &long, &[9]];
        let (chunk, counts, last) = next_chunk(&mut rest);
        assert_eq!((chunk.len(), counts, last), (CHUNK_TOKENS, vec![2, 0, CHUNK_TOKENS - 2, 0], vec![1]));
        let (chunk, counts, last) = next_chunk(&mut rest);
        assert_eq!((chunk.last(), counts, last), (Some(&9), vec![0, 0, 5, 1], vec![4, 5]));
        assert!(rest.iter().all(|rest| rest.is_empty()));
    }

    #[test]
    fn each_token_has_the_start_of_its_span() {
        let span = |sequence, count| CacheSpan { sequence, start: 4, count };
        assert_eq!(span_starts(&[span(0, 2), span(3, 3)]), [0, 0, 2, 2, 2]);
    }
}
