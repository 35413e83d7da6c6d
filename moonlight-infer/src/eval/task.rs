//! Rows of task files in the layouts of the data sets on the Hub, and the prompts that lm-evaluation-harness builds from them
//! (its tasks `mmlu`, `arc_easy`/`arc_challenge` and `hellaswag`, version 0.4).

use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::python_str;
use crate::error::InferError;
use crate::records::{Record, RecordReader, parse};

/// The format of the rows of a task file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskFormat {
    /// `question`, `choices` (a list), `answer` (an index or a letter), optional `subject`.
    Mmlu,
    /// `question`, `choices` of `text` and `label`, `answerKey`.
    Arc,
    /// `ctx` (or `ctx_a` and `ctx_b`), `endings`, `label`, optional `activity_label`.
    HellaSwag,
    /// `text`, or a `page` of WikiText.
    Perplexity,
    /// A conversation in any [format](crate::chat::ConversationFormat).
    Chat,
}

impl FromStr for TaskFormat {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "mmlu" => Ok(Self::Mmlu),
            "arc" => Ok(Self::Arc),
            "hellaswag" => Ok(Self::HellaSwag),
            "perplexity" => Ok(Self::Perplexity),
            "chat" => Ok(Self::Chat),
            _ => Err(()),
        }
    }
}

impl std::fmt::Display for TaskFormat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Mmlu => "mmlu",
            Self::Arc => "arc",
            Self::HellaSwag => "hellaswag",
            Self::Perplexity => "perplexity",
            Self::Chat => "chat",
        })
    }
}

impl TaskFormat {
    /// Detects the format of a row from its keys.
    pub(super) fn detect(row: &Map<String, Value>) -> Option<Self> {
        let has = |key: &str| row.contains_key(key);
        if has("endings") {
            Some(Self::HellaSwag)
        } else if has("answerKey") {
            Some(Self::Arc)
        } else if has("question") && has("choices") {
            Some(Self::Mmlu)
        } else if has("messages") || has("conversations") || has("instruction") {
            Some(Self::Chat)
        } else if has("text") || has("page") {
            Some(Self::Perplexity)
        } else {
            None
        }
    }

    /// Whether rows are multiple choice.
    pub(super) fn has_choices(self) -> bool {
        matches!(self, Self::Mmlu | Self::Arc | Self::HellaSwag)
    }
}

/// A row of a file.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// The line in which it starts, from 1; in a parquet file the row.
    pub(super) line: usize,
    /// The JSON of the row.
    pub(super) text: String,
    pub(super) fields: Map<String, Value>,
}

/// Reads the first `limit` rows of a file (0 for all), without empty lines.
pub(super) fn read_rows(path: &Path, limit: usize) -> Result<Vec<Row>, InferError> {
    let limit = if limit == 0 { usize::MAX } else { limit };
    let mut records = RecordReader::open(path, &[], None)?;
    let mut rows = Vec::new();
    while rows.len() < limit
        && let Some(record) = records.next_record()?
    {
        rows.push(read(path, record)?);
    }
    if rows.is_empty() {
        return Err(InferError::NoRows(path.to_owned()));
    }
    Ok(rows)
}

fn read(path: &Path, Record { json, place }: Record) -> Result<Row, InferError> {
    match parse(&json).map_err(|error| InferError::json(path, place, &error, None))?.value {
        // Lossless: `parse` refuses what is not UTF-8.
        Value::Object(fields) => {
            Ok(Row { line: place.line, text: String::from_utf8_lossy(&json).into_owned(), fields })
        }
        _ => Err(InferError::at(path, place, "the record is not a JSON object", None)),
    }
}

/// A multiple-choice question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// The text before the few-shot examples.
    pub(super) description: String,
    /// The prompt.
    pub(super) context: String,
    /// The continuations to choose from, without the space before each.
    pub(super) choices: Vec<String>,
    /// The index of the right choice.
    pub(super) gold: usize,
    /// Few-shot examples must be of the same subject.
    pub(super) subject: Option<String>,
}

impl Question {
    /// Parses a row. The error names what is wrong with the row, as a sentence.
    pub(super) fn parse(format: TaskFormat, row: &Map<String, Value>) -> Result<Self, String> {
        let text =
            |key: &str| row.get(key).and_then(Value::as_str).ok_or_else(|| format!("the row has no string `{key}`"));
        let question = match format {
            TaskFormat::Mmlu => {
                let choices = strings(row.get("choices")).ok_or("`choices` is not a list of strings")?;
                let letters: Vec<String> = (b'A'..=b'Z').map(|letter| char::from(letter).to_string()).collect();
                if choices.len() > letters.len() {
                    return Err(format!("the row has {} choices, more than 26", choices.len()));
                }
                let lines: Vec<String> =
                    letters.iter().zip(&choices).map(|(letter, choice)| format!("{letter}. {choice}\n")).collect();
                let subject = row.get("subject").and_then(Value::as_str).map(str::to_owned);
                let about = subject.as_ref().map(|subject| subject.replace('_', " "));
                Self {
                    description: about.map_or(String::new(), |subject| {
                        format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
                    }),
                    context: format!("{}\n{}Answer:", python_str::strip(text("question")?), lines.concat()),
                    gold: gold(row.get("answer"), &letters[..choices.len()])
                        .ok_or("`answer` is none of the choices")?,
                    choices: letters.into_iter().take(choices.len()).collect(),
                    subject,
                }
            }
            TaskFormat::Arc => {
                let choices = row.get("choices").ok_or("the row has no `choices`")?;
                let labels = strings(choices.get("label")).ok_or("`choices.label` is not a list of strings")?;
                let texts = strings(choices.get("text")).ok_or("`choices.text` is not a list of strings")?;
                if labels.len() != texts.len() {
                    return Err(format!("{} labels for {} choices", labels.len(), texts.len()));
                }
                let key = text("answerKey")?;
                Self {
                    description: String::new(),
                    context: format!("Question: {}\nAnswer:", text("question")?),
                    gold: labels.iter().position(|label| label == key).ok_or("`answerKey` is none of the labels")?,
                    choices: texts,
                    subject: None,
                }
            }
            TaskFormat::HellaSwag => {
                let endings = strings(row.get("endings")).ok_or("`endings` is not a list of strings")?;
                let context = match (row.get("ctx_a").and_then(Value::as_str), row.get("ctx_b").and_then(Value::as_str))
                {
                    (Some(a), Some(b)) => format!("{a} {}", python_str::capitalize(b)),
                    _ => text("ctx")?.to_owned(),
                };
                let context = match row.get("activity_label").and_then(Value::as_str) {
                    Some(activity) => format!("{activity}: {context}"),
                    None => context,
                };
                let places: Vec<String> = (0..endings.len()).map(|index| index.to_string()).collect();
                Self {
                    description: String::new(),
                    context: clean_hellaswag(&context),
                    gold: gold(row.get("label"), &places).ok_or("`label` is none of the endings")?,
                    choices: endings.iter().map(|ending| clean_hellaswag(ending)).collect(),
                    subject: None,
                }
            }
            TaskFormat::Perplexity | TaskFormat::Chat => return Err("the row has no choices".into()),
        };
        if question.choices.len() < 2 {
            return Err("the row has fewer than two choices".into());
        }
        Ok(question)
    }

    /// The question with its answer, as a few-shot example.
    pub(super) fn with_answer(&self) -> String {
        format!("{} {}", self.context, self.choices[self.gold])
    }
}

fn strings(value: Option<&Value>) -> Option<Vec<String>> {
    value?.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

/// The index of the right choice: an index as a number or a string, or one of the labels.
fn gold(value: Option<&Value>, labels: &[String]) -> Option<usize> {
    let index = match value? {
        Value::String(text) => {
            labels.iter().position(|label| label == text.trim()).or_else(|| text.trim().parse().ok())?
        }
        number => usize::try_from(number.as_u64()?).ok()?,
    };
    (index < labels.len()).then_some(index)
}

/// Removes the artifacts of HellaSwag's WikiHow texts (`[title]` and other brackets), as the harness does.
fn clean_hellaswag(text: &str) -> String {
    let text = python_str::strip(text).replace(" [title]", ". ");
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        let (before, inside) = rest.split_at(open);
        clean.push_str(before);
        // The harness removes `\[.*?\]`, and Python's `.` does not match a line break.
        match inside.find([']', '\n']).filter(|&end| inside.as_bytes()[end] == b']') {
            Some(end) => rest = &inside[end + 1..],
            None => {
                clean.push('[');
                rest = &inside[1..];
            }
        }
    }
    clean.push_str(rest);
    clean.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(row: Value) -> Result<(TaskFormat, Question), String> {
        let Value::Object(row) = row else { panic!("not an object") };
        let format = TaskFormat::detect(&row).unwrap();
        Question::parse(format, &row).map(|question| (format, question))
    }

    #[test]
    fn mmlu_asks_for_a_letter() {
        let row = serde_json::json!({"question": " 1 + 1? ", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"],
            "answer": 1});
        let (format, question) = read(row).unwrap();
        assert_eq!(format, TaskFormat::Mmlu);
        assert_eq!(question.context, "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:");
        assert_eq!((question.choices.concat(), question.gold), ("ABCD".into(), 1));
        assert_eq!(question.with_answer(), format!("{} B", question.context));
        assert_eq!(
            question.description,
            "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        );
        let row = serde_json::json!({"question": "?", "choices": ["1", "2", "3", "4"], "answer": "D"});
        assert_eq!(read(row).unwrap().1.gold, 3);
    }

    #[test]
    fn arc_asks_for_the_text() {
        let row = serde_json::json!({"id": "x", "question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]},
            "answerKey": "2"});
        let (format, question) = read(row).unwrap();
        assert_eq!((format, question.gold), (TaskFormat::Arc, 1));
        assert_eq!(question.with_answer(), "Question: Why?\nAnswer: no");
    }

    #[test]
    fn hellaswag_is_cleaned() {
        let row = serde_json::json!({"ind": 4, "activity_label": "Roof", "ctx_a": "A man is [header] up.", "ctx_b": "he Sits",
            "ctx": "unused", "endings": [" down. [title] More [step] here", "up"], "label": "1"});
        let (format, question) = read(row).unwrap();
        assert_eq!((format, question.gold), (TaskFormat::HellaSwag, 1));
        assert_eq!(question.context, "Roof: A man is up. He sits");
        assert_eq!(question.choices, ["down.. More here", "up"]);
        let row = serde_json::json!({"ctx": "A [b", "endings": ["x", "y"], "label": 0});
        assert_eq!(read(row).unwrap().1.context, "A [b");
    }

    #[test]
    fn invalid_rows_are_errors() {
        for (row, expected) in [
            (serde_json::json!({"question": "?", "choices": ["1"], "answer": 0}), "fewer than two choices"),
            (
                serde_json::json!({"question": "?", "choices": ["1", "2"], "answer": 2}),
                "`answer` is none of the choices",
            ),
            (
                serde_json::json!({"choices": ["1", "2"], "question": 3, "answer": 0}),
                "the row has no string `question`",
            ),
            (serde_json::json!({"question": "?", "choices": {}, "answerKey": "A"}), "`choices.label` is not a list"),
            (serde_json::json!({"endings": ["a", "b"], "ctx": "x"}), "`label` is none of the endings"),
        ] {
            let error = read(row).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
