//! What was found while reading data. It is stored with the tokens, so that a later run that reuses them logs it too.

use std::collections::BTreeMap;

use moonlight_convert::Printable;
use moonlight_infer::chat::ConversationFormat;
use moonlight_infer::records::FilePosition;
use serde::{Deserialize, Serialize};

use super::files::SourceFile;

/// Records with the same kind of problem that are listed by their lines; the rest are only counted.
const MAX_NAMED_RECORDS: usize = 5;

/// What was found while reading. The names of the fields are part of the cache's format.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// The number of files of each kind.
    pub(super) kinds: BTreeMap<String, u64>,
    /// The usual kind for `data.format`, which is not worth a note.
    pub(super) usual: String,
    /// Files with bytes that are not UTF-8.
    pub(super) replaced: u64,
    /// Records with half of a surrogate pair, which was read as U+FFFD.
    pub(super) surrogates: Faults,
    /// The number of conversations in each format.
    pub(super) shapes: BTreeMap<ConversationFormat, u64>,
    /// Fields that are ignored: neither this program nor the chat template uses them.
    pub(super) unread: Fields,
    /// Fields that the chat template uses as variables, by their names in the template.
    pub(super) given: Fields,
    /// Rows of CSV that were left out because all their fields are empty.
    pub(super) blank_rows: u64,
    /// Records without text, which were left out.
    pub(super) empty: Faults,
    /// Broken records, which were left out.
    pub(super) broken: Faults,
    /// Files whose records are all broken, with the number of records.
    pub(super) hopeless: Vec<(u32, u64)>,
}

/// Fields that are listed by name: a file may have any number of them.
const MAX_FIELDS: usize = 200;
/// Characters of a field's name that are kept.
const MAX_FIELD_NAME: usize = 80;

/// Fields of records, with the number of records that have each.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Fields {
    fields: BTreeMap<String, u64>,
    /// Records with a field beyond the first `MAX_FIELDS`.
    others: u64,
}

impl Fields {
    /// Counts the fields of one record.
    pub(super) fn add(&mut self, fields: Vec<String>) {
        let mut others = false;
        for field in fields {
            let field: String = match field.char_indices().nth(MAX_FIELD_NAME) {
                Some((end, _)) => format!("{}…", &field[..end]),
                None => field,
            };
            let has_space = self.fields.len() < MAX_FIELDS;
            match self.fields.get_mut(&field) {
                Some(count) => *count += 1,
                None if has_space => drop(self.fields.insert(field, 1)),
                None => others = true,
            }
        }
        self.others += u64::from(others);
    }

    /// `WHAT (number of records): NAME (7), ...`; `None` if there are no fields.
    fn note(&self, what: &str) -> Option<String> {
        if self.fields.is_empty() {
            return None;
        }
        let named = self.fields.iter().map(|(field, count)| match field.as_str() {
            // pandas writes the index as a column without a name.
            "" => format!("a field without a name ({count})"),
            field => format!("`{}` ({count})", Printable(field)),
        });
        let mut named: Vec<String> = named.collect();
        if self.others > 0 {
            named.push(format!("and more in {} records", self.others));
        }
        Some(format!("{what} (number of records): {}", named.join(", ")))
    }
}

/// Records with a problem: all are counted, the first few are listed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Faults {
    pub(super) count: u64,
    first: Vec<Fault>,
}

/// A record with a problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Fault {
    /// The index of the file among those that were read.
    pub(super) file: u32,
    /// The line of the record, from 1.
    pub(super) line: u32,
    /// The column of the record, from 1; 0 if the line is enough.
    pub(super) column: u32,
    /// The problem; empty if the context names it.
    pub(super) problem: String,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.count += 1;
        if self.first.len() < MAX_NAMED_RECORDS {
            self.first.push(fault);
        }
    }

    /// `7 records were WHAT: a.jsonl:3 (no content), a.jsonl:9 (...), and 5 more`; `None` if there are none.
    pub(super) fn note(&self, what: &str, files: &[SourceFile]) -> Option<String> {
        if self.count == 0 {
            return None;
        }
        let mut named: Vec<String> = self.first.iter().map(|fault| fault.named(files)).collect();
        let left = self.count - self.first.len() as u64;
        if left > 0 {
            named.push(format!("and {left} more"));
        }
        let records = if self.count == 1 { "record was" } else { "records were" };
        Some(format!("{} {records} {what}: {}", self.count, named.join(", ")))
    }
}

impl Fault {
    fn named(&self, files: &[SourceFile]) -> String {
        let path = path_of(self.file, files);
        let place = FilePosition { line: self.line as usize, column: self.column as usize };
        match self.problem.as_str() {
            "" => format!("{path}:{place}"),
            problem => format!("{path}:{place} ({problem})"),
        }
    }
}

fn path_of(file: u32, files: &[SourceFile]) -> String {
    files.get(file as usize).map(|file| file.path.display().to_string()).unwrap_or_default()
}

impl Report {
    /// The notes for the log and `data.txt`.
    pub(super) fn notes(&self, key: &str, files: &[SourceFile]) -> Vec<String> {
        let mut notes = Vec::new();
        if self.kinds.keys().any(|kind| *kind != self.usual) {
            let kinds: Vec<String> = self.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            notes.push(format!("files by kind: {}", kinds.join(", ")));
        }
        if self.replaced > 0 {
            notes.push(format!(
                "bytes that are not UTF-8 were read as U+FFFD; files with such bytes: {}",
                self.replaced
            ));
        }
        notes.extend(self.surrogates.note("read with U+FFFD in place of half a surrogate pair", files));
        if !self.shapes.is_empty() {
            let shapes: Vec<String> =
                self.shapes.iter().map(|(shape, count)| format!("{count} with {shape}")).collect();
            notes.push(format!("conversations: {}", shapes.join(", ")));
        }
        notes.extend(self.given.note("fields used by the chat template"));
        notes.extend(self.unread.note("ignored fields"));
        notes.extend(self.left_out(files));
        for &(file, count) in &self.hopeless {
            notes.push(format!(
                "all {count} records of `{}` are broken: the file may have another format",
                path_of(file, files)
            ));
        }
        notes.into_iter().map(|note| format!("data.{key}: {note}")).collect()
    }

    /// The records that were left out, and why.
    pub(super) fn left_out(&self, files: &[SourceFile]) -> Vec<String> {
        let rows = if self.blank_rows == 1 { "row of CSV was" } else { "rows of CSV were" };
        let blank = format!("{} {rows} left out, because all fields are empty", self.blank_rows);
        [
            Some(blank).filter(|_| self.blank_rows > 0),
            self.empty.note("empty and left out", files),
            self.broken.note("broken and left out", files),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
