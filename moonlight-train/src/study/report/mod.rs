//! `moonlight report`: the page of a study, made from its table and from nothing else.
//!
//! * `results.rs`: the rows of each point at its best rate, and the columns of tables.
//! * `tables.rs`: tuning curves, means over seeds, differences in pairs of seeds.
//! * `scaling.rs`: power laws over operations, and the share that one method needs of the other's.
//! * `weights.rs`: singular values and RMS of the weights over training.
//! * `page.rs`: the page.

mod page;
mod results;
mod scaling;
mod tables;
mod weights;

use serde::Deserialize;

use super::run_table::RunTable;
use super::study_file::Study;
use crate::analysis::plots::draw::{Chart, Format, draw};
use crate::error::TrainError;

use results::Results;

/// A part of the page.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Section {
    /// Means over seeds with 95 % intervals: a row for each point.
    Table {
        /// The heading.
        title: String,
        /// What is shown: see `results.rs`.
        columns: Vec<String>,
    },
    /// Differences between values of an axis, in pairs of the same seed.
    Difference {
        /// The heading.
        title: String,
        /// The axis that is compared.
        axis: String,
        /// The value that the others are compared with.
        baseline: String,
        /// What is compared.
        columns: Vec<String>,
    },
    /// Losses over operations: power laws, and the share of the baseline's operations that the others need for the same loss.
    ScalingLaw {
        /// The heading.
        title: String,
        /// The axis that is compared.
        axis: String,
        /// The value that the others are compared with.
        baseline: String,
        /// Which values are compared with it; empty for all.
        #[serde(default)]
        others: Vec<String>,
        /// The axis of model sizes.
        size: String,
    },
    /// Singular values by group of matrices, and over training.
    Spectra {
        /// The heading.
        title: String,
        /// The axis that is compared.
        axis: String,
    },
    /// The RMS of the weights over training.
    Weights {
        /// The heading.
        title: String,
        /// The axis that is compared.
        axis: String,
    },
}

/// A page and its figures.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Markdown. It refers to the figures by their names.
    pub page: String,
    /// File names, and SVG.
    pub figures: Vec<(String, Vec<u8>)>,
}

/// Makes the page of a study. The same table gives the same page.
///
/// # Errors
///
/// A table that cannot be read, and a section with an axis or a column that the study does not have.
pub fn report(study: &Study) -> Result<Report, TrainError> {
    let table = RunTable::read(study, None)?;
    let results = Results::new(study, &table);
    page::page(&results)
}

/// Text and figures of a section.
#[derive(Debug, Default)]
struct Part {
    text: String,
    charts: Vec<Chart>,
}

impl Part {
    fn text(text: String) -> Self {
        Self { text, charts: Vec::new() }
    }
}

fn svg(chart: &Chart) -> Result<Vec<u8>, TrainError> {
    draw(chart, Format::Svg).map_err(|problem| TrainError::Internal(format!("a figure cannot be drawn: {problem}")))
}
