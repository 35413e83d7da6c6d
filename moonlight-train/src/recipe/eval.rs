//! `[eval]`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::Check;
use moonlight_infer::eval::Task;
use moonlight_infer::expand_env;

/// Tasks on which the model is evaluated before the first step and after the last; `evaluation.json` has both results.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Files of tasks: multiple choice, perplexity or exact answers, in the formats of `moonlight eval --task`.
    pub tasks: Vec<String>,
    /// Solved examples before each multiple-choice question. Base models need some to see the form of an answer; published
    /// results name their number.
    pub shots: usize,
    /// The largest number of rows to use of each file; 0 for all. Lower it if the evaluation takes too long.
    pub limit: usize,
}

impl EvalConfig {
    pub(super) fn check(&self, check: &mut Check<'_>) {
        for text in &self.tasks {
            if let Err(name) = expand_env(text) {
                let problem = format!("contains `{text}`, but the environment variable `{name}` is not set");
                check.invalid("eval.tasks", problem, None);
            }
        }
    }

    /// The tasks with their settings. `shots` has an effect on multiple-choice questions only.
    pub fn tasks(&self) -> Vec<Task> {
        let path = |text: &String| PathBuf::from(expand_env(text).unwrap_or_else(|_| text.clone()));
        let task = |text| Task { path: path(text), shots: self.shots, limit: self.limit, ..Task::default() };
        self.tasks.iter().map(task).collect()
    }
}
