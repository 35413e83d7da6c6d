//! What a step measures, on one rank and over all of them.

use moonlight_model::ForwardStats;
use moonlight_optim::distributed::Communicator;

use super::exchange::{all_gather, exchange_fields};
use super::step_error::{NonFinite, StepError};
use crate::data::HostBatch;
use crate::metrics::Metrics;

/// The size of one rank's share of a step, or after [`all_reduce`](Self::all_reduce) of the whole step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct StepTotals {
    /// The sum of the loss weights, which counts a predicted token of weight 1 as 1.
    pub(crate) predicted: f64,
    pub(crate) sequences: u64,
    /// Without padding.
    pub(crate) tokens: u64,
}

exchange_fields!(StepTotals { predicted, sequences, tokens });

impl StepTotals {
    /// The size of this rank's micro-batches alone.
    pub(crate) fn local(batches: &[HostBatch]) -> Self {
        Self {
            predicted: batches.iter().map(HostBatch::predicted).sum(),
            sequences: batches.iter().map(|batch| batch.batch as u64).sum(),
            tokens: batches.iter().map(HostBatch::token_count).sum(),
        }
    }

    /// The sums over all ranks.
    pub(crate) fn all_reduce(self, comm: &Communicator) -> Result<Self, StepError> {
        let all = all_gather(comm, &self)?;
        Ok(Self {
            predicted: all.iter().map(|totals| totals.predicted).sum(),
            sequences: all.iter().map(|totals| totals.sequences).sum(),
            tokens: all.iter().map(|totals| totals.tokens).sum(),
        })
    }
}

/// What one rank measured in a step, or after [`all_reduce`](Self::all_reduce) what all ranks measured.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepResult {
    /// Mean over all predicted tokens of the step, in nats. The values of the ranks add up to it: each is the rank's sum of
    /// losses over the step's predicted tokens.
    pub(crate) loss: f64,
    /// Square of the gradient's global norm before clipping. One rank's value covers the parts of the gradient that it owns.
    pub(crate) gradient_squares: f64,
    /// Tokens routed to each expert of each layer, over all micro-batches; `None` for dense layers.
    pub(crate) expert_loads: Vec<Option<Vec<u64>>>,
    /// Set if the probe measured attention logits.
    pub(crate) attention: Option<AttentionLogits>,
    /// The largest attention logit of each head, `[layers][heads]`; empty unless the probe measured them.
    pub(crate) head_logits: Vec<Vec<f64>>,
}

exchange_fields!(StepResult { loss, gradient_squares, expert_loads, attention, head_logits });

/// Attention logits over all layers and heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionLogits {
    pub(crate) largest: f64,
    /// Mean over the layers. The value of a micro-batch or rank is weighted by its share of the step's sequences, so that the
    /// values add up.
    pub(crate) share_above_100: f64,
}

exchange_fields!(AttentionLogits { largest, share_above_100 });

impl StepResult {
    /// Global norm of the gradient before clipping.
    pub(crate) fn gradient_norm(&self) -> f64 {
        self.gradient_squares.sqrt()
    }

    /// Adds a micro-batch. `loss` is its term of the step's mean loss, `share` its share of the step's sequences.
    pub(crate) fn add_micro_batch(&mut self, loss: f64, stats: &ForwardStats, share: f64) {
        let pass = Self {
            loss,
            gradient_squares: 0.0,
            expert_loads: stats.expert_loads(),
            attention: attention_logits(stats, share),
            head_logits: head_logits(stats),
        };
        self.merge(pass);
    }

    /// The result of the whole step. Every rank merges the results of all ranks in the order of the ranks, so that all of them
    /// get the same bits.
    ///
    /// A non-finite loss or gradient is an error on every rank.
    pub(crate) fn all_reduce(self, comm: &Communicator) -> Result<Self, StepError> {
        let all = all_gather(comm, &self)?;
        if let Some((rank, share)) = all.iter().enumerate().find(|(_, share)| !share.loss.is_finite()) {
            let rank = (comm.size() > 1).then_some(rank);
            return Err(NonFinite { what: "loss", value: share.loss, rank }.into());
        }
        let whole = all.into_iter().reduce(|mut whole, share| {
            whole.merge(share);
            whole
        });
        let whole = whole.expect("the world size is at least 1");
        // The norm is a sum over all ranks, so the error names none.
        match whole.gradient_norm() {
            norm if norm.is_finite() => Ok(whole),
            norm => Err(NonFinite { what: "gradient norm", value: norm, rank: None }.into()),
        }
    }

    fn merge(&mut self, other: Self) {
        let Self { loss, gradient_squares, expert_loads, attention, head_logits } = other;
        self.loss += loss;
        self.gradient_squares += gradient_squares;
        merge_each(&mut self.expert_loads, expert_loads, |sum, load| {
            if let (Some(sum), Some(load)) = (sum, load) {
                sum.iter_mut().zip(load).for_each(|(sum, load)| *sum += load);
            }
        });
        merge_each(&mut self.head_logits, head_logits, |largest, logits| {
            largest.iter_mut().zip(logits).for_each(|(largest, logit)| *largest = largest.max(logit));
        });
        self.attention = match (self.attention, attention) {
            (Some(one), Some(other)) => Some(AttentionLogits {
                largest: one.largest.max(other.largest),
                share_above_100: one.share_above_100 + other.share_above_100,
            }),
            (one, other) => one.or(other),
        };
    }

    /// The metrics that follow from the step alone.
    pub(crate) fn metrics(&self) -> Metrics {
        let balance = Metrics::expert_balance(&self.expert_loads);
        Metrics {
            loss: Some(self.loss),
            perplexity: Some(self.loss.exp()),
            grad_norm: Some(self.gradient_norm()),
            expert_imbalance: balance.map(|(imbalance, _)| imbalance),
            dead_experts: balance.map(|(_, dead)| dead),
            max_attention_logit: self.attention.map(|logits| logits.largest),
            share_above_100: self.attention.map(|logits| logits.share_above_100),
            ..Metrics::default()
        }
    }
}

/// Merges two lists element by element. An empty `into` becomes `from`: nothing was added to it yet.
fn merge_each<T>(into: &mut Vec<T>, from: Vec<T>, merge: impl Fn(&mut T, T)) {
    if into.is_empty() {
        *into = from;
    } else {
        into.iter_mut().zip(from).for_each(|(into, from)| merge(into, from));
    }
}

/// The largest attention logit of each head, `[layers][heads]`.
fn head_logits(stats: &ForwardStats) -> Vec<Vec<f64>> {
    let layers = stats.layers.iter().map_while(|layer| layer.max_attention_logit.clone());
    layers.map(|logits| logits.into_data().iter::<f64>().collect()).collect()
}

fn attention_logits(stats: &ForwardStats, share: f64) -> Option<AttentionLogits> {
    let mut result: Option<AttentionLogits> = None;
    for layer in &stats.layers {
        let largest: f64 = layer.max_attention_logit.clone()?.max().into_scalar::<f32>().into();
        let above = f64::from(layer.share_above_100.clone()?.into_scalar::<f32>()) / stats.layers.len() as f64;
        let so_far = result.map_or((f64::NEG_INFINITY, 0.0), |logits| (logits.largest, logits.share_above_100));
        result = Some(AttentionLogits { largest: so_far.0.max(largest), share_above_100: so_far.1 + above });
    }
    result.map(|logits| AttentionLogits { share_above_100: logits.share_above_100 * share, ..logits })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use moonlight_optim::distributed::InProcess;

    use super::*;

    fn share(loss: f64, load: u64, logit: f64) -> StepResult {
        StepResult {
            loss,
            gradient_squares: load as f64,
            expert_loads: vec![None, Some(vec![load, 1])],
            attention: Some(AttentionLogits { largest: logit, share_above_100: 0.25 }),
            head_logits: vec![vec![logit, -logit]],
        }
    }

    /// The result of each of two ranks with these shares.
    fn reduced(shares: [StepResult; 2]) -> Vec<Result<StepResult, StepError>> {
        let collectives = InProcess::collectives(2, Duration::from_secs(20));
        let threads: Vec<_> = collectives
            .into_iter()
            .zip(shares)
            .map(|(collective, share)| std::thread::spawn(move || share.all_reduce(&Communicator::new(collective))))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    #[test]
    fn losses_are_summed_and_logits_take_the_maximum() {
        for result in reduced([share(0.5, 3, 7.0), share(0.25, 6, 9.0)]) {
            let result = result.unwrap();
            assert_eq!((result.loss, result.gradient_norm()), (0.75, 3.0));
            assert_eq!(result.expert_loads, [None, Some(vec![9, 2])]);
            assert_eq!(result.head_logits, [[9.0, -7.0]]);
            let logits = result.attention.unwrap();
            assert_eq!((logits.largest, logits.share_above_100), (9.0, 0.5));
            let metrics = result.metrics();
            assert_eq!((metrics.loss, metrics.dead_experts), (Some(0.75), Some(0.0)));
        }
    }

    #[test]
    fn every_rank_names_the_rank_with_the_non_finite_loss() {
        for result in reduced([share(0.5, 3, 7.0), share(f64::NAN, 6, 9.0)]) {
            let Err(StepError::NonFinite(found)) = result else { panic!("expected an error") };
            assert_eq!((found.what, found.rank), ("loss", Some(1)));
        }
        let Err(StepError::NonFinite(found)) = share(f64::INFINITY, 1, 0.0).all_reduce(&Communicator::single_rank())
        else {
            panic!("expected an error")
        };
        assert_eq!(found.rank, None);
        let mut overflow = share(0.5, 3, 7.0);
        overflow.gradient_squares = f64::INFINITY;
        for result in reduced([share(0.5, 3, 7.0), overflow]) {
            let Err(StepError::NonFinite(found)) = result else { panic!("expected an error") };
            assert_eq!((found.what, found.rank), ("gradient norm", None));
        }
    }
}
