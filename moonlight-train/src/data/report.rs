//! What was found while data were read, kept with the tokens so that a later run can say it again.

use std::collections::BTreeMap;

use moonlight_convert::Printable;
use moonlight_infer::chat::Shape;
use serde::{Deserialize, Serialize};

use super::files::SourceFile;

/// So many records are named; the rest are counted.
const NAMED: usize = 5;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Files whose bytes were not all UTF-8.
    pub(super) replaced: u64,
    /// Conversations of each shape.
    pub(super) shapes: BTreeMap<Shape, u64>,
    /// Records that were left out because they are wrong.
    pub(super) broken: Faults,
    /// Fields that neither the chat template nor the reader of records read.
    #[serde(default)]
    pub(super) unread: Unread,
}

/// So many fields are named, and so long a name is kept.
const FIELDS: usize = 200;
const LONGEST_NAME: usize = 80;

/// Fields of records that nobody read, and in how many records each is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Unread {
    fields: BTreeMap<String, u64>,
    /// Records with a field that is not named, as there are too many.
    others: u64,
}

impl Unread {
    /// Counts the fields of a record.
    pub(super) fn add(&mut self, fields: Vec<String>) {
        let mut others = false;
        for field in fields {
            let field: String = match field.char_indices().nth(LONGEST_NAME) {
                Some((end, _)) => format!("{}…", &field[..end]),
                None => field,
            };
            let is_room = self.fields.len() < FIELDS;
            match self.fields.get_mut(&field) {
                Some(count) => *count += 1,
                None if is_room => drop(self.fields.insert(field, 1)),
                None => others = true,
            }
        }
        self.others += u64::from(others);
    }

    fn note(&self, key: &str) -> Option<String> {
        if self.fields.is_empty() {
            return None;
        }
        let mut named: Vec<String> =
            self.fields.iter().map(|(field, count)| format!("`{}` ({count})", Printable(field))).collect();
        if self.others > 0 {
            named.push(format!("and more in {} records", self.others));
        }
        Some(format!(
            "data.{key}: fields that neither the chat template nor this program reads, and in how many records: {}",
            named.join(", ")
        ))
    }
}

/// Records with something wrong: all counted, the first few named.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Faults {
    pub(super) count: u64,
    first: Vec<Fault>,
}

/// A record with something wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Fault {
    /// Index of the file among those that were read.
    pub(super) file: u32,
    /// Its line, from 1.
    pub(super) line: u32,
    /// What is wrong; may be empty where the context says it.
    pub(super) problem: String,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.count += 1;
        if self.first.len() < NAMED {
            self.first.push(fault);
        }
    }

    /// `data.KEY: 7 records WHAT: a.jsonl:3 (no content), a.jsonl:9 (...), and 5 more`; nothing where there are none.
    pub(super) fn note(&self, key: &str, what: &str, files: &[SourceFile]) -> Option<String> {
        if self.count == 0 {
            return None;
        }
        let mut named: Vec<String> = self.first.iter().map(|fault| fault.named(files)).collect();
        let left = self.count - self.first.len() as u64;
        if left > 0 {
            named.push(format!("and {left} more"));
        }
        let records = if self.count == 1 { "record was" } else { "records were" };
        Some(format!("data.{key}: {} {records} {what}: {}", self.count, named.join(", ")))
    }
}

impl Fault {
    fn named(&self, files: &[SourceFile]) -> String {
        let path = files.get(self.file as usize).map(|file| file.path.display().to_string()).unwrap_or_default();
        match self.problem.as_str() {
            "" => format!("{path}:{}", self.line),
            problem => format!("{path}:{} ({problem})", self.line),
        }
    }
}

impl Report {
    /// What a reader of the run should know of it.
    pub(super) fn notes(&self, key: &str, files: &[SourceFile]) -> Vec<String> {
        let mut notes = Vec::new();
        if self.replaced > 0 {
            notes.push(format!(
                "data.{key}: bytes that are not UTF-8 were read as U+FFFD; files that have such: {}",
                self.replaced
            ));
        }
        if !self.shapes.is_empty() {
            let shapes: Vec<String> =
                self.shapes.iter().map(|(shape, count)| format!("{count} with {shape}")).collect();
            notes.push(format!("data.{key}: conversations: {}", shapes.join(", ")));
        }
        notes.extend(self.unread.note(key));
        notes.extend(self.broken.note(key, "broken and left out", files));
        notes
    }
}
