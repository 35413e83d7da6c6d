//! Singular values and RMS of the weights, over training and at its end.

use std::collections::BTreeMap;

use super::Part;
use super::results::{Results, cell};
use crate::analysis::plots::draw::{Axis, Chart, Series};
use crate::error::TrainError;
use crate::study::points::Point;
use crate::study::run_table::{GroupStatistics, RunRow, WeightStatistics};
use crate::study::statistics::paired_difference;

/// The report's order of the groups.
const GROUPS: [&str; 6] = ["AttnQO", "AttnKV", "Experts", "SharedExperts", "Router", "Dense"];

fn at_end(row: &RunRow) -> Option<&WeightStatistics> {
    row.measured.as_ref()?.weights.last()
}

/// A statistic of each seed at the end of training.
fn of_group<'a>(rows: &[&'a RunRow], group: &str, statistic: fn(&GroupStatistics) -> f64) -> Vec<f64> {
    rows.iter().filter_map(|row| at_end(row)?.groups.get(group).map(statistic)).collect()
}

/// Points that differ on one axis only, by the name of the rest.
fn families(results: &Results<'_>, axis: usize) -> Vec<(String, Vec<Point>)> {
    let mut families: Vec<(String, Vec<Point>)> = Vec::new();
    for point in results.points() {
        let name = results.name(&point, Some(axis));
        match families.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(point),
            None => families.push((name, vec![point])),
        }
    }
    families
}

pub(super) fn spectra(results: &Results<'_>, axis: &str) -> Result<Part, TrainError> {
    let axis = results.axis(axis)?;
    let mut part = Part::default();
    part.text += "Means over the matrices of a layer, then over layers, then over seeds.\n\n";
    for (family, points) in families(results, axis) {
        let names: Vec<_> =
            points.iter().map(|point| results.axes()[axis].values[point.0[axis]].name.clone()).collect();
        let rows: Vec<Vec<&RunRow>> = points.iter().map(|point| results.rows(point)).collect();
        part.text += &format!("**{family}**, at the end of training\n\n| group |");
        for statistic in ["SVD entropy", "stable rank", "effective rank"] {
            names.iter().for_each(|name| part.text += &format!(" {statistic}, {name} |"));
        }
        part.text += " difference of entropy |\n|---|";
        part.text += &("---|".repeat(3 * names.len() + 1) + "\n");
        let (mut higher, mut total) = (Vec::new(), 0);
        for group in GROUPS {
            if rows.iter().all(|rows| of_group(rows, group, |g| g.entropy).is_empty()) {
                continue;
            }
            part.text += &format!("| {group} |");
            let statistics: [fn(&GroupStatistics) -> f64; 3] = [|g| g.entropy, |g| g.stable_rank, |g| g.effective_rank];
            for statistic in statistics {
                rows.iter().for_each(|rows| part.text += &format!(" {} |", cell(&of_group(rows, group, statistic))));
            }
            let [first, last] = [0, rows.len() - 1].map(|index| of_group(&rows[index], group, |g| g.entropy));
            let difference = paired_difference(&last, &first);
            part.text += &format!(" {} |\n", difference.map_or("–".into(), |interval| interval.to_string()));
            total += 1;
            if difference.is_some_and(|interval| interval.low > 0.0) {
                higher.push(group);
            }
        }
        if let [first, .., last] = names.as_slice() {
            part.text += &format!(
                "\nThe entropy is higher with `{last}` than with `{first}`, by more than the interval, in {} of {total} groups{}{}.\n\n",
                higher.len(),
                if higher.is_empty() { "" } else { ": " },
                higher.join(", ")
            );
        }
        part.charts.push(over_training(&family, &names, &rows));
        part.charts.push(singular_values(&family, &names, &rows));
    }
    Ok(part)
}

/// The mean over seeds of a value at each measured step.
fn by_step(rows: &[&RunRow], value: impl Fn(&WeightStatistics) -> Option<f64>) -> Vec<(f64, f64)> {
    let mut steps: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for weights in rows.iter().filter_map(|row| row.measured.as_ref()).flat_map(|run| &run.weights) {
        if let Some(value) = value(weights) {
            steps.entry(weights.step).or_default().push(value);
        }
    }
    steps.into_iter().map(|(step, values)| (step as f64, values.iter().sum::<f64>() / values.len() as f64)).collect()
}

/// Entropy by group: a color for each group, a dashed line for the first value of the axis.
fn over_training(family: &str, names: &[String], rows: &[Vec<&RunRow>]) -> Chart {
    let mut series = Vec::new();
    for (color, group) in GROUPS.iter().enumerate() {
        for (index, (name, rows)) in names.iter().zip(rows).enumerate() {
            let points = by_step(rows, |weights| weights.groups.get(*group).map(|group| group.entropy));
            if !points.is_empty() {
                series.push(Series { dashed: index == 0, ..Series::curve(format!("{group}, {name}"), points, color) });
            }
        }
    }
    Chart {
        title: format!("SVD entropy over training: {family}"),
        x: Axis::linear("step"),
        y: Axis::linear("SVD entropy"),
        series,
    }
}

/// Singular values at the end, over the largest.
fn singular_values(family: &str, names: &[String], rows: &[Vec<&RunRow>]) -> Chart {
    let mut series = Vec::new();
    for (color, group) in GROUPS.iter().enumerate() {
        for (index, (name, rows)) in names.iter().zip(rows).enumerate() {
            let of_seeds: Vec<&Vec<f64>> =
                rows.iter().filter_map(|row| Some(&at_end(row)?.groups.get(*group)?.quantiles)).collect();
            let Some(first) = of_seeds.first() else { continue };
            let points = (0..first.len()).map(|rank| {
                let values = of_seeds.iter().filter_map(|values| values.get(rank));
                (rank as f64 / (first.len() - 1).max(1) as f64, values.sum::<f64>() / of_seeds.len() as f64)
            });
            series.push(Series {
                dashed: index == 0,
                ..Series::line(format!("{group}, {name}"), points.collect(), color)
            });
        }
    }
    Chart {
        title: format!("Singular values at the end: {family}"),
        x: Axis::linear("rank, as a share of all"),
        y: Axis::linear("singular value over the largest"),
        series,
    }
}

/// The RMS of query and MLP weights over the steps.
pub(super) fn rms(results: &Results<'_>, axis: &str) -> Result<Part, TrainError> {
    let axis = results.axis(axis)?;
    let mut part = Part::default();
    type Statistic = fn(&WeightStatistics) -> f64;
    let statistics: [(&str, Statistic); 2] =
        [("query", |weights| weights.query_rms), ("MLP", |weights| weights.mlp_rms)];
    for (family, points) in families(results, axis) {
        for (what, statistic) in statistics {
            let curve = |(color, point): (usize, &Point)| {
                let name = results.axes()[axis].values[point.0[axis]].name.clone();
                Series::curve(name, by_step(&results.rows(point), |weights| Some(statistic(weights))), color)
            };
            part.charts.push(Chart {
                title: format!("RMS of the {what} weights over training: {family}"),
                x: Axis::linear("step"),
                y: Axis::log("RMS"),
                series: points.iter().enumerate().map(curve).collect(),
            });
        }
    }
    Ok(part)
}
