//! `[eval]`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::Check;
use moonlight_infer::eval::Task;
use moonlight_infer::expand_env;

/// What the model is asked before the first step and after the last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Files of rows, as `moonlight eval --task` reads them.
    pub tasks: Vec<String>,
    /// Examples before each multiple-choice question.
    pub shots: usize,
    /// Rows of each file; 0 for all.
    pub limit: usize,
}

impl EvalConfig {
    pub(super) fn check(&self, check: &mut Check<'_>) {
        for text in &self.tasks {
            if let Err(name) = expand_env(text) {
                check.invalid("eval.tasks", format!("has `{text}`, but the environment has no `{name}`"), None);
            }
        }
    }

    /// The tasks; examples go before questions only.
    pub fn tasks(&self) -> Vec<Task> {
        let path = |text: &String| PathBuf::from(expand_env(text).unwrap_or_else(|_| text.clone()));
        let task = |text| Task { path: path(text), shots: self.shots, limit: self.limit, ..Task::default() };
        self.tasks.iter().map(task).collect()
    }
}
