//! What a run left in its folder, as the table has it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use moonlight_convert::Checkpoint;
use moonlight_infer::run_dir::checkpoint_folders;
use serde_json::Value;

use super::cost::Cost;
use super::run_table::{GroupStatistics, Measured, WeightStatistics};
use super::study_file::Spectra;
use crate::analysis::spectrum::{ExpertSelection, MatrixGroup, MatrixSpectrum, by_group, layer_spectra};
use crate::error::TrainError;
use crate::metrics::read_records;
use crate::recipe::Recipe;

/// Points of a training curve.
const CURVE_POINTS: usize = 40;

/// Reads the folder of a complete run.
///
/// # Errors
///
/// Files that cannot be read, or a run without validation.
pub fn measure(recipe: &Recipe, spectra: Spectra) -> Result<Measured, TrainError> {
    let folder = recipe.run.folder();
    let records = read_records(&folder.join("metrics.jsonl"))?;
    let of = |split: &str| records.iter().filter(|record| record["split"] == split).collect::<Vec<_>>();
    let (train, valid) = (of("train"), of("valid"));
    let missing = |what: &str| TrainError::Request {
        problem: format!("`{}` has no {what}", folder.join("metrics.jsonl").display()),
        hint: Some("a study needs validation data, and `train.log_every = 1`".into()),
    };
    let valid_curve: Vec<(u64, f64)> = valid.iter().filter_map(|record| point(record)).collect();
    let curve: Vec<(u64, f64)> = train.iter().filter_map(|record| point(record)).collect();
    let &(_, valid_loss) = valid_curve.last().ok_or_else(|| missing("validation loss"))?;
    let last = train.last().ok_or_else(|| missing("training step"))?;
    let (steps, tokens) = (last["step"].as_u64().unwrap_or(0), last["tokens"].as_u64().unwrap_or(0));
    let tail = train.len() - train.len().div_ceil(10);
    let mean_of = |records: &[&Value], key: &str| mean(records.iter().filter_map(|record| record[key].as_f64()));

    let tokenizer = recipe.data.open_tokenizer()?;
    let config = recipe.model.config_for(tokenizer.as_ref())?;
    let count = config.parameter_count();
    let cost = Cost::new(recipe, &config, steps, tokens);
    let head = (config.vocab_size * config.hidden_size) as u64;
    // Of the activated parameters, the embedding and the head, which are one matrix if they are tied.
    let outer = if config.tie_word_embeddings { head } else { 2 * head };
    let active = count.activated - outer;
    Ok(Measured {
        steps,
        tokens,
        parameters: count.total,
        active_parameters: active,
        six_n_d: 6.0 * active as f64 * tokens as f64,
        flops: cost.flops,
        newton_schulz_flops: cost.newton_schulz_flops,
        seconds: seconds(&train),
        train_loss: mean_of(&train[tail..], "loss").ok_or_else(|| missing("training loss"))?,
        valid_loss,
        train_curve: curve.chunks(curve.len().div_ceil(CURVE_POINTS).max(1)).filter_map(average).collect(),
        valid_curve,
        max_attention_logit: train.iter().filter_map(|record| record["max_attention_logit"].as_f64()).reduce(f64::max),
        update_rms_muon: mean_of(&train, "update_rms_muon"),
        update_rms_adamw: mean_of(&train, "update_rms_adamw"),
        expert_imbalance: mean_of(&train[tail..], "expert_imbalance"),
        tasks: tasks(&folder.join("evaluation.json"))?,
        weights: weights(&folder.join("checkpoints"), spectra)?,
    })
}

fn point(record: &Value) -> Option<(u64, f64)> {
    Some((record["tokens"].as_u64()?, record["loss"].as_f64()?))
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// The last place of a piece of a curve, with the mean of its losses.
fn average(piece: &[(u64, f64)]) -> Option<(u64, f64)> {
    Some((piece.last()?.0, mean(piece.iter().map(|point| point.1))?))
}

/// The seconds of all steps: their number times the median, because a machine that does something else meanwhile slows some of them.
fn seconds(train: &[&Value]) -> f64 {
    let mut before = 0;
    let mut steps = Vec::new();
    for record in train {
        let tokens = record["tokens"].as_u64().unwrap_or(before);
        if let Some(rate) = record["tokens_per_second"].as_f64().filter(|rate| *rate > 0.0) {
            steps.push((tokens - before) as f64 / rate);
        }
        before = tokens;
    }
    steps.sort_by(f64::total_cmp);
    steps.get(steps.len() / 2).map_or(0.0, |median| median * train.len() as f64)
}

/// The metrics in `evaluation.json`, by the name of the task's file.
fn tasks(path: &Path) -> Result<BTreeMap<String, f64>, TrainError> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = fs::read_to_string(path).map_err(TrainError::read(path))?;
    let all: Value = serde_json::from_str(&text).unwrap_or_default();
    let mut found = BTreeMap::new();
    for (when, prefix) in [("before", "before."), ("after", "")] {
        for task in all[when].as_array().into_iter().flatten() {
            let file = Path::new(task["task"].as_str().unwrap_or_default());
            let name = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            for (metric, estimate) in task["metrics"].as_object().into_iter().flatten() {
                if let Some(value) = estimate["value"].as_f64() {
                    found.insert(format!("{prefix}{name}.{metric}"), value);
                }
            }
        }
    }
    Ok(found)
}

/// The weights of the last checkpoint, or of all.
fn weights(checkpoints: &Path, spectra: Spectra) -> Result<Vec<WeightStatistics>, TrainError> {
    let mut folders = checkpoint_folders(checkpoints).map_err(TrainError::from)?;
    folders.sort();
    let first = if spectra == Spectra::All { 0 } else { folders.len().saturating_sub(1) };
    // A checkpoint of LoRA is an adapter: the spectrum of its product with the base is that of `merge`'s result.
    folders[first..]
        .iter()
        .filter(|folder| folder.join("config.json").exists())
        .map(|folder| of_checkpoint(folder))
        .collect()
}

fn of_checkpoint(folder: &Path) -> Result<WeightStatistics, TrainError> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut matrices = Vec::new();
    for layer in 0..checkpoint.config().num_hidden_layers {
        matrices.extend(layer_spectra(&checkpoint, layer, ExpertSelection { experts: 0, seed: 0 })?);
    }
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let step = name.rsplit('-').next().and_then(|digits| digits.parse().ok()).unwrap_or(0);
    let is_mlp = |matrix: &&MatrixSpectrum| {
        matches!(matrix.group, MatrixGroup::Dense | MatrixGroup::Experts | MatrixGroup::SharedExperts)
    };
    let groups = by_group(&matrices).into_iter().map(|group| {
        let statistics = GroupStatistics {
            entropy: group.entropy,
            stable_rank: group.stable_rank,
            effective_rank: group.effective_rank,
            quantiles: group.quantiles,
        };
        (format!("{:?}", group.group), statistics)
    });
    Ok(WeightStatistics {
        step,
        query_rms: rms(matrices.iter().filter(|matrix| matrix.path.contains("q_proj"))),
        mlp_rms: rms(matrices.iter().filter(is_mlp)),
        groups: groups.collect(),
    })
}

/// The RMS of the elements of matrices, by `sum_i sigma_i^2 = sum of squares`.
fn rms<'a>(matrices: impl Iterator<Item = &'a MatrixSpectrum>) -> f64 {
    let (squares, count) = matrices.fold((0.0, 0.0), |(squares, count), matrix| {
        let [rows, columns] = matrix.shape;
        (squares + matrix.stable_rank * matrix.largest.powi(2), count + (rows * columns) as f64)
    });
    if count > 0.0 { (squares / count).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rms_is_that_of_all_elements() {
        let one = |shape, stable_rank, largest| MatrixSpectrum {
            layer: 0,
            path: "self_attn.q_proj.weight".into(),
            group: MatrixGroup::AttnQO,
            shape,
            entropy: 1.0,
            stable_rank,
            effective_rank: 1.0,
            largest,
            quantiles: Vec::new(),
        };
        // [[3, 0], [0, 4]] and a row of four ones.
        let both = [one([2, 2], 25.0 / 16.0, 4.0), one([1, 4], 1.0, 2.0)];
        assert!((rms(both.iter()) - (29.0f64 / 8.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn results_of_tasks_are_named_after_their_files() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("evaluation.json");
        let task = |acc: f64| {
            format!(
                r#"[{{"task": "runs/corpus/choices.jsonl", "metrics": {{"acc": {{"value": {acc}, "stderr": 0.1}}}}}}]"#
            )
        };
        fs::write(&path, format!(r#"{{"before": {}, "after": {}}}"#, task(0.25), task(0.5))).unwrap();
        let found = tasks(&path).unwrap();
        assert_eq!(found["choices.acc"], 0.5);
        assert_eq!(found["before.choices.acc"], 0.25);
        assert!(tasks(&home.path().join("none")).unwrap().is_empty());
    }
}
