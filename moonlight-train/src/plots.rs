//! Plots of a run, drawn from its `metrics.jsonl`.

use std::fs;
use std::path::Path;

use plotters::prelude::*;
use serde_json::Value;

use crate::error::TrainError;

/// A plot: its file, its title, and the curves of `(split, key, name)`.
struct Plot {
    file: &'static str,
    title: &'static str,
    curves: &'static [(&'static str, &'static str, &'static str)],
}

const PLOTS: &[Plot] = &[
    Plot {
        file: "loss.svg",
        title: "Loss (nats per token)",
        curves: &[("train", "loss", "training"), ("valid", "loss", "validation")],
    },
    Plot { file: "lr.svg", title: "Learning rate", curves: &[("train", "lr", "learning rate")] },
    Plot { file: "grad_norm.svg", title: "Gradient norm", curves: &[("train", "grad_norm", "before clipping")] },
    Plot {
        file: "expert_load.svg",
        title: "Expert load, busiest over mean (worst layer)",
        curves: &[("train", "expert_imbalance", "imbalance")],
    },
];

const SIZE: (u32, u32) = (900, 540);

/// Draws `loss.svg`, `lr.svg`, `grad_norm.svg` and, for a mixture of experts, `expert_load.svg` into `dir`.
///
/// # Errors
///
/// A file that cannot be read or written.
pub fn write_plots(metrics: &Path, dir: &Path) -> Result<(), TrainError> {
    let text = fs::read_to_string(metrics).map_err(TrainError::read(metrics))?;
    let records: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    fs::create_dir_all(dir).map_err(TrainError::write(dir))?;
    for plot in PLOTS {
        let curves: Vec<(&str, Vec<(f64, f64)>)> =
            plot.curves.iter().map(|(split, key, name)| (*name, points(&records, split, key))).collect();
        if curves.iter().any(|(_, points)| !points.is_empty()) {
            let path = dir.join(plot.file);
            let svg = draw(plot.title, &curves)
                .map_err(|problem| TrainError::write(&path)(std::io::Error::other(problem)))?;
            fs::write(&path, svg).map_err(TrainError::write(&path))?;
        }
    }
    Ok(())
}

/// The values of a key over the steps.
fn points(records: &[Value], split: &str, key: &str) -> Vec<(f64, f64)> {
    let of_split = records.iter().filter(|record| record["split"] == split);
    of_split.filter_map(|record| Some((record["step"].as_f64()?, record[key].as_f64()?))).collect()
}

fn draw(title: &str, curves: &[(&str, Vec<(f64, f64)>)]) -> Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw_on(&area, title, curves).map_err(|error| error.to_string())?;
        area.present().map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

fn draw_on(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    curves: &[(&str, Vec<(f64, f64)>)],
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let all = || curves.iter().flat_map(|(_, points)| points);
    let range = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        // A flat curve still wants a height.
        let margin = if high > low { (high - low) * 0.04 } else { high.abs().max(1e-9) * 0.1 };
        low - margin..high + margin
    };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(76)
        .build_cartesian_2d(range(|point| point.0), range(|point| point.1))?;
    let label = |value: &f64| match value.abs() {
        size if size != 0.0 && size < 1e-2 => format!("{value:.1e}"),
        _ => format!("{value:.2}"),
    };
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&label)
        .draw()?;
    for (index, (name, points)) in curves.iter().enumerate() {
        let color = [RGBColor(31, 90, 180), RGBColor(214, 96, 20)][index % 2];
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.8)).draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_run_has_three_plots_and_one_step_is_enough() {
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
