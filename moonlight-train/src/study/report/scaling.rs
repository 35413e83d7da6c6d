//! The scaling law: losses over operations, power laws, and the share of the baseline's operations that another method needs.

use super::Part;
use super::results::{Results, cell, significant};
use crate::analysis::plots::draw::{Axis, Chart, ErrorBar, Series};
use crate::error::TrainError;
use crate::study::points::Point;
use crate::study::run_table::Measured;
use crate::study::statistics::{
    BootstrapError, FlopsComparison, Interval, LossFloor, SizeRuns, bootstrap, leave_one_size_out, mean_interval,
};

/// The seed of the bootstrap.
const SEED: u64 = 0;

/// How far beyond the largest size the ratio is extrapolated.
const EXTRAPOLATION: f64 = 10.0;

/// A way to count what a training costs.
struct Cost {
    name: &'static str,
    of: fn(&Measured) -> f64,
}

const COSTS: [Cost; 4] = [
    Cost { name: "all products, without Newton-Schulz", of: |run| run.flops },
    Cost { name: "all products, with Newton-Schulz", of: |run| run.flops + run.newton_schulz_flops },
    Cost { name: "`6 N D`, as the report counts", of: |run| run.six_n_d },
    Cost { name: "seconds of training", of: |run| run.seconds },
];

/// The runs of a value of the axis, by size.
fn sizes(results: &Results<'_>, points: &[Point], cost: &Cost) -> Vec<SizeRuns> {
    let one = |point: &Point| {
        let rows = results.rows(point);
        let measured: Vec<&Measured> = rows.iter().filter_map(|row| row.measured.as_ref()).collect();
        let flops = measured.iter().map(|run| (cost.of)(run)).sum::<f64>() / measured.len().max(1) as f64;
        SizeRuns { flops, losses: measured.iter().map(|run| run.valid_loss).collect() }
    };
    points.iter().map(one).collect()
}

/// Compares `others` with the baseline, or all other values of the axis if it is empty.
pub(super) fn scaling_law(
    results: &Results<'_>,
    axis: &str,
    baseline: &str,
    others: &[String],
    size: &str,
) -> Result<Part, TrainError> {
    let (axis, size) = (results.axis(axis)?, results.axis(size)?);
    let baseline = results.value(axis, baseline)?;
    let others = match others {
        [] => (0..results.axes()[axis].values.len()).filter(|&other| other != baseline).collect(),
        others => others.iter().map(|other| results.value(axis, other)).collect::<Result<Vec<_>, _>>()?,
    };
    let mut part = Part::default();
    for other in others {
        // The other axes, if there are any, are at their first values.
        let at = |value: usize, index: usize| {
            let mut point = Point(vec![0; results.axes().len()]);
            (point.0[axis], point.0[size]) = (value, index);
            point
        };
        let complete: Vec<usize> = (0..results.axes()[size].values.len())
            .filter(|&index| [baseline, other].iter().all(|&value| !results.rows(&at(value, index)).is_empty()))
            .collect();
        let of = |value: usize| complete.iter().map(|&index| at(value, index)).collect::<Vec<_>>();
        let names = [baseline, other].map(|value| results.axes()[axis].values[value].name.clone());
        let names_of_sizes: Vec<_> =
            complete.iter().map(|&index| results.axes()[size].values[index].name.clone()).collect();
        compare(results, &names, &names_of_sizes, &of(baseline), &of(other), &mut part);
    }
    Ok(part)
}

fn compare(
    results: &Results<'_>,
    names: &[String; 2],
    size_names: &[String],
    baseline: &[Point],
    other: &[Point],
    part: &mut Part,
) {
    let [first, second] = names;
    let costs = &COSTS[0];
    let (a, b) = (sizes(results, baseline, costs), sizes(results, other, costs));
    part.text += &format!(
        "| size | operations | {first}, validation loss | {second}, validation loss | {second}: share of {first}'s operations |\n|---|---|---|---|---|\n"
    );
    let comparison = FlopsComparison::new(&a, &b, LossFloor::Known(0.0));
    let largest = b.iter().map(|size| size.flops).fold(0.0, f64::max);
    let intervals = bootstrap(&a, &b, LossFloor::Known(0.0), largest * EXTRAPOLATION, SEED);
    let reach = a.iter().map(|size| size.flops).fold(0.0, f64::max);
    let mut extrapolated = false;
    for (index, name) in size_names.iter().enumerate() {
        let ratio = comparison.as_ref().map(|comparison| comparison.sizes[index].ratio);
        let beyond = ratio.is_some_and(|ratio| b[index].flops / ratio > reach);
        extrapolated |= beyond;
        let interval = intervals.as_ref().ok().and_then(|intervals| intervals.sizes[index]);
        let shown = interval.map(|interval| interval.to_string()).or_else(|| ratio.map(significant));
        part.text += &format!(
            "| {name} | {:.2e} | {} | {} | {}{} |\n",
            a[index].flops,
            cell(&a[index].losses),
            cell(&b[index].losses),
            shown.unwrap_or_else(|| "–".into()),
            if beyond { " \\*" } else { "" }
        );
    }
    if extrapolated {
        part.text += &format!(
            "\n\\* {second}'s loss is below that of {first}'s largest run: the share follows from the fit beyond what was run.\n"
        );
    }
    part.text.push('\n');
    let Some(comparison) = comparison else {
        part.text += "There are too few sizes for a fit.\n";
        return;
    };
    part.text += &fits(names, &a, &b, largest);
    part.text += &costs_table(results, names, baseline, other);
    part.charts.push(chart(names, &a, &b, &comparison));
    part.charts.push(ratios(
        names,
        &b,
        &comparison,
        intervals.as_ref().ok().map(|intervals| intervals.sizes.as_slice()),
    ));
}

/// The power laws, without a floor and with a fitted one.
fn fits(names: &[String; 2], a: &[SizeRuns], b: &[SizeRuns], largest: f64) -> String {
    let [first, second] = names;
    let mut text = format!(
        "| fit `L = floor + a C^-b` | {first} | {second} | share of {first}'s operations, all sizes | at {EXTRAPOLATION} times the largest |\n|---|---|---|---|---|\n"
    );
    for (name, floor) in [("no floor", LossFloor::Known(0.0)), ("a fitted floor for each", LossFloor::Fitted)] {
        let Some(fit) = FlopsComparison::new(a, b, floor) else {
            text += &format!("| {name} | – | – | no fit | – |\n");
            continue;
        };
        let law = |law: &crate::study::statistics::PowerLaw| {
            let floor = if law.floor > 0.0 { format!("{} + ", significant(law.floor)) } else { String::new() };
            format!("{floor}{} C^-{}", significant(law.a), significant(law.b))
        };
        let (ratio, beyond) = match bootstrap(a, b, floor, largest * EXTRAPOLATION, SEED) {
            Ok(intervals) => (intervals.ratio.to_string(), intervals.extrapolated.to_string()),
            Err(error) => {
                let reason = match error {
                    BootstrapError::OneSeed => "one seed",
                    _ => "no interval: resamples have no fit",
                };
                let beyond = fit.extrapolate(largest * EXTRAPOLATION).map_or("–".into(), significant);
                (format!("{} ({reason})", significant(fit.ratio)), beyond)
            }
        };
        text += &format!("| {name} | {} | {} | {ratio} | {beyond} |\n", law(&fit.baseline), law(&fit.other));
    }
    if let Some(Interval { low, high, .. }) = leave_one_size_out(a, b, LossFloor::Known(0.0)) {
        text += &format!(
            "\nWithout one of the sizes, whichever it is, the share without a floor is from {} to {}.\n",
            significant(low),
            significant(high)
        );
    }
    text.push('\n');
    text
}

/// The share by each way to count.
fn costs_table(results: &Results<'_>, names: &[String; 2], baseline: &[Point], other: &[Point]) -> String {
    let [first, second] = names;
    let mut text =
        format!("| what is counted | {second}: share of {first}'s, all sizes, no floor | speed-up |\n|---|---|---|\n");
    for cost in &COSTS {
        let (a, b) = (sizes(results, baseline, cost), sizes(results, other, cost));
        let largest = b.iter().map(|size| size.flops).fold(0.0, f64::max);
        let share =
            bootstrap(&a, &b, LossFloor::Known(0.0), largest * EXTRAPOLATION, SEED).map(|intervals| intervals.ratio);
        let (share, speedup) = match share {
            Ok(share) => {
                let speedup = Interval { estimate: 1.0 / share.estimate, low: 1.0 / share.high, high: 1.0 / share.low };
                (share.to_string(), speedup.to_string())
            }
            Err(_) => match FlopsComparison::new(&a, &b, LossFloor::Known(0.0)) {
                Some(fit) => (significant(fit.ratio), significant(1.0 / fit.ratio)),
                None => ("–".into(), "–".into()),
            },
        };
        text += &format!("| {} | {share} | {speedup} |\n", cost.name);
    }
    text.push('\n');
    text
}

fn chart(names: &[String; 2], a: &[SizeRuns], b: &[SizeRuns], comparison: &FlopsComparison) -> Chart {
    let mut series = Vec::new();
    for (color, (name, sizes, law)) in
        [(&names[0], a, &comparison.baseline), (&names[1], b, &comparison.other)].into_iter().enumerate()
    {
        let points: Vec<(f64, f64)> = sizes.iter().map(|size| (size.flops, mean(&size.losses))).collect();
        let bars = sizes
            .iter()
            .filter_map(|size| {
                mean_interval(&size.losses).map(|interval| ErrorBar {
                    x: size.flops,
                    low: interval.low,
                    high: interval.high,
                })
            })
            .collect();
        let ends = [a, b]
            .concat()
            .iter()
            .map(|size| size.flops)
            .fold((f64::INFINITY, 0.0f64), |(low, high), c| (low.min(c), high.max(c)));
        let line = [ends.0, ends.1].map(|c| (c, law.loss(c))).to_vec();
        series.push(Series { bars, ..Series::dots(name.clone(), points, color) });
        series.push(Series { dashed: true, ..Series::line(String::new(), line, color) });
    }
    Chart {
        title: "Validation loss over operations".into(),
        x: Axis::log("operations of forward and backward passes"),
        y: Axis::log("validation loss, nats per token"),
        series,
    }
}

fn ratios(
    names: &[String; 2],
    b: &[SizeRuns],
    comparison: &FlopsComparison,
    intervals: Option<&[Option<Interval>]>,
) -> Chart {
    let points = b.iter().zip(&comparison.sizes).map(|(size, ratio)| (size.flops, ratio.ratio)).collect();
    let bars = intervals.into_iter().flatten().zip(b).filter_map(|(interval, size)| {
        interval.map(|interval| ErrorBar { x: size.flops, low: interval.low, high: interval.high })
    });
    let series = Series { bars: bars.collect(), ..Series::curve(names[1].clone(), points, 1) };
    let report = b.iter().map(|size| (size.flops, 0.519)).collect();
    let report = Series { dashed: true, ..Series::line("the report's 0.519", report, 7) };
    Chart {
        title: format!("Share of {}'s operations for the same loss", names[0]),
        x: Axis::log("operations of forward and backward passes"),
        y: Axis::linear("share"),
        series: vec![series, report],
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
