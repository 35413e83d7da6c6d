//! `[eval]`.

use moonlight_infer::eval::Task;
use std::path::PathBuf;

use moonlight_infer::expand;
use serde::Serialize;

use super::section::Section;

/// `[eval]`: what the model is asked before the first step and after the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EvalConfig {
    /// `tasks`: files of rows, as `moonlight eval --task` reads them. Default: none.
    pub tasks: Vec<String>,
    /// `shots`: examples before each multiple-choice question. Default: 0.
    pub shots: usize,
    /// `limit`: rows of each file; 0 for all. Default: 0.
    pub limit: usize,
}

impl EvalConfig {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let tasks = section.strings("tasks").unwrap_or_default();
        for text in &tasks {
            if let Err(name) = expand(text) {
                section.invalid("tasks", format!("has `{text}`, but the environment has no `{name}`"), None);
            }
        }
        let shots = section.whole("shots").unwrap_or(0) as usize;
        let limit = section.whole("limit").unwrap_or(0) as usize;
        Self { tasks, shots, limit }
    }

    /// The tasks; examples go before questions only.
    pub fn tasks(&self) -> Vec<Task> {
        let path = |text: &String| PathBuf::from(expand(text).unwrap_or_else(|_| text.clone()));
        let task = |text| Task { path: path(text), shots: self.shots, limit: self.limit, ..Task::default() };
        self.tasks.iter().map(task).collect()
    }
}
