//! One forward pass of an engine. A panic in it is an error of the pass and not the end of the engine.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;

use burn::tensor::{DType, Tensor};
use moonlight_model::KvCache;

use super::model_version::ModelVersion;

/// Logits that are computed at a time, 64 MiB in f32, which exist up to three times while they are converted and copied to the host.
/// The logits of all tokens of a long prompt would be gigabytes.
const LOGITS_AT_ONCE: usize = 1 << 24;

/// The next tokens of a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct PassInput<'a> {
    /// Empty for a sequence that does not take part.
    pub(super) tokens: &'a [u32],
    /// How many of the last of them need logits.
    pub(super) wanted: usize,
}

/// Runs the tokens, an input for each sequence of the cache, through the layers. Returns the output of the wanted tokens,
/// `[wanted, hidden]`, or the message of a panic, after which the cache is in any state.
pub(super) fn run_layers(
    version: &ModelVersion,
    inputs: &[PassInput<'_>],
    cache: &mut KvCache,
) -> Result<Option<Tensor<2>>, String> {
    let tokens: Vec<&[u32]> = inputs.iter().map(|input| input.tokens).collect();
    let wanted: Vec<usize> = inputs.iter().map(|input| input.wanted).collect();
    catch(|| {
        // After a panic the cache is replaced, and what it had prepared is made again.
        let mut prepared = version.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        cache.swap_prepared(&mut prepared);
        let hidden = version.model.extend_hidden(&tokens, &wanted, cache);
        cache.swap_prepared(&mut prepared);
        hidden
    })
}

/// The ranges of rows whose logits are computed together.
pub(super) fn pieces(rows: usize, vocab_size: usize) -> impl Iterator<Item = Range<usize>> {
    let piece = (LOGITS_AT_ONCE / vocab_size.max(1)).max(1);
    (0..rows).step_by(piece).map(move |start| start..rows.min(start + piece))
}

/// The logits of `rows` of `hidden`, in f32, row by row; or the message of a panic.
pub(super) fn run_head(version: &ModelVersion, hidden: &Tensor<2>, rows: Range<usize>) -> Result<Vec<f32>, String> {
    catch(|| {
        let logits = version.model.decode_head(hidden.clone().slice_dim(0, rows));
        logits.cast(DType::F32).into_data().try_into_vec().expect("the logits were cast to f32")
    })
}

/// The result of `call`, or the message of a panic. The panic hook runs as always, so the program prints the message, too.
pub(super) fn catch<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| message(&*payload))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_every_row_and_bounded_logits() {
        assert_eq!(pieces(250, 163_840).collect::<Vec<_>>(), [0..102, 102..204, 204..250]);
        assert_eq!(pieces(2, usize::MAX).collect::<Vec<_>>(), [0..1, 1..2]);
        assert_eq!(pieces(0, 10).count(), 0);
    }
}
