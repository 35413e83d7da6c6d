//! Bytes that the ranks of a distributed run sent and held, measured and predicted.

use moonlight_model::CausalLm;
use moonlight_optim::MuonAdamW;
use moonlight_optim::distributed::BytesSent;

use super::exchange::{all_gather, exchange_fields};
use crate::error::TrainError;

/// Bytes of one rank over the whole run.
struct RankBytes {
    gradients: u64,
    momentum: u64,
    parameters: u64,
    numbers: u64,
    /// The optimizer's state, momentum included.
    state: u64,
    /// Muon's momentum alone.
    momentum_state: u64,
}

exchange_fields!(RankBytes { gradients, momentum, parameters, numbers, state, momentum_state });

/// A text with the bytes sent per step and the bytes of optimizer state, next to those predicted from the shapes.
pub(super) fn comm_report(
    optimizer: &MuonAdamW,
    model: &CausalLm,
    sent: BytesSent,
    steps: u64,
) -> Result<String, TrainError> {
    let comm = optimizer.communicator();
    let (state, momentum_state) = optimizer.state_bytes();
    let local = RankBytes {
        gradients: sent.reduce_scatter,
        momentum: sent.all_to_all,
        parameters: sent.all_gather,
        numbers: sent.scalars,
        state,
        momentum_state,
    };
    let all = all_gather(comm, &local)?;
    let ranks = comm.size() as f64;
    let mean = |bytes: fn(&RankBytes) -> u64| all.iter().map(|rank| bytes(rank) as f64).sum::<f64>() / ranks;
    let largest = |bytes: fn(&RankBytes) -> u64| all.iter().map(|rank| bytes(rank) as f64).fold(0.0, f64::max);
    let per_step = |bytes: fn(&RankBytes) -> u64| mean(bytes) / steps.max(1) as f64;
    let imbalance = |bytes: fn(&RankBytes) -> u64| if mean(bytes) > 0.0 { largest(bytes) / mean(bytes) } else { 1.0 };
    let [gradients, gathered, parameters] = optimizer.predicted_bytes_sent(model);
    let megabytes = |bytes: f64| format!("{:.3} MB", bytes / 1e6);
    // A sharded AdamW sends gradients and parameters; Muon gathers momentum in addition (arXiv 2502.16982, section 2.3).
    let ratio = |momentum: f64, rest: f64| if rest > 0.0 { (momentum + rest) / rest } else { 1.0 };
    Ok(format!(
        "world size: {}\n\
         sent by a rank in a step:  gradients {}, momentum {}, parameters {}, numbers {}\n\
         predicted from the shapes: gradients {}, momentum {}, parameters {}\n\
         over a sharded AdamW:      {:.4} (the report: from 1 to (4 + 2 + 4) / (4 + 4) = 1.25)\n\
         optimizer state of a rank: mean {}, maximum {} ({:.3} times the mean), {} over all ranks\n\
         momentum of a rank:        mean {}, maximum {} ({:.3} times the mean)",
        comm.size(),
        megabytes(per_step(|rank| rank.gradients)),
        megabytes(per_step(|rank| rank.momentum)),
        megabytes(per_step(|rank| rank.parameters)),
        megabytes(per_step(|rank| rank.numbers)),
        megabytes(gradients),
        megabytes(gathered),
        megabytes(parameters),
        ratio(per_step(|rank| rank.momentum), per_step(|rank| rank.gradients) + per_step(|rank| rank.parameters)),
        megabytes(mean(|rank| rank.state)),
        megabytes(largest(|rank| rank.state)),
        imbalance(|rank| rank.state),
        megabytes(mean(|rank| rank.state) * ranks),
        megabytes(mean(|rank| rank.momentum_state)),
        megabytes(largest(|rank| rank.momentum_state)),
        imbalance(|rank| rank.momentum_state),
    ))
}
