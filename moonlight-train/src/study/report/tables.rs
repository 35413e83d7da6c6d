//! Tables: the searches for the best rates, means over seeds, differences in pairs of seeds.

use super::Part;
use super::results::{Results, cell, header, significant, value};
use crate::analysis::plots::draw::{Axis, Chart, Series};
use crate::error::TrainError;
use crate::study::points::Point;
use crate::study::statistics::{Interval, TuningMinimum, paired_difference};

/// The searches, all of them: a reader must be able to see that each method was tuned alike.
pub(super) fn tuning(results: &Results<'_>) -> Part {
    let Some(tune) = &results.study.tier.tune else { return Part::default() };
    let seeds = match tune.seeds {
        1 => "one seed".to_owned(),
        seeds => format!("{seeds} seeds"),
    };
    let mut text = format!(
        "Every search has the same rule: a grid in factors of {} with {seeds} for each value, extended until the lowest validation loss is \
         not at its edge. The minimum of the parabola through the lowest point and its neighbors is given as well.\n\n",
        tune.factor
    );
    text += &format!("| search | `{}`: validation loss | parabola |\n|---|---|---|\n", tune.key);
    let mut series = Vec::new();
    for (color, search) in results.progress.searches.iter().enumerate() {
        let name = shared_name(results, &search.point, &tune.by);
        let best = search.best();
        let one = |&(rate, loss): &(f64, f64)| {
            let loss = if loss.is_finite() { format!("{loss:.4}") } else { "diverged".into() };
            if Some(rate) == best { format!("**{rate:e}: {loss}**") } else { format!("{rate:e}: {loss}") }
        };
        let tried = search.tried.iter().map(one).collect::<Vec<_>>().join(", ");
        let minimum = TuningMinimum::find(&search.tried)
            .map_or("–".into(), |minimum| format!("{} at {}", significant(minimum.loss), significant(minimum.rate)));
        let unfinished = if search.next.is_empty() { "" } else { " (unfinished)" };
        text += &format!("| {name}{unfinished} | {tried} | {minimum} |\n");
        series.push(Series::curve(name, search.tried.clone(), color));
    }
    let chart = Chart {
        title: "Tuning curves".into(),
        x: Axis::log(tune.key.clone()),
        y: Axis::linear("validation loss, nats per token"),
        series,
    };
    Part { text, charts: vec![chart] }
}

/// The name of a search: the values of the axes that it is for.
fn shared_name(results: &Results<'_>, point: &Point, by: &[String]) -> String {
    let names: Vec<_> = point
        .values(results.axes())
        .filter(|(axis, _)| by.contains(&axis.name))
        .map(|(_, value)| value.name.as_str())
        .collect();
    if names.is_empty() { results.name(point, None) + " (for all)" } else { names.join(", ") }
}

/// Means over seeds: a row for each point.
pub(super) fn table(results: &Results<'_>, columns: &[String]) -> Part {
    let axes: Vec<_> = results.axes().iter().map(|axis| axis.name.as_str()).collect();
    let rate = results
        .study
        .tier
        .tune
        .as_ref()
        .map(|tune| format!(" `{}` |", tune.key.rsplit('.').next().unwrap_or_default()));
    let headers: Vec<_> = columns.iter().map(|column| header(column)).collect();
    let mut text =
        format!("| {} |{} seeds | {} |\n", axes.join(" | "), rate.as_deref().unwrap_or_default(), headers.join(" | "));
    text += &format!("|{}\n", "---|".repeat(axes.len() + usize::from(rate.is_some()) + 1 + columns.len()));
    for point in results.points() {
        let rows = results.rows(&point);
        let names: Vec<_> = point.values(results.axes()).map(|(_, value)| value.name.as_str()).collect();
        let diverged = rows.iter().filter(|row| row.measured.is_none()).count();
        let seeds = match diverged {
            0 => rows.len().to_string(),
            _ => format!("{} ({diverged} diverged)", rows.len()),
        };
        let tuned = rows.first().and_then(|row| row.tuned).map(|rate| format!(" {rate:e} |"));
        let tuned = if rate.is_some() { tuned.unwrap_or_else(|| " – |".into()) } else { String::new() };
        let cells: Vec<_> = columns
            .iter()
            .map(|column| cell(&rows.iter().filter_map(|row| value(row, column)).collect::<Vec<_>>()))
            .collect();
        text += &format!("| {} |{tuned} {seeds} | {} |\n", names.join(" | "), cells.join(" | "));
    }
    Part::text(text)
}

/// Differences to a baseline, in pairs of the same seed.
pub(super) fn difference(
    results: &Results<'_>,
    axis: &str,
    baseline: &str,
    columns: &[String],
) -> Result<Part, TrainError> {
    let axis = results.axis(axis)?;
    let baseline = results.value(axis, baseline)?;
    let headers: Vec<_> = columns.iter().map(|column| header(column)).collect();
    let mut text = format!("| point | {} |\n|---|{}\n", headers.join(" | "), "---|".repeat(columns.len()));
    let (mut below, mut above, mut open) = (Vec::new(), Vec::new(), Vec::new());
    for point in results.points().into_iter().filter(|point| point.0[axis] != baseline) {
        let mut reference = point.clone();
        reference.0[axis] = baseline;
        let (ours, theirs) = (results.rows(&point), results.rows(&reference));
        let name = results.name(&point, None);
        let mut cells = Vec::new();
        for (index, column) in columns.iter().enumerate() {
            let pairs: Vec<(f64, f64)> = ours
                .iter()
                .filter_map(|row| {
                    let other = theirs.iter().find(|other| other.seed == row.seed)?;
                    Some((value(row, column)?, value(other, column)?))
                })
                .collect();
            let (first, second): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let interval = paired_difference(&first, &second);
            if index == 0 {
                match interval {
                    Some(Interval { high, .. }) if high < 0.0 => below.push(name.clone()),
                    Some(Interval { low, .. }) if low > 0.0 => above.push(name.clone()),
                    _ => open.push(name.clone()),
                }
            }
            cells.push(interval.map_or("–".into(), |interval| interval.to_string()));
        }
        text += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    let column = columns.first().map(|column| header(column)).unwrap_or_default();
    let against = &results.axes()[axis].values[baseline].name;
    text.push('\n');
    for (names, what) in [(below, "lower"), (above, "higher")] {
        if !names.is_empty() {
            text += &format!(
                "The {column} is {what} than with `{against}`, by more than the interval: {}. ",
                names.join("; ")
            );
        }
    }
    if !open.is_empty() {
        text += &format!(
            "Cannot be concluded, because the interval includes 0 or there are fewer than two pairs: {}.",
            open.join("; ")
        );
    }
    Ok(Part::text(text.trim_end().to_owned() + "\n"))
}
