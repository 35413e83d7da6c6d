//! The curves of several runs in one figure.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::Value;

use super::draw::{self, Chart, Format, Series};
use crate::error::TrainError;
use crate::metrics::read_records;
use crate::output_file::OutputFile;

/// The horizontal axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Optimizer steps.
    Step,
    /// Tokens trained on, from the start of the run.
    Tokens,
    /// Seconds spent in steps, without validation and saving.
    Seconds,
}

impl FromStr for Axis {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "step" => Ok(Self::Step),
            "tokens" => Ok(Self::Tokens),
            "seconds" => Ok(Self::Seconds),
            _ => Err("expected step, tokens or seconds".into()),
        }
    }
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Tokens => "tokens",
            Self::Seconds => "seconds of training",
        }
    }
}

/// Runs, and the metric to draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunComparison {
    /// Folders of runs, or their `metrics.jsonl`.
    pub runs: Vec<PathBuf>,
    /// A metric of `metrics.jsonl`, such as `loss`.
    pub metric: String,
    /// The horizontal axis.
    pub axis: Axis,
}

/// Draws a metric of several runs into one file, `.svg` or `.png`. If validation has the metric too, its curve is drawn strong and the
/// one of training pale.
///
/// # Errors
///
/// A run without `metrics.jsonl`, a metric that no run has, another file extension, a file that cannot be written.
pub fn plot_runs(comparison: &RunComparison, output: &Path) -> Result<(), TrainError> {
    let format = match output.extension().and_then(|extension| extension.to_str()) {
        Some("svg") => Format::Svg,
        Some("png") => Format::Png,
        _ => return Err(TrainError::PlotFormat(output.to_owned())),
    };
    let RunComparison { runs, metric, axis } = comparison;
    let mut curves = Vec::new();
    let mut known = BTreeSet::new();
    for (color, (run, name)) in runs.iter().zip(names(runs)).enumerate() {
        let records = read(run)?;
        let found = records.iter().filter_map(Value::as_object).flatten().filter(|(_, value)| value.is_number());
        known.extend(found.map(|(key, _)| key.clone()));
        let [train, valid] = ["train", "valid"].map(|split| points(&records, split, metric, *axis));
        let both = !valid.is_empty() && !train.is_empty();
        if both {
            // Pale, without dots and a second entry in the legend.
            curves.push(Series { strong: false, ..Series::line("", train, color) });
        } else if !train.is_empty() {
            curves.push(Series::curve(&name, train, color));
        }
        if !valid.is_empty() {
            curves.push(Series::curve(name, valid, color));
        }
    }
    if curves.is_empty() {
        let known = known.into_iter().filter(|key| key != "step").collect::<Vec<_>>().join(", ");
        return Err(TrainError::UnknownMetric { metric: metric.clone(), known });
    }
    // Later curves are drawn over earlier ones, so the pale ones of all runs come first.
    curves.sort_by_key(|curve| curve.strong);
    let has_pale = curves.iter().any(|curve| !curve.strong);
    let title = if has_pale { format!("{metric} (validation; training pale)") } else { metric.clone() };
    let chart = Chart { title, x: draw::Axis::linear(axis.name()), y: draw::Axis::linear(""), series: curves };
    let bytes =
        draw::draw(&chart, format).map_err(|problem| TrainError::write(output)(std::io::Error::other(problem)))?;
    OutputFile::write(output, &bytes).map_err(TrainError::write(output))
}

/// The records of a run's `metrics.jsonl`.
fn read(run: &Path) -> Result<Vec<Value>, TrainError> {
    let path = if run.is_dir() { run.join("metrics.jsonl") } else { run.to_owned() };
    read_records(&path)
}

/// A name for each run: that of its folder, or the full path if two have the same name.
fn names(runs: &[PathBuf]) -> Vec<String> {
    let short = |run: &PathBuf| {
        let folder = if run.is_file() { run.parent().unwrap_or(run) } else { run };
        folder.file_name().map(|name| name.to_string_lossy().into_owned())
    };
    let short: Vec<Option<String>> = runs.iter().map(short).collect();
    let name = |(run, name): (&PathBuf, &Option<String>)| match name {
        Some(name) if short.iter().filter(|other| other.as_ref() == Some(name)).count() == 1 => name.clone(),
        _ => run.display().to_string(),
    };
    runs.iter().zip(&short).map(name).collect()
}

/// `(axis, value)` of a metric, for the records of a split.
fn points(records: &[Value], split: &str, metric: &str, axis: Axis) -> Vec<(f64, f64)> {
    let (mut seconds, mut tokens) = (0.0, 0.0);
    let mut points = Vec::new();
    for record in records {
        let number = |key: &str| record[key].as_f64();
        if let (Some(now), Some(rate)) = (number("tokens"), number("tokens_per_second"))
            && rate > 0.0
        {
            // Steps between two log lines are assumed to be as fast as the logged one.
            seconds += (now - tokens) / rate;
            tokens = now;
        }
        let place = match axis {
            Axis::Step => number("step"),
            Axis::Tokens => number("tokens"),
            Axis::Seconds => Some(seconds),
        };
        if let (true, Some(place), Some(value)) = (record["split"] == split, place, number(metric)) {
            points.push((place, value));
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn run(dir: &Path, name: &str, offset: f64) -> PathBuf {
        let folder = dir.join(name);
        fs::create_dir_all(&folder).unwrap();
        let mut lines = String::new();
        for step in 1..=20u32 {
            let loss = offset + 3.0 / f64::from(step);
            let tokens = step * 100;
            lines += &format!(
                "{{\"split\":\"train\",\"step\":{step},\"tokens\":{tokens},\"loss\":{loss},\"lr\":0.1,\
                 \"tokens_per_second\":50.0}}\n"
            );
            if step % 5 == 0 {
                lines += &format!("{{\"split\":\"valid\",\"step\":{step},\"tokens\":{tokens},\"loss\":{loss}}}\n");
            }
        }
        fs::write(folder.join("metrics.jsonl"), lines + "{\"split\":\"tr").unwrap();
        folder
    }

    #[test]
    fn runs_are_drawn_into_one_figure() {
        let home = tempfile::tempdir().unwrap();
        let runs = vec![run(home.path(), "muon", 1.0), run(home.path(), "adamw", 2.0)];
        let records = read(&runs[0]).unwrap();
        assert_eq!(points(&records, "valid", "loss", Axis::Seconds)[1], (20.0, 1.3));
        assert_eq!(points(&records, "train", "loss", Axis::Tokens)[1], (200.0, 2.5));
        let comparison = RunComparison { runs, metric: "loss".into(), axis: Axis::Step };
        let svg = home.path().join("a.svg");
        plot_runs(&comparison, &svg).unwrap();
        let svg = fs::read_to_string(svg).unwrap();
        for expected in ["muon", "adamw", "validation; training pale", "step"] {
            assert!(svg.contains(expected), "{expected}");
        }
        for color in ["stroke=\"#1F77B4\"", "stroke=\"#FF7F0E\""] {
            let lines = svg.split("<polyline").filter(|element| element.split("/>").next().unwrap().contains(color));
            assert_eq!(lines.count(), 3, "two curves, and a line in the legend");
        }
        let png_file = home.path().join("a.png");
        plot_runs(&comparison, &png_file).unwrap();
        let bytes = fs::read(png_file).unwrap();
        let decoder = png::Decoder::new(std::io::Cursor::new(bytes));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!((reader.info().width, reader.info().height), (900, 540));
        // Both runs' colors and the black of letters are there.
        for color in [[31, 119, 180], [255, 127, 14], [0, 0, 0]] {
            assert!(pixels.chunks(3).any(|pixel| pixel == color), "{color:?}");
        }
    }

    #[test]
    fn an_unknown_metric_file_or_run_is_named() {
        let home = tempfile::tempdir().unwrap();
        let runs = vec![run(home.path(), "a", 1.0)];
        let error = |runs: &[PathBuf], metric: &str, file: &str| {
            let comparison = RunComparison { runs: runs.to_vec(), metric: metric.into(), axis: Axis::Step };
            plot_runs(&comparison, &home.path().join(file)).unwrap_err()
        };
        let unknown = error(&runs, "los", "x.svg");
        assert_eq!(unknown.to_string(), "none of the runs has the metric `los`");
        assert_eq!(unknown.hint().unwrap(), "choose one of: loss, lr, tokens, tokens_per_second");
        assert!(error(&runs, "loss", "x.jpg").to_string().contains("neither an SVG nor a PNG"));
        assert!(error(&[home.path().join("missing")], "loss", "x.svg").to_string().contains("missing"));
    }

    #[test]
    fn runs_of_the_same_name_are_shown_by_their_paths() {
        let home = tempfile::tempdir().unwrap();
        let runs =
            vec![run(&home.path().join("x"), "a", 1.0), run(&home.path().join("y"), "a", 1.0), home.path().join("b")];
        let names = names(&runs);
        assert!(names[0].ends_with("x/a") && names[1].ends_with("y/a") && names[2] == "b", "{names:?}");
    }
}
