//! The page: what the study asks, what was run, the searches, each section, and what it cannot say.

use std::collections::BTreeSet;

use super::results::Results;
use super::{Part, Report, Section, scaling, svg, tables, weights};
use crate::error::TrainError;
use crate::study::run_table::RunRow;

pub(super) fn page(results: &Results<'_>) -> Result<Report, TrainError> {
    let study = results.study;
    let mut page = Page { name: study.name.clone(), text: format!("# {}\n\n", study.title), figures: Vec::new() };
    page.text += "You will see what this study asked, what it ran and found, and what it cannot say.\n\n";
    page.text += &format!(
        "<!-- Made by `moonlight report` from `results/{}.{}.jsonl`; change the study, not this page. -->\n\n",
        study.name, study.tier_name
    );
    for (name, text) in [
        ("Question", &study.question),
        ("The report", &study.claim),
        ("Others", &study.others),
        ("Found here", &study.found),
    ] {
        if !text.is_empty() {
            page.text += &format!("**{name}.** {}\n\n", text.trim());
        }
    }
    page.text += &what_was_run(results);
    if study.tier.tune.is_some() {
        page.add("Tuning", tables::tuning(results))?;
    }
    for section in &study.sections {
        match section {
            Section::Table { title, columns } => page.add(title, tables::table(results, columns))?,
            Section::Difference { title, axis, baseline, columns } => {
                page.add(title, tables::difference(results, axis, baseline, columns)?)?;
            }
            Section::ScalingLaw { title, axis, baseline, others, size } => {
                page.add(title, scaling::scaling_law(results, axis, baseline, others, size)?)?;
            }
            Section::Spectra { title, axis } => page.add(title, weights::spectra(results, axis)?)?,
            Section::Weights { title, axis } => page.add(title, weights::rms(results, axis)?)?,
        }
    }
    page.text += &format!("## What this cannot say\n\n{}\n", study.limits.trim());
    Ok(Report { page: page.text, figures: page.figures })
}

struct Page {
    name: String,
    text: String,
    figures: Vec<(String, Vec<u8>)>,
}

impl Page {
    fn add(&mut self, title: &str, part: Part) -> Result<(), TrainError> {
        self.text += &format!("## {title}\n\n");
        if !part.text.is_empty() {
            self.text += part.text.trim_end();
            self.text += "\n\n";
        }
        for chart in part.charts.iter().filter(|chart| chart.series.iter().any(|series| !series.points.is_empty())) {
            let file = format!("{}-{}.svg", self.name, self.figures.len() + 1);
            self.text += &format!("![{}]({file})\n\n", chart.title);
            self.figures.push((file, svg(chart)?));
        }
        Ok(())
    }
}

/// When, where and how much.
fn what_was_run(results: &Results<'_>) -> String {
    let study = results.study;
    let done: Vec<&RunRow> =
        results.progress.done.iter().filter_map(|wanted| results.table.find(study, wanted)).collect();
    let all = |of: fn(&RunRow) -> String| {
        let values: BTreeSet<String> = done.iter().map(|row| of(row)).collect();
        values.into_iter().collect::<Vec<_>>()
    };
    let dates = all(|row| row.date.clone());
    let dates = match dates.as_slice() {
        [] => "Not run yet".to_owned(),
        [one] => one.clone(),
        [first, .., last] => format!("{first} to {last}"),
    };
    // The sum of no seconds is -0.0.
    let hours = done.iter().filter_map(|row| row.measured.as_ref()).map(|run| run.seconds).sum::<f64>().abs() / 3600.0;
    let missing = results.progress.ready.len();
    let mut text = format!("{dates}; {} runs, {hours:.2} hours of training steps", done.len());
    for (name, values) in [
        ("on", all(|row| row.machine.clone())),
        ("threads of a run:", all(|row| row.threads.to_string())),
        ("version", all(|row| row.version.clone())),
        ("text", all(|row| row.text.clone())),
    ] {
        if !values.is_empty() {
            text += &format!("; {name} {}", values.join(", "));
        }
    }
    text += ".";
    if missing > 0 || results.progress.waiting > 0 {
        text += &format!(" **Incomplete**: {missing} runs are missing");
        if results.progress.waiting > 0 {
            text += &format!(", and {} points wait for their search", results.progress.waiting);
        }
        text += ".";
    }
    let diverged = done.iter().filter(|row| row.measured.is_none()).count();
    if diverged > 0 {
        text += &format!(" {diverged} runs diverged.");
    }
    text += &format!(
        "\n\n```sh\nmoonlight data corpus --output runs/corpus\nmoonlight sweep configs/studies/{0}.toml\nmoonlight report configs/studies/{0}.toml\n```\n\n\
         `±` is the half width of a 95 % interval of the mean over seeds (Student's t); `[low, high]` is one by bootstrap over seeds.\n\n",
        study.name
    );
    text
}
