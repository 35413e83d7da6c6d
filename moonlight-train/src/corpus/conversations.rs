//! Conversations from Rust source, for fine-tuning: questions about documented functions.
//!
//! There are four kinds of question:
//!
//! * what a function does: the first sentence of its documentation (which can only be memorized, so only the loss matters);
//! * the name of the function in a line of code;
//! * the type that a signature returns;
//! * how many parameters a signature has.
//!
//! The last three have one right answer that can be read from the question, so an exact match is meaningful.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::files::SourceFile;

const SYSTEM: &str = "You answer questions about Rust.";
/// A longer signature is not asked about, bytes.
const LONGEST_LINE: usize = 110;
/// The bytes of a first sentence.
const SENTENCE: std::ops::RangeInclusive<usize> = 12..=160;
/// Every such conversation has two questions.
const TWO_EVERY: usize = 4;
/// The most conversations for validation, and with exact answers.
const MOST_VALID: usize = 1000;
const MOST_EXACT: usize = 300;

/// The numbers of conversations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConversationCounts {
    /// From training packages.
    pub train: usize,
    /// From validation packages.
    pub valid: usize,
    /// From validation packages, with answers that can be read from the question.
    pub exact: usize,
}

/// Conversations in OpenAI's layout.
pub(super) struct Conversations {
    pub(super) train: Vec<Value>,
    pub(super) valid: Vec<Value>,
    pub(super) exact: Vec<Value>,
}

impl Conversations {
    pub(super) fn counts(&self) -> ConversationCounts {
        ConversationCounts { train: self.train.len(), valid: self.valid.len(), exact: self.exact.len() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Documentation,
    Name,
    Type,
    Count,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Question {
    kind: Kind,
    text: String,
    answer: String,
}

impl Question {
    fn new(kind: Kind, asked: &str, line: &str, answer: impl Into<String>) -> Self {
        Self { kind, text: format!("{asked}\n{line}"), answer: answer.into() }
    }

    /// The line of code that it is about.
    fn line(&self) -> &str {
        self.text.split_once('\n').map_or("", |(_, line)| line)
    }
}

/// Makes up to `most` conversations from the training text, and some from the validation text.
pub(super) fn make(train: &[SourceFile], valid: &[SourceFile], most: usize, seed: u64) -> Conversations {
    let asked = questions(train);
    // A line that occurs in packages of both splits belongs to training.
    let lines: HashSet<&str> = asked.iter().map(Question::line).collect();
    let mut held_out = questions(valid);
    held_out.retain(|question| !lines.contains(question.line()));
    let held_out = ordered(held_out, seed);

    let mut conversations = Vec::new();
    let asked = ordered(asked, seed);
    let mut rest = asked.as_slice();
    while !rest.is_empty() && conversations.len() < most {
        let turns = if conversations.len() % TWO_EVERY == TWO_EVERY - 1 { 2 } else { 1 };
        let (now, after) = rest.split_at(turns.min(rest.len()));
        conversations.push(conversation(now));
        rest = after;
    }
    if most == 0 {
        return Conversations { train: conversations, valid: Vec::new(), exact: Vec::new() };
    }
    // A small corpus has fewer than both: then three quarters are for validation.
    let (valid, exact) = held_out.split_at(MOST_VALID.min(held_out.len() * 3 / 4));
    let one = |question: &Question| conversation(std::slice::from_ref(question));
    let exact = exact.iter().filter(|question| question.kind != Kind::Documentation);
    Conversations {
        train: conversations,
        valid: valid.iter().map(one).collect(),
        exact: exact.take(MOST_EXACT).map(one).collect(),
    }
}

fn conversation(turns: &[Question]) -> Value {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let turns = turns.iter().flat_map(|turn| [message("user", &turn.text), message("assistant", &turn.answer)]);
    json!({"messages": std::iter::once(message("system", SYSTEM)).chain(turns).collect::<Vec<_>>()})
}

/// Questions in an order that the seed determines.
fn ordered(mut questions: Vec<Question>, seed: u64) -> Vec<Question> {
    let hash = |question: &Question| xxh3_64_with_seed(question.text.as_bytes(), seed);
    questions.sort_by_cached_key(|question| (hash(question), question.clone()));
    questions
}

/// The questions about the functions of Rust files, each once, with the first answer by the path of the file.
fn questions(files: &[SourceFile]) -> Vec<Question> {
    let mut sorted: Vec<&SourceFile> = files.iter().filter(|file| file.path.ends_with(".rs")).collect();
    sorted.sort_by_key(|file| &file.path);
    let mut asked: BTreeMap<(Kind, String), String> = BTreeMap::new();
    for file in sorted {
        for function in functions(&file.text) {
            for Question { kind, text, answer } in function.questions(&file.package) {
                asked.entry((kind, text)).or_insert(answer);
            }
        }
    }
    asked.into_iter().map(|((kind, text), answer)| Question { kind, text, answer }).collect()
}

/// A public function whose signature is one line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Function<'a> {
    /// The line, without what follows the signature.
    line: &'a str,
    signature: Signature<'a>,
    /// The first sentence of the documentation.
    sentence: Option<String>,
}

impl Function<'_> {
    fn questions(&self, package: &str) -> Vec<Question> {
        let Self { line, signature, sentence } = self;
        let name = signature.name;
        let mut questions = Vec::new();
        if let Some(sentence) = sentence {
            let asked = format!("What does `{name}` of the crate `{package}` do?");
            questions.push(Question::new(Kind::Documentation, &asked, line, sentence));
        }
        let asked = "What is the name of the function in this line?";
        questions.push(Question::new(Kind::Name, asked, line, name));
        if let Some(output) = signature.output {
            let output = output.split_whitespace().collect::<Vec<_>>().join(" ");
            questions.push(Question::new(Kind::Type, "Which type does this function return?", line, output));
        }
        if !signature.inside.contains("->") {
            let asked = "How many parameters does this function take, without self?";
            questions.push(Question::new(Kind::Count, asked, line, parameters(signature.inside).to_string()));
        }
        questions
    }
}

fn functions(text: &str) -> Vec<Function<'_>> {
    let mut functions = Vec::new();
    let mut documentation: Vec<&str> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(words) = line.strip_prefix("///") {
            documentation.push(words.trim());
            continue;
        }
        if line.starts_with("#[") && line.ends_with(']') {
            continue;
        }
        if line.len() <= LONGEST_LINE
            && line.is_ascii()
            && let Some(signature) = Signature::parse(line)
        {
            let line = line.trim_end_matches(['{', ';', ' ']).trim();
            functions.push(Function { line, signature, sentence: first_sentence(&documentation) });
        }
        documentation.clear();
    }
    functions
}

/// The first sentence of documentation lines, if it is short and in plain words.
fn first_sentence(lines: &[&str]) -> Option<String> {
    let is_text = |line: &&&str| {
        !line.is_empty() && !line.starts_with(['#', '|', '*', '-', '<', '[']) && !line.starts_with("```")
    };
    let text = lines.iter().take_while(is_text).copied().collect::<Vec<_>>().join(" ");
    let ends = text.match_indices(['.', '!']).map(|(at, _)| at + 1);
    let end = ends.filter(|end| *end > 1).find(|end| text[*end..].chars().next().is_none_or(char::is_whitespace))?;
    let sentence = &text[..end];
    let is_plain = sentence.is_ascii() && !sentence.contains("](") && !sentence.contains("TODO");
    (is_plain && SENTENCE.contains(&sentence.len())).then(|| sentence.to_owned())
}

/// The parts of a function's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Signature<'a> {
    name: &'a str,
    /// What is between the parentheses.
    inside: &'a str,
    /// The type after the arrow.
    output: Option<&'a str>,
}

impl<'a> Signature<'a> {
    /// Parses a line such as `pub fn name<T>(a: T) -> u32 where T: Copy {`. A parameter with parentheses is not supported.
    fn parse(line: &'a str) -> Option<Self> {
        let mut rest = line.strip_prefix("pub ")?;
        while let Some(after) = ["const ", "async ", "unsafe "].iter().find_map(|word| rest.strip_prefix(word)) {
            rest = after;
        }
        let rest = rest.strip_prefix("fn ")?;
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let (name, rest) = rest.split_at(rest.find(|c| !is_name(c))?);
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        let (generics, rest) = rest.trim_start().split_once('(')?;
        let is_generics = |text: &str| text.len() > 2 && text.starts_with('<') && text.ends_with('>');
        if !generics.is_empty() && !is_generics(generics) {
            return None;
        }
        let (inside, rest) = rest.split_at(rest.find(['(', ')'])?);
        let rest = rest.strip_prefix(')')?.trim_start();
        let rest = rest.strip_suffix(['{', ';'])?;
        let Some(output) = rest.strip_prefix("->") else {
            let rest = rest.trim();
            return (rest.is_empty() || is_where(rest)).then_some(Self { name, inside, output: None });
        };
        let starts = output.match_indices("where").map(|(at, _)| at);
        let bounds = starts
            .filter(|at| *at > 0 && output[..*at].ends_with([' ', '>', ')', ']']))
            .find(|at| is_where(&output[*at..]));
        let output = output[..bounds.unwrap_or(output.len())].trim();
        (!output.is_empty() && !output.contains(['{', ';'])).then_some(Self { name, inside, output: Some(output) })
    }
}

/// Whether a text starts with the keyword `where`.
fn is_where(text: &str) -> bool {
    text.strip_prefix("where").is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_'))
}

/// How many parameters there are between the parentheses, `self` not counted.
fn parameters(inside: &str) -> usize {
    let (mut depth, mut start, mut count) = (0, 0, 0);
    for (at, character) in inside.char_indices().chain([(inside.len(), ',')]) {
        match character {
            '<' | '(' | '[' => depth += 1,
            '>' | ')' | ']' => depth -= 1,
            ',' if depth == 0 => {
                let parameter = inside[start..at].trim();
                count += usize::from(!parameter.is_empty() && !is_self(parameter));
                start = at + 1;
            }
            _ => {}
        }
    }
    count
}

/// `self`, `mut self`, `&self`, `&mut self`, `&'a mut self` or `self: Type`.
fn is_self(parameter: &str) -> bool {
    let mut rest = parameter;
    if let Some(after) = rest.strip_prefix('&') {
        rest = after;
        if let Some((lifetime, after)) = rest.strip_prefix('\'').and_then(|rest| rest.split_once(' '))
            && lifetime.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            rest = after;
        }
    }
    let rest = rest.strip_prefix("mut ").unwrap_or(rest);
    rest.strip_prefix("self").is_some_and(|rest| rest.is_empty() || rest.starts_with(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r####"//! A crate.

/// Returns the number of elements. The rest is not asked.
///
/// # Panics
pub fn len(&self) -> usize {
    self.items.len()
}

/// Maps every element
/// of a list!  Then more.
#[inline]
#[must_use]
pub const unsafe fn map<T: Into<u8>>(&'a mut self, a: HashMap<K, V>, b: [u8; 4]) -> &'a  mut T where T: X {
}

    /// Short.
    pub async fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<u8>>;
/// See [`that`](crate::that) for more about it.
pub fn see(mut self, a: u32, b: u32,) {
/// Größer, höher, weiter.
pub fn larger() where Self: Sized {
/// The version 1.5 of it is e.g. this, as of now.
pub fn version(&'static self) -> Result<(), Error> {
/// Not documented because a line is between.

pub fn not_documented(f: F, x: u8) -> &str where F: Fn() -> u8 {
pub(crate) fn private(&self) {
pub fn closure(f: impl Fn(u8) -> u8) {
pub fn arrow(f: fn -> u8, b: u8) -> Vec<u8> {
pub fn Upper() {
pub fn one_line() -> u8 { 1 }
pub fn spaced (a: u8) -> u8  {
    pub fn 	tabbed() {
/// TODO: documents nothing so far.
pub fn todo<'a>(&'a self, rest: &'a str) -> Cow<'a, str> {
/// What is it? It is a question without other ends
pub fn question(&mut self, r#type: u8) -> SomewhereElse {
pub fn name_that_is_very_long_so_that_its_line_is_longer_than_the_limit_of_a_hundred_and_ten_bytes(a: u8) -> u8 {
/// Repeats a function.
pub fn len(&self) -> usize {
/// Exactly 12.
/// - a list.
pub fn list(self_value: u8, itself: u8, self: Box<Self>) -> u8 {
"####;

    /// Kind, line and answer, as the Python script printed them from which this module was ported.
    const QUESTIONS: &str = "\
documentation|pub fn len(&self) -> usize|Returns the number of elements.
name|pub fn len(&self) -> usize|len
type|pub fn len(&self) -> usize|usize
count|pub fn len(&self) -> usize|0
documentation|pub const unsafe fn map<T: Into<u8>>(&'a mut self, a: HashMap<K, V>, b: [u8; 4]) -> &'a  mut T where T: X|Maps every element of a list!
name|pub const unsafe fn map<T: Into<u8>>(&'a mut self, a: HashMap<K, V>, b: [u8; 4]) -> &'a  mut T where T: X|map
type|pub const unsafe fn map<T: Into<u8>>(&'a mut self, a: HashMap<K, V>, b: [u8; 4]) -> &'a  mut T where T: X|&'a mut T
count|pub const unsafe fn map<T: Into<u8>>(&'a mut self, a: HashMap<K, V>, b: [u8; 4]) -> &'a  mut T where T: X|2
name|pub async fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<u8>>|poll
type|pub async fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<u8>>|Poll<Option<u8>>
count|pub async fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<u8>>|1
name|pub fn see(mut self, a: u32, b: u32,)|see
count|pub fn see(mut self, a: u32, b: u32,)|2
name|pub fn larger() where Self: Sized|larger
count|pub fn larger() where Self: Sized|0
documentation|pub fn version(&'static self) -> Result<(), Error>|The version 1.5 of it is e.g.
name|pub fn version(&'static self) -> Result<(), Error>|version
type|pub fn version(&'static self) -> Result<(), Error>|Result<(), Error>
count|pub fn version(&'static self) -> Result<(), Error>|0
name|pub fn not_documented(f: F, x: u8) -> &str where F: Fn() -> u8|not_documented
type|pub fn not_documented(f: F, x: u8) -> &str where F: Fn() -> u8|&str
count|pub fn not_documented(f: F, x: u8) -> &str where F: Fn() -> u8|2
name|pub fn arrow(f: fn -> u8, b: u8) -> Vec<u8>|arrow
type|pub fn arrow(f: fn -> u8, b: u8) -> Vec<u8>|Vec<u8>
name|pub fn spaced (a: u8) -> u8|spaced
type|pub fn spaced (a: u8) -> u8|u8
count|pub fn spaced (a: u8) -> u8|1
name|pub fn todo<'a>(&'a self, rest: &'a str) -> Cow<'a, str>|todo
type|pub fn todo<'a>(&'a self, rest: &'a str) -> Cow<'a, str>|Cow<'a, str>
count|pub fn todo<'a>(&'a self, rest: &'a str) -> Cow<'a, str>|1
name|pub fn question(&mut self, r#type: u8) -> SomewhereElse|question
type|pub fn question(&mut self, r#type: u8) -> SomewhereElse|SomewhereElse
count|pub fn question(&mut self, r#type: u8) -> SomewhereElse|1
name|pub fn list(self_value: u8, itself: u8, self: Box<Self>) -> u8|list
type|pub fn list(self_value: u8, itself: u8, self: Box<Self>) -> u8|u8
count|pub fn list(self_value: u8, itself: u8, self: Box<Self>) -> u8|2
";

    fn file(package: &str, text: &str) -> SourceFile {
        SourceFile { package: package.into(), path: format!("{package}/src/lib.rs"), text: text.into() }
    }

    #[test]
    fn questions_are_those_of_the_original_script() {
        let mut expected: Vec<&str> = QUESTIONS.lines().collect();
        let questions = questions(&[file("small", SOURCE)]);
        let kind = |kind| match kind {
            Kind::Documentation => "documentation",
            Kind::Name => "name",
            Kind::Type => "type",
            Kind::Count => "count",
        };
        let mut found: Vec<String> =
            questions.iter().map(|it| format!("{}|{}|{}", kind(it.kind), it.line(), it.answer)).collect();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
        let asked = |kind| questions.iter().find(|it| it.kind == kind).unwrap().text.split_once('\n').unwrap().0;
        assert_eq!(asked(Kind::Documentation), "What does `len` of the crate `small` do?");
        assert_eq!(asked(Kind::Count), "How many parameters does this function take, without self?");
    }

    #[test]
    fn every_fourth_conversation_has_two_questions() {
        let made = make(&[file("small", SOURCE)], &[], 100, 0);
        let lengths: Vec<usize> = made.train.iter().map(|it| it["messages"].as_array().unwrap().len()).collect();
        assert_eq!(lengths[..5], [3, 3, 3, 5, 3]);
        let questions = lengths.iter().map(|length| length / 2).sum::<usize>();
        assert_eq!(questions, QUESTIONS.lines().count());
        assert_eq!(made.train[0]["messages"][0], json!({"role": "system", "content": SYSTEM}));
        assert_eq!(make(&[file("small", SOURCE)], &[], 7, 0).train, made.train[..7]);
        assert_ne!(make(&[file("small", SOURCE)], &[], 7, 1).train, made.train[..7]);
    }

    #[test]
    fn no_line_is_in_both_splits_and_exact_answers_can_be_read() {
        let held_out: String = (0..40)
            .map(|index| format!("/// Returns the number {index}.\npub fn number_{index}(a: u8) -> u8 {{\n"))
            .collect();
        let both = format!("{held_out}{SOURCE}");
        let made = make(&[file("a", SOURCE)], &[file("b", &both)], 100, 0);
        // Four questions about each of the 40 functions; a quarter of them may be for exact answers.
        assert_eq!(made.valid.len(), 120);
        assert!((20..40).contains(&made.exact.len()), "{}", made.exact.len());
        for conversation in made.valid.iter().chain(&made.exact) {
            assert!(conversation["messages"][1]["content"].as_str().unwrap().contains("pub fn number_"));
        }
        let asked = |it: &Value| it["messages"][1]["content"].as_str().unwrap().to_owned();
        assert!(made.exact.iter().all(|it| !asked(it).starts_with("What does")));
        let valid: HashSet<String> = made.valid.iter().map(asked).collect();
        assert!(made.exact.iter().all(|it| !valid.contains(&asked(it))));
    }
}
