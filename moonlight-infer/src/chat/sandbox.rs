//! Limits for chat templates. A template is a program that comes with a model, and others wrote it: it must neither run for
//! ever, nor take all memory, nor end the process.
//!
//! * **Source.** Its length, the tokens of one tag and the branches of conditions are bounded before it is parsed, and it is
//!   parsed on a stack that has room for what is left ([`prepared`]).
//! * **Steps.** The engine's fuel pays for each instruction and for each 64 bytes that a template makes or looks at,
//!   output included, and is checked before an allocation whose size is known ([`Budget`]). So it bounds time, output and
//!   memory alike.
//! * **Values.** Lists that hold others many times over are small in memory and endless as text, and a namespace that
//!   holds itself has no end at all. The source is rewritten so that what a `set` or a literal makes is measured, what goes
//!   into a namespace is copied, and `*` repeats texts only ([`guard`]).
//! * **Time.** Where all this fails to stop a template the clock does: it runs on a thread of its own, which is given up
//!   ([`run`]).

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SendError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::tracked_message::TrackedMessage;
use super::python;
use crate::catch_panic::catch_panic;

/// The longest source, in bytes; published templates have a few thousand, the longest some 40,000.
pub(super) const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Tokens between `{{` and `}}`, or `{%` and `%}`: the parser goes as deep as there are.
const MAX_TAG_TOKENS: usize = 4096;
/// `elif` branches in all: each is one level deeper than the last.
const MAX_ELIFS: usize = 1000;
/// Of the thread that parses and renders: 50 macros deep, each with the longest expression.
const STACK_BYTES: usize = 256 << 20;
/// The engine's own measure: a macro costs four more than those around it.
const RECURSION_LIMIT: usize = 200;

/// Bytes of text in a list or map, its parts counted as often as they are in it.
const MAX_VALUE_BYTES: u64 = 64 << 20;
/// Lists in lists.
const MAX_VALUE_DEPTH: usize = 64;
/// What a slot of a list counts for, in bytes.
const SLOT_BYTES: u64 = 32;

const CHECKED: &str = "moonlight_checked";
const KEPT: &str = "moonlight_kept";
const REPEATED: &str = "moonlight_repeated";
const ITERATED: &str = "moonlight_iterated";
const WRITTEN: &str = "moonlight_written";

/// What a template may use for a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    /// Of the [steps](STEP_LIMITS), by index.
    level: usize,
    time: Duration,
}

/// Steps that are handed out: each twice the last, so that there are few environments.
///
/// The first is for what a template does whatever the conversation: published ones take a few hundred steps for their
/// preamble, and tools of some hundred kB as JSON some ten thousand. At 64 bytes a step it is 32 MB.
pub(super) const STEP_LIMITS: [u64; 6] = [500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000];
/// Published templates take 30 to 200 steps for a message.
const STEPS_PER_MESSAGE: u64 = 1000;
/// A step for so many bytes of the conversation: each may be read, cut and written sixteen times.
const BYTES_PER_STEP: u64 = 4;

impl Budget {
    /// For a conversation of so many messages, with so many bytes of JSON handed over in all, tools and documents included:
    /// in proportion to both, so that long ones pass and no template gets more than they need. Sixteen million steps, a
    /// billion bytes, are the end.
    pub(super) fn of(messages: usize, bytes: usize) -> Self {
        let (count, bytes) = (messages as u64, bytes as u64);
        let steps = STEP_LIMITS[0] + count * STEPS_PER_MESSAGE + bytes / BYTES_PER_STEP;
        let level = STEP_LIMITS.iter().position(|&level| level >= steps).unwrap_or(STEP_LIMITS.len() - 1);
        // Hundreds of times what it takes on a slow machine.
        let time = Duration::from_secs(3) + Duration::from_millis(2 * count) + Duration::from_micros(bytes / 4);
        Self { level, time }
    }

    pub(super) fn level(self) -> usize {
        self.level
    }

    pub(super) fn steps(self) -> u64 {
        STEP_LIMITS[self.level]
    }

    pub(super) fn time(self) -> Duration {
        self.time
    }
}

/// The time that parsing may take.
pub(super) const PARSE_TIME: Duration = Duration::from_secs(3);

/// Why there is no answer from [`run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overrun {
    /// The time is over; the thread still runs.
    Time,
    /// It panicked.
    Panic,
    /// There is no memory for the thread.
    NoThread,
}

impl std::fmt::Display for Overrun {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Time => "it exceeds the limit of time",
            Self::Panic => "the template engine failed at it",
            Self::NoThread => "there is no memory for the stack that it runs on",
        })
    }
}

/// Runs `job` on a thread with a stack of a known size, and waits for it no longer than `time`.
///
/// A job that runs jobs itself, as the renderings of one conversation are, runs them where it is: going to another thread
/// and back takes longer than most of them. The time is then that of each of them, and begins anew with the next.
///
/// Threads are kept for the next job: making one takes longer than most renderings. One that does not answer in time is left
/// to itself, and ends with its job.
pub(super) fn run<T: Send + 'static>(time: Duration, job: impl FnOnce() -> T + Send + 'static) -> Result<T, Overrun> {
    thread_local! {
        /// On a thread of the sandbox: how many jobs were begun or ended within the one that it runs.
        static INSIDE: RefCell<Option<Arc<AtomicU64>>> = const { RefCell::new(None) };
    }
    if let Some(progress) = INSIDE.with_borrow(Clone::clone) {
        progress.fetch_add(1, Ordering::Relaxed);
        let answer = catch_panic(job);
        progress.fetch_add(1, Ordering::Relaxed);
        return answer.ok_or(Overrun::Panic);
    }
    let idle = || IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let (answer, answers) = channel();
    let progress = Arc::new(AtomicU64::new(0));
    let within = progress.clone();
    let mut job: Job = Box::new(move || {
        INSIDE.set(Some(within));
        let result = catch_panic(job);
        INSIDE.set(None);
        // Nobody listens any more when the time is over.
        let _ = answer.send(result);
    });
    let thread = loop {
        let kept = idle().pop();
        let thread = kept.map_or_else(spawn_thread, Ok)?;
        match thread.send(job) {
            Ok(()) => break thread,
            Err(SendError(unsent)) => job = unsent, // it has ended
        }
    };
    // In slices: a process that was stopped for an hour has lost one of them, not its time.
    let slices = 50;
    let (mut slice, mut seen) = (0, 0);
    while slice < slices {
        match answers.recv_timeout(time / slices) {
            Ok(answer) => {
                idle().push(thread);
                return answer.ok_or(Overrun::Panic);
            }
            Err(RecvTimeoutError::Timeout) => slice += 1,
            Err(RecvTimeoutError::Disconnected) => return Err(Overrun::Panic),
        }
        let now = progress.load(Ordering::Relaxed);
        if now != seen {
            (slice, seen) = (0, now);
        }
    }
    Err(Overrun::Time)
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads without a job: at most as many as have asked for one at the same time.
static IDLE: Mutex<Vec<Sender<Job>>> = Mutex::new(Vec::new());

/// A new thread, which runs what it is sent until nobody can send any more.
fn spawn_thread() -> Result<Sender<Job>, Overrun> {
    let (jobs, received) = channel::<Job>();
    let builder = thread::Builder::new().name("chat template".into()).stack_size(STACK_BYTES);
    builder.spawn(move || received.into_iter().for_each(|job| job())).map_err(|_| Overrun::NoThread)?;
    Ok(jobs)
}

/// The source with its values guarded, see [`guard`].
///
/// # Errors
///
/// What limit it exceeds, as part of a sentence; the engine's own error where it has no tokens.
pub(super) fn guard_source(source: &str, syntax: &SyntaxConfig) -> Result<String, String> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(format!("it has {} bytes, more than the limit of {MAX_SOURCE_BYTES}", source.len()));
    }
    let mut insertions: Vec<(usize, &'static str)> = Vec::new();
    let mut tag: Vec<Lexed<'_>> = Vec::new();
    let mut elifs = 0;
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token.map_err(|error| super::template::error_message(&error))?;
        let begins = matches!(token, Token::BlockStart | Token::VariableStart);
        let ends = matches!(token, Token::BlockEnd | Token::VariableEnd);
        if matches!(token, Token::TemplateData(_)) {
            continue;
        }
        if begins {
            tag.clear();
        }
        if matches!(token, Token::Str(_) | Token::String(_))
            && let Some(escape) = unknown_escape(&source[span.start_offset as usize..span.end_offset as usize])
        {
            return Err(format!("`\\{escape}` in a text is not known (line {})", span.start_line));
        }
        tag.push(Lexed { token, start: span.start_offset as usize, end: span.end_offset as usize });
        if tag.len() > MAX_TAG_TOKENS + 2 {
            return Err(format!("a tag exceeds the limit of {MAX_TAG_TOKENS} tokens (line {})", span.start_line));
        }
        if ends {
            elifs += usize::from(matches!(tag.get(1), Some(Lexed { token: Token::Ident("elif"), .. })));
            if elifs > MAX_ELIFS {
                return Err(format!("it exceeds the limit of {MAX_ELIFS} `elif` branches (line {})", span.start_line));
            }
            guard_tag(&tag, &mut insertions);
        }
    }
    insertions.sort_by_key(|&(place, _)| place);
    let mut guard_source = String::with_capacity(source.len() + 24 * insertions.len());
    let mut end = 0;
    for (place, text) in insertions {
        // The engine's own places are between characters.
        guard_source.push_str(source.get(end..place).unwrap_or_default());
        guard_source.push_str(text);
        end = place;
    }
    guard_source.push_str(&source[end..]);
    Ok(guard_source)
}

/// An escape in a text that Python reads and the engine does not, or reads otherwise.
fn unknown_escape(text: &str) -> Option<char> {
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character == '\\' {
            let escape = characters.next()?;
            if matches!(escape, 'a' | 'v' | 'N' | 'U' | '/' | '1'..='7') {
                return Some(escape);
            }
        }
    }
    None
}

struct Lexed<'a> {
    token: Token<'a>,
    start: usize,
    end: usize,
}

/// Where the guards go in a tag.
fn guard_tag(tag: &[Lexed<'_>], insertions: &mut Vec<(usize, &'static str)>) {
    let mut open: Vec<(usize, bool)> = Vec::new();
    let is_set = matches!(tag[0].token, Token::BlockStart)
        && matches!(tag.get(1), Some(Lexed { token: Token::Ident("set"), .. }));
    let is_loop = matches!(tag[0].token, Token::BlockStart)
        && matches!(tag.get(1), Some(Lexed { token: Token::Ident("for"), .. }));
    let (mut dotted, mut assigned, mut filtered) = (false, false, false);
    // Whether what a loop goes over has begun, and whether it has ended.
    let (mut looped, mut ended) = (false, false);
    for (index, lexed) in tag.iter().enumerate() {
        match &lexed.token {
            Token::BracketOpen | Token::BraceOpen | Token::ParenOpen => {
                let literal = !matches!(lexed.token, Token::ParenOpen) && begins_a_value(&tag[index - 1].token);
                open.push((index, literal));
            }
            Token::BracketClose | Token::BraceClose | Token::ParenClose => {
                // A list of names: of constants alone it is as large as it is written.
                if let Some((from, true)) = open.pop()
                    && tag[from..index].iter().any(|lexed| matches!(lexed.token, Token::Ident(_)))
                {
                    insertions.push((tag[from].start, "("));
                    insertions.push((lexed.end, "|moonlight_checked)"));
                }
            }
            Token::Mul if !matches!(tag[index - 1].token, Token::ParenOpen | Token::Comma) => {
                insertions.push((lexed.start, "|moonlight_repeated "));
                if let Some(last) = end_of_operand(tag, index + 1) {
                    insertions.push((tag[last].end, "|moonlight_repeated "));
                }
            }
            Token::Tilde => {
                if is_whole_operand(tag, index) {
                    insertions.push((lexed.start, "|moonlight_written "));
                }
                if let Some(last) = end_of_operand(tag, index + 1)
                    && !matches!(tag.get(index + 1), Some(Lexed { token: Token::Minus | Token::Plus, .. }))
                    && !matches!(
                        tag.get(last + 1),
                        Some(Lexed {
                            token: Token::Tilde | Token::Pow | Token::Mul | Token::Div | Token::FloorDiv | Token::Mod,
                            ..
                        })
                    )
                {
                    insertions.push((tag[last].end, "|moonlight_written "));
                }
            }
            Token::Ident("in") if is_loop && !looped && open.is_empty() => {
                looped = true;
                insertions.push((lexed.end, " ("));
            }
            Token::Ident("if" | "recursive") if looped && !ended && open.is_empty() => {
                ended = true;
                insertions.push((lexed.start, ")|moonlight_iterated "));
            }
            Token::BlockEnd if looped && !ended => insertions.push((lexed.start, ")|moonlight_iterated ")),
            Token::Dot if is_set && !assigned && !filtered => dotted = true,
            Token::Assign if is_set && !assigned && !filtered && open.is_empty() => {
                assigned = true;
                insertions.push((lexed.end, " ("));
            }
            Token::Pipe if is_set && !assigned && open.is_empty() => filtered = true,
            Token::BlockEnd if is_set => insertions.extend(match (assigned, filtered, dotted) {
                (true, _, true) => Some((lexed.start, ")|moonlight_kept ")),
                (true, _, false) => Some((lexed.start, ")|moonlight_checked ")),
                (false, true, true) => Some((lexed.start, "|moonlight_kept ")),
                (false, true, false) => Some((lexed.start, "|moonlight_checked ")),
                // The text of a block.
                (false, false, _) => None,
            }),
            _ => {}
        }
    }
}

/// Whether a bracket behind this token begins a list, and does not take something out of one.
fn begins_a_value(before: &Token<'_>) -> bool {
    const WORDS: [&str; 8] = ["in", "and", "or", "not", "if", "else", "elif", "is"];
    match before {
        Token::Ident(word) => WORDS.contains(word),
        Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Int128(_) | Token::Float(_) => false,
        Token::BracketClose | Token::BraceClose | Token::ParenClose => false,
        _ => true,
    }
}

/// Whether what stands before the operator at `index` is a name, a constant or a bracket with what is called on it, and
/// nothing that binds closer than the operator.
fn is_whole_operand(tag: &[Lexed<'_>], index: usize) -> bool {
    let mut at = index;
    let mut depth = 0_usize;
    while at > 1 {
        let inner = &tag[at - 1].token;
        match inner {
            Token::BracketClose | Token::BraceClose | Token::ParenClose => depth += 1,
            Token::BracketOpen | Token::BraceOpen | Token::ParenOpen => match depth.checked_sub(1) {
                Some(less) => depth = less,
                None => return true,
            },
            _ if depth > 0 => {}
            Token::Ident("in" | "and" | "or" | "if" | "else" | "elif" | "set") => return true,
            Token::Ident("is" | "not") => return false,
            Token::Ident(_) | Token::Str(_) | Token::String(_) | Token::Dot => {}
            Token::Int(_) | Token::Int128(_) | Token::Float(_) | Token::Pipe => {}
            Token::Mul | Token::Div | Token::FloorDiv | Token::Mod | Token::Pow | Token::Minus | Token::Plus => {
                return false;
            }
            _ => return true,
        }
        at -= 1;
    }
    true
}

/// The last token of the operand that begins at `index`.
fn end_of_operand(tag: &[Lexed<'_>], mut index: usize) -> Option<usize> {
    while matches!(tag.get(index)?.token, Token::Minus | Token::Plus) {
        index += 1;
    }
    let mut last = closed(tag, index)?;
    loop {
        let next = match &tag.get(last + 1)?.token {
            Token::Dot | Token::Pipe => last + 2,
            Token::BracketOpen | Token::ParenOpen => closed(tag, last + 1)?,
            _ => return Some(last),
        };
        tag.get(next)?;
        last = next;
    }
}

/// The token that closes the bracket at `index`; itself where it is none.
fn closed(tag: &[Lexed<'_>], index: usize) -> Option<usize> {
    let mut depth = 0;
    for (index, lexed) in tag.iter().enumerate().skip(index) {
        match lexed.token {
            Token::BracketOpen | Token::BraceOpen | Token::ParenOpen => depth += 1,
            Token::BracketClose | Token::BraceClose | Token::ParenClose => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index);
        }
    }
    None
}

/// Takes out of an environment what has no measure, and puts in the filters that [`prepared`] writes.
pub(super) fn guard(environment: &mut Environment<'static>) {
    // The values of an error are not wanted, and may be endless.
    environment.set_debug(false);
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.remove_global("debug");
    // Not of Jinja, and both give what they are given many times over without a measure.
    environment.remove_filter("chain");
    environment.remove_filter("zip");
    python::install(environment);
    environment.add_filter(CHECKED, |state: &State, value: Value| -> Result<Value, Error> {
        check_size(state, &value)?;
        Ok(value)
    });
    environment.add_filter(KEPT, |state: &State, value: Value| -> Result<Value, Error> {
        check_size(state, &value)?;
        deep_copy(&value, 0)
    });
    environment.add_filter(REPEATED, |value: Value| match is_container(&value) {
        true => Err(refused_value("`*` repeats a list, and there is no limit to that")),
        false => Ok(value),
    });
    environment.add_filter(ITERATED, |state: &State, value: Value| python::check_iterable(state, value));
    environment.add_filter(WRITTEN, |state: &State, value: Value| -> Result<Value, Error> {
        match value.as_str() {
            Some(_) => Ok(value),
            None => python::str_of(state, &value).map(Value::from),
        }
    });
    environment.set_unknown_method_callback(call_method);
}

pub(super) fn refused_value(problem: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

fn is_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

/// Pays for the size of a value with its parts, and refuses one that is too large or too deep.
fn check_size(state: &State, value: &Value) -> Result<(), Error> {
    if !is_container(value) {
        return Ok(());
    }
    let mut size = 0;
    measure(state, value, &mut size, 0)
}

fn measure(state: &State, value: &Value, size: &mut u64, depth: usize) -> Result<(), Error> {
    let own = SLOT_BYTES + value.as_str().map_or(0, |text| text.len() as u64);
    *size += own;
    if *size > MAX_VALUE_BYTES {
        return Err(refused_value(format!("a list exceeds the limit of {MAX_VALUE_BYTES} bytes")));
    }
    if !is_container(value) {
        return Ok(());
    }
    if depth >= MAX_VALUE_DEPTH {
        return Err(refused_value(format!("lists exceed the limit of {MAX_VALUE_DEPTH} in each other")));
    }
    if let Some(fields) = value.downcast_object_ref::<TrackedMessage>() {
        // What is measured is not read.
        for (_, item) in fields.entries() {
            state.consume_fuel(1)?;
            measure(state, item, size, depth + 1)?;
        }
        return Ok(());
    }
    let is_map = value.kind() == ValueKind::Map;
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        match is_map {
            true => measure(state, &value.get_item(&item)?, size, depth + 1)?,
            false => measure(state, &item, size, depth + 1)?,
        }
    }
    Ok(())
}

/// A value of its own, with no namespace in it and nothing that is made when it is asked for.
fn deep_copy(value: &Value, depth: usize) -> Result<Value, Error> {
    if depth > MAX_VALUE_DEPTH {
        return Err(refused_value(format!("lists exceed the limit of {MAX_VALUE_DEPTH} in each other")));
    }
    if value.downcast_object_ref::<TrackedMessage>().is_some() {
        return Ok(value.clone());
    }
    Ok(match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| deep_copy(&item, depth + 1)).collect::<Result<Vec<_>, _>>()?;
            match value.downcast_object_ref::<Tuple>() {
                Some(_) => Value::from(Tuple::from(items)),
                None => Value::from(items),
            }
        }
        ValueKind::Map => {
            let pairs = value.try_iter()?.map(|key| {
                let item = deep_copy(&value.get_item(&key)?, depth + 1)?;
                Ok((key, item))
            });
            Value::from_pairs(pairs.collect::<Result<Vec<(Value, Value)>, Error>>()?)
        }
        _ => value.clone(),
    })
}

/// Python's methods; those that can make much of little after they are paid for.
fn call_method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let Some(result) = python::method(state, value, name, arguments)? {
        return Ok(result);
    }
    match (value.as_str(), name) {
        (Some(text), "format") => {
            let digits = text.as_bytes().chunk_by(|a, b| a.is_ascii_digit() && b.is_ascii_digit());
            if text.contains(":{") || digits.into_iter().any(|run| run.len() > 4 && run[0].is_ascii_digit()) {
                return Err(refused_value("a width in `format` exceeds the limit of four digits"));
            }
            let (positional, named): (&[Value], Kwargs) = from_args(arguments)?;
            let named: Vec<Value> = named.args().map(|name| named.get(name)).collect::<Result<_, _>>()?;
            if positional.iter().chain(&named).any(is_container) {
                return Err(refused_value("`format` takes texts and numbers"));
            }
        }
        (None, "count") if is_container(value) => {
            for _ in value.try_iter()? {
                state.consume_fuel(1)?;
            }
        }
        _ => {}
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_ends_what_nothing_else_does() {
        let asleep = || thread::sleep(Duration::from_secs(20));
        assert_eq!(run(Duration::from_millis(200), asleep), Err(Overrun::Time));
        assert_eq!(
            run(PARSE_TIME, || if true {
                panic!("no")
            }),
            Err(Overrun::Panic)
        );
        assert_eq!(run(PARSE_TIME, || 3), Ok(3));
    }

    #[test]
    fn a_budget_grows_with_the_conversation() {
        assert_eq!(Budget::of(0, 0).steps(), 500_000);
        assert_eq!(Budget::of(3_000, 12_000).steps(), 4_000_000);
        assert_eq!(Budget::of(10, 10_000_000).steps(), 4_000_000);
        assert_eq!(Budget::of(100_000, 400_000).steps(), 16_000_000);
    }
}
