//! The rows of each point of a study, and the values that tables show of them.

use crate::error::TrainError;
use crate::study::points::{Point, Progress, points};
use crate::study::run_table::{Measured, RunRow, RunTable};
use crate::study::statistics::mean_interval;
use crate::study::study_file::{Axis, Study};

/// A study with its table.
pub(super) struct Results<'a> {
    pub(super) study: &'a Study,
    pub(super) table: &'a RunTable,
    pub(super) progress: Progress,
}

impl<'a> Results<'a> {
    pub(super) fn new(study: &'a Study, table: &'a RunTable) -> Self {
        Self { study, table, progress: Progress::new(study, table) }
    }

    pub(super) fn axes(&self) -> &'a [Axis] {
        &self.study.tier.axes
    }

    pub(super) fn points(&self) -> Vec<Point> {
        points(self.axes())
    }

    /// The rows of a point at its best rate, in the order of the seeds; none before its search has ended.
    pub(super) fn rows(&self, point: &Point) -> Vec<&'a RunRow> {
        let Some(tuned) = self.progress.tuned(self.study, point) else { return Vec::new() };
        let row = |&seed: &u64| {
            self.table.find(self.study, &crate::study::points::Wanted { point: point.clone(), tuned, seed })
        };
        self.study.tier.seeds.iter().filter_map(row).collect()
    }

    /// The position of an axis.
    pub(super) fn axis(&self, name: &str) -> Result<usize, TrainError> {
        self.axes().iter().position(|axis| axis.name == name).ok_or_else(|| TrainError::Request {
            problem: format!(
                "a section of the study `{}` names the axis `{name}`, which it does not have",
                self.study.name
            ),
            hint: Some(format!(
                "choose one of: {}",
                self.axes().iter().map(|axis| axis.name.as_str()).collect::<Vec<_>>().join(", ")
            )),
        })
    }

    /// The position of a value of an axis.
    pub(super) fn value(&self, axis: usize, name: &str) -> Result<usize, TrainError> {
        let values = &self.axes()[axis].values;
        values.iter().position(|value| value.name == name).ok_or_else(|| TrainError::Request {
            problem: format!("the axis `{}` has no value `{name}`", self.axes()[axis].name),
            hint: Some(format!(
                "choose one of: {}",
                values.iter().map(|value| value.name.as_str()).collect::<Vec<_>>().join(", ")
            )),
        })
    }

    /// The name of a point, without one of its axes; `all` if nothing is left.
    pub(super) fn name(&self, point: &Point, without: Option<usize>) -> String {
        let names: Vec<_> = point
            .values(self.axes())
            .enumerate()
            .filter(|(index, _)| Some(*index) != without)
            .map(|(_, (_, value))| value.name.as_str())
            .collect();
        if names.is_empty() { "all".into() } else { names.join(", ") }
    }
}

/// A column: the header of a table, and the value of a run.
pub(super) fn header(column: &str) -> String {
    match column {
        "valid_loss" => "validation loss".into(),
        "train_loss" => "training loss".into(),
        "query_rms" => "query weight RMS".into(),
        "mlp_rms" => "MLP weight RMS".into(),
        "update_rms_muon" => "update RMS, Muon".into(),
        "update_rms_adamw" => "update RMS, AdamW".into(),
        "max_attention_logit" => "largest attention logit".into(),
        "expert_imbalance" => "expert imbalance".into(),
        "newton_schulz_share" => "operations in Newton-Schulz".into(),
        "seconds" => "seconds of training".into(),
        "flops" => "operations".into(),
        task => format!("`{task}`"),
    }
}

/// The value of a column; `None` for a run that diverged or did not measure it.
pub(super) fn value(row: &RunRow, column: &str) -> Option<f64> {
    let measured: &Measured = row.measured.as_ref()?;
    match column {
        "valid_loss" => Some(measured.valid_loss),
        "train_loss" => Some(measured.train_loss),
        "query_rms" => measured.weights.last().map(|weights| weights.query_rms),
        "mlp_rms" => measured.weights.last().map(|weights| weights.mlp_rms),
        "update_rms_muon" => measured.update_rms_muon,
        "update_rms_adamw" => measured.update_rms_adamw,
        "max_attention_logit" => measured.max_attention_logit,
        "expert_imbalance" => measured.expert_imbalance,
        "newton_schulz_share" => Some(measured.newton_schulz_flops / (measured.flops + measured.newton_schulz_flops)),
        "seconds" => Some(measured.seconds),
        "flops" => Some(measured.flops),
        task => measured.tasks.get(task).copied(),
    }
}

/// The mean of several seeds with its interval, the value of one, or a dash.
pub(super) fn cell(values: &[f64]) -> String {
    match (mean_interval(values), values) {
        // What is set and not measured, such as the RMS of `update_norm`, varies by rounding only.
        (Some(interval), _) if interval.half_width() <= 1e-5 * interval.estimate.abs() => {
            significant(interval.estimate)
        }
        (Some(interval), _) => interval.to_string(),
        (None, [one]) => format!("{} (one seed)", significant(*one)),
        _ => "–".into(),
    }
}

/// Four significant digits.
pub(super) fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    match digits {
        0..=8 => format!("{value:.*}", digits as usize),
        _ => format!("{value:.3e}"),
    }
}
