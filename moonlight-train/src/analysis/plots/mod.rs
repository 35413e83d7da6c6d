//! Plots from `metrics.jsonl`: those that a run draws at its end, and the curves of several runs in one figure.

pub(crate) mod draw;
mod runs;

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::error::TrainError;
use crate::metrics::{METRICS, read_records};

use draw::{Chart, Format, Series, draw};
pub use runs::{Axis, RunComparison, plot_runs};

/// Draws `loss.svg`, `lr.svg`, `grad_norm.svg` and, for a mixture of experts, `expert_load.svg` into `dir`.
///
/// # Errors
///
/// A file that cannot be read or written.
pub fn write_plots(metrics: &Path, dir: &Path) -> Result<(), TrainError> {
    let records = read_records(metrics)?;
    fs::create_dir_all(dir).map_err(TrainError::write(dir))?;
    for metric in METRICS {
        let Some(plot) = &metric.plot else { continue };
        let validation = metric.validated.then_some(("valid", "validation"));
        let curves: Vec<Series> = [("train", plot.legend)]
            .into_iter()
            .chain(validation)
            .enumerate()
            .map(|(color, (split, name))| Series::curve(name, points(&records, split, metric.key), color))
            .collect();
        if curves.iter().any(|curve| !curve.points.is_empty()) {
            let path = dir.join(format!("{}.svg", plot.file));
            let (title, x, y) = (plot.title.into(), draw::Axis::linear("step"), draw::Axis::linear(""));
            let svg = draw(&Chart { title, x, y, series: curves }, Format::Svg)
                .map_err(|problem| TrainError::write(&path)(std::io::Error::other(problem)))?;
            fs::write(&path, svg).map_err(TrainError::write(&path))?;
        }
    }
    Ok(())
}

/// `(step, value)` of a key, for the records of a split.
fn points(records: &[Value], split: &str, key: &str) -> Vec<(f64, f64)> {
    let of_split = records.iter().filter(|record| record["split"] == split);
    of_split.filter_map(|record| Some((record["step"].as_f64()?, record[key].as_f64()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_run_of_one_step_gets_three_plots() {
        let home = tempfile::tempdir().unwrap();
        let metrics = home.path().join("metrics.jsonl");
        fs::write(&metrics, "{\"split\":\"train\",\"step\":1,\"loss\":2.5,\"lr\":0.0,\"grad_norm\":1.0}\n").unwrap();
        write_plots(&metrics, &home.path().join("plots")).unwrap();
        let mut files: Vec<_> =
            fs::read_dir(home.path().join("plots")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        files.sort();
        assert_eq!(files, ["grad_norm.svg", "loss.svg", "lr.svg"]);
        let svg = fs::read_to_string(home.path().join("plots/loss.svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("training"));
    }
}
