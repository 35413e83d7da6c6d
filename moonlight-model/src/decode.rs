//! Text from the model, token by token or many at a time.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData};

use crate::cache::KvCache;
use crate::forward::{DecodeContext, ForwardContext};
use crate::kernels::CacheSpan;
use crate::model::CausalLm;
use crate::rayon_pool::run_in_pool;

/// New tokens that [`CausalLm::extend`] takes at a time, which bounds the memory of a long prompt. The experts of a
/// Moonlight layer get 48 rows each then, enough for their product to be bound by arithmetic.
const CHUNK_TOKENS: usize = 512;

impl CausalLm {
    /// The logits of tokens that follow those in the cache, which takes them in: `[batch, new]` to
    /// `[batch, new, vocab]`. Has no gradient.
    ///
    /// # Panics
    ///
    /// When the cache has no room for the tokens, or was made for another batch or model.
    pub fn decode(&self, tokens: Tensor<2, Int>, cache: &mut KvCache) -> Tensor<3> {
        let [batch, new] = tokens.dims();
        let device = tokens.device();
        let spans = cache.append(&vec![new; batch]);
        run_in_pool(&device, || {
            let hidden = self.decode_layers(tokens.reshape([1, batch * new]), spans, cache);
            self.head(hidden).reshape([batch, new, self.config().vocab_size])
        })
    }

    /// The logits of the token that follows each sequence, after each took in tokens of its own: `tokens` has them for every
    /// sequence of the cache, none for one that rests; `[sequences with new tokens, vocab]`. Has no gradient.
    ///
    /// Prompts and single tokens may come together. Long ones are taken in pieces, and the head runs for each sequence's
    /// last token alone.
    ///
    /// # Panics
    ///
    /// When the cache has no room for the tokens, or was made for another batch or model; when no sequence has a token.
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
                if !last.is_empty() {
                    let last = Tensor::<1, Int>::from_data(TensorData::from(last.as_slice()), &device);
                    ends.push(hidden.select(0, last));
                }
            }
            self.head(Tensor::cat(ends, 0))
        })
    }

    /// The last layer's output, `[tokens, hidden]`, of `[1, tokens]`, which belong to sequences as `spans` says.
    fn decode_layers(&self, tokens: Tensor<2, Int>, spans: Arc<Vec<CacheSpan>>, cache: &mut KvCache) -> Tensor<2> {
        let positions: Vec<u32> = spans.iter().flat_map(|span| span.start as u32..span.end() as u32).collect();
        let rotation = self.rotary().at(&positions, &tokens.device());
        let starts = (spans.len() > 1).then(|| span_starts(&spans));
        let new = DecodeContext { tokens: ForwardContext::decoding(rotation, positions.len(), starts), spans };
        let layers = self.layers.iter().zip(&mut cache.layers);
        layers.fold(self.embed(tokens), |x, (layer, cache)| layer.decode(x, &new, cache))
    }
}

/// Takes up to [`CHUNK_TOKENS`] tokens off the sequences, in order: the tokens, how many of each sequence, and the places in the
/// chunk of tokens that are their sequence's last.
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

/// For each token the place of its span's first.
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
    fn chunks_take_every_token_once_and_mark_the_last() {
        let long: Vec<u32> = (0..CHUNK_TOKENS as u32 + 3).collect();
        let mut rest: [&[u32]; 4] = [&[7, 8], &[], &long, &[9]];
        let (chunk, counts, last) = next_chunk(&mut rest);
        assert_eq!((chunk.len(), counts, last), (CHUNK_TOKENS, vec![2, 0, CHUNK_TOKENS - 2, 0], vec![1]));
        let (chunk, counts, last) = next_chunk(&mut rest);
        assert_eq!((chunk.last(), counts, last), (Some(&9), vec![0, 0, 5, 1], vec![4, 5]));
        assert!(rest.iter().all(|rest| rest.is_empty()));
    }

    #[test]
    fn a_token_knows_where_its_run_began() {
        let span = |sequence, count| CacheSpan { sequence, start: 4, count };
        assert_eq!(span_starts(&[span(0, 2), span(3, 3)]), [0, 0, 2, 2, 2]);
    }
}
