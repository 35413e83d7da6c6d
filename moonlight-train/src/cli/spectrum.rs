//! `moonlight spectrum`.

use std::path::PathBuf;

use clap::Args;
use moonlight_convert::Checkpoint;
use moonlight_infer::resolve_model;
use serde_json::json;

use super::output::print;
use crate::analysis::spectrum::{ExpertSelection, by_group, layer_spectra};
use crate::error::TrainError;

/// Print the SVD entropy, stable rank and effective rank of the weights
///
/// Means over the Muon report's six groups of matrices (arXiv 2502.16982, section 3.4). A matrix of higher entropy uses more of its
/// directions; models trained with Muon have higher entropy than those trained with AdamW.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// A Hugging Face directory, a checkpoint or folder of a run, or `org/name` in the Hub's cache
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The number of routed experts of each layer to measure; 0 for all
    #[arg(long, default_value_t = 3)]
    experts: usize,
    /// The seed that chooses the experts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the matrices and the groups as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let checkpoint = Checkpoint::open(resolve_model(&arguments.model)?)?;
    let selection = ExpertSelection { experts: arguments.experts, seed: arguments.seed };
    let layers = checkpoint.config().num_hidden_layers;
    let mut matrices = Vec::new();
    for layer in 0..layers {
        matrices.extend(layer_spectra(&checkpoint, layer, selection)?);
        tracing::info!("layer {} of {layers}: {} matrices so far", layer + 1, matrices.len());
    }
    let groups = by_group(&matrices);
    if arguments.json {
        return print(&format!("{}\n", json!({"matrices": matrices, "groups": groups})));
    }
    let heads = ("matrices", "SVD entropy", "stable rank", "effective rank");
    let mut text = format!("{:<14} {:>8} {:>12} {:>12} {:>15}\n", "group", heads.0, heads.1, heads.2, heads.3);
    for group in groups {
        let name = format!("{:?}", group.group);
        let (count, entropy) = (group.matrices, group.entropy);
        let (stable, effective) = (group.stable_rank, group.effective_rank);
        text += &format!("{name:<14} {count:>8} {entropy:>12.4} {stable:>12.2} {effective:>15.2}\n");
    }
    print(&text)
}
