//! The points of a study, and the runs that it needs: for each point the search for its best rate, and a run for each seed.

use std::collections::BTreeMap;

use super::run_table::{RunRow, RunTable};
use super::study_file::{Axis, AxisValue, Study, Tune};

/// A search that has not found its minimum after so many values does not find one.
const MAX_TRIED: usize = 14;

/// A combination of one value of each axis.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Point(pub Vec<usize>);

impl Point {
    /// The values, in the order of the axes.
    pub fn values<'a>(&'a self, axes: &'a [Axis]) -> impl Iterator<Item = (&'a Axis, &'a AxisValue)> {
        axes.iter().zip(&self.0).map(|(axis, &index)| (axis, &axis.values[index]))
    }

    /// The names of the values by axis, as the table of runs has them.
    pub fn names(&self, axes: &[Axis]) -> BTreeMap<String, String> {
        self.values(axes).map(|(axis, value)| (axis.name.clone(), value.name.clone())).collect()
    }
}

/// All combinations, the last axis fastest.
pub fn points(axes: &[Axis]) -> Vec<Point> {
    let mut all = vec![Point(Vec::new())];
    for axis in axes {
        all = all
            .into_iter()
            .flat_map(|point| {
                (0..axis.values.len()).map(move |index| Point(point.0.iter().copied().chain([index]).collect()))
            })
            .collect();
    }
    all
}

/// A run that a study needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// Its point.
    pub point: Point,
    /// The value of the tuned key, if one is tuned.
    pub tuned: Option<f64>,
    /// Its seed.
    pub seed: u64,
}

/// The search for the best value at one point.
#[derive(Debug, Clone, PartialEq)]
pub struct Search {
    /// The point that is tuned, with the first value of each axis that shares its result.
    pub point: Point,
    /// Values and the mean final validation loss over the seeds of the search, in ascending order; infinity for a run that diverged.
    pub tried: Vec<(f64, f64)>,
    /// The next values to try; empty at the end of the search.
    pub next: Vec<f64>,
}

impl Search {
    /// The value with the lowest loss.
    pub fn best(&self) -> Option<f64> {
        let best = self.tried.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
        best.1.is_finite().then_some(best.0)
    }

    /// The state of the search at `point`, from the runs that are done.
    fn new(study: &Study, tune: &Tune, table: &RunTable, point: Point) -> Self {
        let factors = point.values(&study.tier.axes).map(|(_, value)| value.start_factor).product::<f64>();
        let start = round_rate(tune.start * factors);
        let seeds = &study.tier.seeds[..tune.seeds];
        let loss = |rate: f64| {
            let wanted = |&seed: &u64| Wanted { point: point.clone(), tuned: Some(rate), seed };
            let losses: Option<Vec<f64>> =
                seeds.iter().map(|seed| table.find(study, &wanted(seed)).map(RunRow::final_loss)).collect();
            losses.map(|losses| losses.iter().sum::<f64>() / losses.len() as f64)
        };
        let step = |rate: f64, up: bool| round_rate(if up { rate * tune.factor } else { rate / tune.factor });
        let first = [step(start, false), start, step(start, true)];
        let mut grid = first.to_vec();
        loop {
            let tried: Vec<(f64, f64)> = grid.iter().filter_map(|&rate| Some((rate, loss(rate)?))).collect();
            let missing: Vec<f64> =
                grid.iter().copied().filter(|rate| !tried.iter().any(|done| done.0 == *rate)).collect();
            if !missing.is_empty() || grid.len() >= MAX_TRIED {
                return Self { point, tried, next: missing };
            }
            let lowest = tried.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map_or(0, |(index, _)| index);
            if lowest == 0 {
                grid.insert(0, step(grid[0], false));
            } else if lowest + 1 == grid.len() {
                grid.push(step(grid[lowest], true));
            } else {
                return Self { point, tried, next: missing };
            }
        }
    }
}

/// The point whose search a point shares: at the axes without a search of their own it has the first value.
fn shared_point(tune: &Tune, axes: &[Axis], point: &Point) -> Point {
    let index = |(&index, axis): (&usize, &Axis)| if tune.by.contains(&axis.name) { index } else { 0 };
    Point(point.0.iter().zip(axes).map(index).collect())
}

/// Three significant digits, so that a rate that was reached from two sides is the same one.
fn round_rate(rate: f64) -> f64 {
    format!("{rate:.2e}").parse().unwrap_or(rate)
}

/// What a study has done and what it needs next.
#[derive(Debug)]
pub struct Progress {
    /// The searches, in the order of their points; none if nothing is tuned.
    pub searches: Vec<Search>,
    /// Runs that can be started now.
    pub ready: Vec<Wanted>,
    /// Runs that are done.
    pub done: Vec<Wanted>,
    /// Points whose search has not ended, or found no value that trains.
    pub waiting: usize,
}

impl Progress {
    /// Compares a study with its table.
    pub fn new(study: &Study, table: &RunTable) -> Self {
        let tier = &study.tier;
        let all = points(&tier.axes);
        let mut searches: Vec<Search> = Vec::new();
        let mut progress = Self { searches: Vec::new(), ready: Vec::new(), done: Vec::new(), waiting: 0 };
        for point in &all {
            if let Some(tune) = &tier.tune {
                let tuned_at = shared_point(tune, &tier.axes, point);
                if !searches.iter().any(|search| search.point == tuned_at) {
                    searches.push(Search::new(study, tune, table, tuned_at));
                }
            }
        }
        progress.searches = searches;
        for point in &all {
            let Some(tuned) = progress.tuned(study, point) else {
                progress.waiting += 1;
                continue;
            };
            for &seed in &tier.seeds {
                progress.add(study, table, Wanted { point: point.clone(), tuned, seed });
            }
        }
        let searches = std::mem::take(&mut progress.searches);
        for search in &searches {
            let seeds = tier.tune.as_ref().map_or(0, |tune| tune.seeds);
            let rates = search.next.iter().chain(search.tried.iter().map(|(rate, _)| rate));
            for &rate in rates {
                for &seed in &tier.seeds[..seeds] {
                    progress.add(study, table, Wanted { point: search.point.clone(), tuned: Some(rate), seed });
                }
            }
        }
        progress.searches = searches;
        progress
    }

    /// The best value for a point, `Some(None)` if nothing is tuned; `None` before its search has ended, and if no value trains.
    pub fn tuned(&self, study: &Study, point: &Point) -> Option<Option<f64>> {
        let Some(tune) = &study.tier.tune else { return Some(None) };
        let tuned_at = shared_point(tune, &study.tier.axes, point);
        let search = self.searches.iter().find(|search| search.point == tuned_at && search.next.is_empty())?;
        search.best().map(Some)
    }

    fn add(&mut self, study: &Study, table: &RunTable, wanted: Wanted) {
        let list = if table.find(study, &wanted).is_some() { &mut self.done } else { &mut self.ready };
        if !list.contains(&wanted) {
            list.push(wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::study::run_table::{Measured, RunRow};

    const STUDY: &str = r#"
        title = "t"
        question = "q"
        claim = "c"
        limits = "l"
        recipe = "base.toml"
        budget = "1h"
        seeds = [1, 2, 3]
        axes = [
            { name = "size", values = [{ name = "small" }, { name = "large", set = { "model.hidden_size" = 64 } }] },
            { name = "optimizer", values = [
                { name = "adamw", set = { "optimizer.name" = "adamw" } },
                { name = "muon", start_factor = 4.0 },
            ] },
        ]
        [tune]
        by = ["optimizer"]
        start = 1e-3
    "#;

    fn open(dir: &Path) -> Study {
        fs::write(dir.join("base.toml"), "[train]\nsteps = 3\n").unwrap();
        fs::write(dir.join("study.toml"), STUDY).unwrap();
        Study::open(&dir.join("study.toml"), "small").unwrap()
    }

    /// A row whose loss is that of a parabola in the logarithm of the rate, with its minimum at `best`.
    fn row(study: &Study, table: &RunTable, wanted: &Wanted, best: f64) -> RunRow {
        let settings = table.base().run(study, wanted);
        let rate = wanted.tuned.unwrap();
        let measured = (rate < 0.1).then(|| Measured {
            valid_loss: 2.0 + (rate / best).log2().powi(2) + wanted.seed as f64 * 1e-3,
            ..Measured::default()
        });
        RunRow {
            run: settings.name,
            key: settings.key,
            point: wanted.point.names(&study.tier.axes),
            tuned: wanted.tuned,
            seed: wanted.seed,
            diverged: measured.is_none().then(|| "the loss is NaN".into()),
            measured,
            ..RunRow::default()
        }
    }

    /// Does the first `most` missing runs, as a sweep of one process would.
    fn run(study: &Study, most: usize, best: impl Fn(&Wanted) -> f64) -> usize {
        let mut table = RunTable::read(study, None).unwrap();
        table.lock().unwrap();
        for count in 0..most {
            let Some(next) = Progress::new(study, &table).ready.first().cloned() else { return count };
            assert!(table.find(study, &next).is_none(), "{next:?} is done twice");
            table.append(row(study, &table, &next, best(&next))).unwrap();
        }
        most
    }

    #[test]
    fn searches_end_at_the_best_rate_and_every_point_gets_its_seeds() {
        let home = tempfile::tempdir().unwrap();
        let study = open(home.path());
        // AdamW's best rate is three steps above the first grid, Muon's within it.
        let best = |wanted: &Wanted| if wanted.point.0[1] == 0 { 1.6e-2 } else { 4e-3 };
        let count = run(&study, 1000, best);
        let table = RunTable::read(&study, None).unwrap();
        let progress = Progress::new(&study, &table);
        assert!(progress.ready.is_empty() && progress.waiting == 0);
        let rates = |index: usize| progress.searches[index].tried.iter().map(|tried| tried.0).collect::<Vec<_>>();
        assert_eq!(rates(0), [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]);
        assert_eq!(rates(1), [2e-3, 4e-3, 8e-3]);
        assert_eq!([0, 1].map(|index| progress.searches[index].best()), [Some(1.6e-2), Some(4e-3)]);
        // Ten values with one seed; then for each of four points three seeds; two of these runs are in the searches.
        assert_eq!(count, 10 + 4 * 3 - 2);
        assert!(points(&study.tier.axes).iter().all(|point| progress.tuned(&study, point).is_some()));
    }

    #[test]
    fn a_study_that_is_stopped_anywhere_ends_with_the_same_table() {
        let best = |_: &Wanted| 2e-3;
        let sorted = |study: &Study| {
            let text = fs::read_to_string(study.table_path()).unwrap();
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let home = tempfile::tempdir().unwrap();
        let whole = open(home.path());
        let count = run(&whole, 1000, best);
        for stop in [1, 4, count - 1] {
            let home = tempfile::tempdir().unwrap();
            let study = open(home.path());
            run(&study, stop, best);
            // A line that was cut short by the kill.
            let mut text = fs::read(study.table_path()).unwrap();
            text.extend(b"{\"run\":\"cut sh");
            fs::write(study.table_path(), text).unwrap();
            run(&study, 1000, best);
            assert_eq!(sorted(&study), sorted(&whole), "stopped after {stop}");
        }
    }

    #[test]
    fn a_rate_that_diverges_is_the_worst_and_a_search_without_a_finite_loss_ends() {
        let home = tempfile::tempdir().unwrap();
        let study = open(home.path());
        run(&study, 1000, |_| 1e3);
        let table = RunTable::read(&study, None).unwrap();
        let progress = Progress::new(&study, &table);
        // Losses fall up to the largest rate that trains.
        assert_eq!(progress.searches[0].best(), Some(6.4e-2));
        assert!(progress.searches[0].tried.last().unwrap().1.is_infinite());

        let text = STUDY.replace("start = 1e-3", "start = 1e6");
        fs::write(home.path().join("study.toml"), text).unwrap();
        let study = Study::open(&home.path().join("study.toml"), "small").unwrap();
        run(&study, 1000, |_| 1e3);
        let table = RunTable::read(&study, None).unwrap();
        let progress = Progress::new(&study, &table);
        assert!(progress.searches.iter().all(|search| search.tried.len() == MAX_TRIED && search.best().is_none()));
        assert!(progress.ready.is_empty() && progress.waiting == 4, "{progress:?}");
    }

    #[test]
    fn the_key_follows_from_what_a_run_learns_and_from_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let study = open(home.path());
        let base = |text: &str| {
            fs::write(home.path().join("base.toml"), text).unwrap();
            RunTable::read(&study, None).unwrap()
        };
        let wanted = Wanted { point: Point(vec![0, 1]), tuned: Some(1e-3), seed: 2 };
        let key = |table: &RunTable, wanted: &Wanted| table.base().run(&study, wanted).key;
        let table = base("[train]\nsteps = 3\n");
        let first = key(&table, &wanted);
        assert_eq!(key(&base("# a comment\n[train]\nsteps=3\n[run]\nname=\"x\"\n"), &wanted), first);
        assert_ne!(key(&base("[train]\nsteps = 4\n"), &wanted), first);
        assert_ne!(key(&table, &Wanted { seed: 3, ..wanted.clone() }), first);
        assert_ne!(key(&table, &Wanted { tuned: Some(2e-3), ..wanted.clone() }), first);
        assert_ne!(key(&table, &Wanted { point: Point(vec![1, 1]), ..wanted }), first);
    }
}
