//! What was found while data were read, kept with the tokens so that a later run can say it again.

use std::collections::BTreeMap;

use moonlight_convert::Printable;
use moonlight_infer::chat::ConversationFormat;
use moonlight_infer::records::FilePosition;
use serde::{Deserialize, Serialize};

use super::files::SourceFile;

/// So many records are named; the rest are counted.
const MAX_NAMED_RECORDS: usize = 5;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Files by how they were read; those that were read as one expects by the format are under `usual`.
    pub(super) kinds: BTreeMap<String, u64>,
    /// What the format's files usually are.
    pub(super) usual: String,
    /// Files whose bytes were not all UTF-8.
    pub(super) replaced: u64,
    /// Records in which half of a surrogate pair was read as U+FFFD.
    pub(super) surrogates: Faults,
    /// Conversations of each shape.
    pub(super) shapes: BTreeMap<ConversationFormat, u64>,
    /// Fields of records that nothing reads, neither this program nor a chat template.
    pub(super) unread: Fields,
    /// Fields of records that a chat template is given as variables, as it names them.
    pub(super) given: Fields,
    /// Rows of CSV that were left out, as all their fields are empty.
    pub(super) blank_rows: u64,
    /// Records without a text.
    pub(super) empty: Faults,
    /// Records that were left out because they are wrong.
    pub(super) broken: Faults,
    /// Files of which every record is wrong, and how many they have.
    pub(super) hopeless: Vec<(u32, u64)>,
}

/// So many fields are named, and so long a name is kept.
const MAX_FIELDS: usize = 200;
const MAX_FIELD_NAME: usize = 80;

/// Fields of records, and in how many records each is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Fields {
    fields: BTreeMap<String, u64>,
    /// Records with a field that is not named, as there are too many.
    others: u64,
}

impl Fields {
    /// Counts the fields of a record.
    pub(super) fn add(&mut self, fields: Vec<String>) {
        let mut others = false;
        for field in fields {
            let field: String = match field.char_indices().nth(MAX_FIELD_NAME) {
                Some((end, _)) => format!("{}…", &field[..end]),
                None => field,
            };
            let is_room = self.fields.len() < MAX_FIELDS;
            match self.fields.get_mut(&field) {
                Some(count) => *count += 1,
                None if is_room => drop(self.fields.insert(field, 1)),
                None => others = true,
            }
        }
        self.others += u64::from(others);
    }

    /// `WHAT, and in how many records: NAME (7), ...`; nothing where there are none.
    fn note(&self, what: &str) -> Option<String> {
        if self.fields.is_empty() {
            return None;
        }
        let named = self.fields.iter().map(|(field, count)| match field.as_str() {
            // pandas writes the index as such a column.
            "" => format!("a field without a name ({count})"),
            field => format!("`{}` ({count})", Printable(field)),
        });
        let mut named: Vec<String> = named.collect();
        if self.others > 0 {
            named.push(format!("and more in {} records", self.others));
        }
        Some(format!("{what}, and in how many records: {}", named.join(", ")))
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
    /// Its column, from 1; 0 where the line says enough.
    pub(super) column: u32,
    /// What is wrong; may be empty where the context says it.
    pub(super) problem: String,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.count += 1;
        if self.first.len() < MAX_NAMED_RECORDS {
            self.first.push(fault);
        }
    }

    /// `7 records were WHAT: a.jsonl:3 (no content), a.jsonl:9 (...), and 5 more`; nothing where there are none.
    pub(super) fn said(&self, what: &str, files: &[SourceFile]) -> Option<String> {
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
    /// What a reader of the run should know of it.
    pub(super) fn notes(&self, key: &str, files: &[SourceFile]) -> Vec<String> {
        let mut notes = Vec::new();
        if self.kinds.keys().any(|kind| *kind != self.usual) {
            let kinds: Vec<String> = self.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            notes.push(format!("files by what they are: {}", kinds.join(", ")));
        }
        if self.replaced > 0 {
            notes
                .push(format!("bytes that are not UTF-8 were read as U+FFFD; files that have such: {}", self.replaced));
        }
        notes.extend(self.surrogates.said("read with U+FFFD in place of half a surrogate pair", files));
        if !self.shapes.is_empty() {
            let shapes: Vec<String> =
                self.shapes.iter().map(|(shape, count)| format!("{count} with {shape}")).collect();
            notes.push(format!("conversations: {}", shapes.join(", ")));
        }
        notes.extend(self.given.note("fields given to the template"));
        notes.extend(self.unread.note("fields that nothing reads"));
        notes.extend(self.left_out(files));
        for &(file, count) in &self.hopeless {
            notes.push(format!(
                "all {count} records of `{}` are broken: it may be no file of this format",
                path_of(file, files)
            ));
        }
        notes.into_iter().map(|note| format!("data.{key}: {note}")).collect()
    }

    /// Which records were left out, and why.
    pub(super) fn left_out(&self, files: &[SourceFile]) -> Vec<String> {
        let rows = if self.blank_rows == 1 { "row of CSV was" } else { "rows of CSV were" };
        let blank = format!("{} {rows} left out, with nothing in any field", self.blank_rows);
        [
            Some(blank).filter(|_| self.blank_rows > 0),
            self.empty.said("empty and left out", files),
            self.broken.said("broken and left out", files),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
