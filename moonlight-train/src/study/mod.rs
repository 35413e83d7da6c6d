//! Studies: many runs that compare something, and what they show.
//!
//! A study is a TOML file: a base recipe, axes whose values change its keys, a key to tune, seeds. No study is known by name
//! here; those of this repository are files in `configs/studies/`. In the order of use:
//!
//! * `study_file.rs` reads the file; `budget.rs` is how much a sweep of it may train, `cost.rs`
//!   what a run takes.
//! * `points.rs` lists the combinations of the axes, and the runs that are still needed: first the search for each best rate,
//!   then a run for each seed. It is a function of the study and its table, so a study that was killed continues where it was.
//! * `settings.rs` makes the settings of a run, and the key that identifies it.
//! * `sweep.rs` trains what is missing, several processes at once. `measure.rs` reads what a run left in its folder.
//! * `run_table.rs` is the table, a line of JSON for each run.
//! * `report/` makes a page from the table, with `statistics.rs`: intervals, fits, bootstrap.

pub mod budget;
pub mod cost;
pub mod measure;
pub mod points;
pub mod report;
pub mod run_table;
pub mod settings;
pub mod statistics;
pub mod study_file;
pub mod sweep;
