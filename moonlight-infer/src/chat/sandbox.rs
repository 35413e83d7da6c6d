//! Limits for chat templates. A template is an untrusted program that comes with a model. It must not run forever, take all
//! memory, or end the process.
//!
//! * **Source.** Its length, the tokens of one tag and the `elif` branches are limited before it is parsed, and the parser
//!   runs on a stack that is large enough for what is within the limits ([`guard_source`]).
//! * **Steps.** Each instruction consumes the engine's fuel, and so do every 64 bytes that a template makes or reads, output
//!   included. Before an allocation of a known size the fuel is consumed in advance. Fuel therefore limits time, output and
//!   memory ([`Budget`]).
//! * **Values.** A list that contains another one many times is small in memory and huge as text, and a namespace that
//!   contains itself is infinite. The source is rewritten so that the value of a `set` or a literal is measured, a value
//!   that is assigned to a namespace is copied, and `*` repeats only strings ([`install_guards`]).
//! * **Time.** A time limit stops whatever the other limits miss. Templates run on a separate thread, which is abandoned
//!   when the time is up ([`run`]).

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

use super::python;
use super::tracked_message::TrackedMessage;
use crate::catch_panic::catch_panic;

/// The limit of a source in bytes; published templates have a few thousand, the longest about 40,000.
pub(super) const MAX_SOURCE_BYTES: usize = 1 << 20;
/// The limit of tokens between `{{` and `}}`, or `{%` and `%}`; the parser may recurse once for each.
const MAX_TAG_TOKENS: usize = 4096;
/// The limit of `elif` branches in a source; the parser nests each in the one before.
const MAX_ELIFS: usize = 1000;
/// The stack of a thread that parses and renders: enough for 50 nested macros, each with the longest expression.
const STACK_BYTES: usize = 256 << 20;
/// The engine's recursion limit, in which a nested macro counts four.
const RECURSION_LIMIT: usize = 200;

/// The limit of a list or map in bytes; an item counts as often as it occurs.
const MAX_VALUE_BYTES: u64 = 64 << 20;
/// The limit of nesting of lists and maps.
const MAX_VALUE_DEPTH: usize = 64;
/// The bytes that each item counts for in addition to its text.
const SLOT_BYTES: u64 = 32;

const CHECKED: &str = "moonlight_checked";
const KEPT: &str = "moonlight_kept";
const REPEATED: &str = "moonlight_repeated";
const ITERATED: &str = "moonlight_iterated";
const WRITTEN: &str = "moonlight_written";

/// The steps and the time that a template has for a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    /// Index into [`STEP_LIMITS`].
    level: usize,
    time: Duration,
}

/// The limits that a budget chooses from; few, because each needs a separate environment.
///
/// The first limit covers what does not depend on the messages: published templates take a few hundred steps for their
/// preamble, and about ten thousand to write 100 kB of tools as JSON. At 64 bytes a step it allows 32 MB.
pub(super) const STEP_LIMITS: [u64; 6] = [500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000];
/// Steps for each message; published templates take 30 to 200.
const STEPS_PER_MESSAGE: u64 = 1000;
/// Bytes of the conversation for each further step: at 64 bytes a step, each byte may be read or written sixteen times.
const BYTES_PER_STEP: u64 = 4;

impl Budget {
    /// The budget of a conversation with `bytes` of JSON, including tools and documents. It is proportional to the length, so
    /// that long conversations pass and a hostile template gets no more than they need; 16 M steps (1 GB of text) at most.
    pub(super) fn for_conversation(messages: usize, bytes: usize) -> Self {
        let (count, bytes) = (messages as u64, bytes as u64);
        let steps = STEP_LIMITS[0] + count * STEPS_PER_MESSAGE + bytes / BYTES_PER_STEP;
        let level = STEP_LIMITS.iter().position(|&level| level >= steps).unwrap_or(STEP_LIMITS.len() - 1);
        // Hundreds of times as long as a published template takes on a slow machine.
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

/// The time limit of parsing.
pub(super) const PARSE_TIME: Duration = Duration::from_secs(3);

/// Why [`run`] has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overrun {
    /// The time limit was exceeded; the thread may still be running.
    Time,
    /// The job panicked.
    Panic,
    /// No thread could be started.
    NoThread,
}

impl std::fmt::Display for Overrun {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Time => "it exceeds the time limit",
            Self::Panic => "the template engine panicked",
            Self::NoThread => "there is no memory for the stack of its thread",
        })
    }
}

/// Runs `job` on a thread with [`STACK_BYTES`] of stack, and waits for its result for `time` at most.
///
/// A nested call runs its job on the same thread, because switching to another one and back takes longer than most renderings.
/// The time limit then restarts at the start and the end of each nested job.
///
/// Threads are kept for later jobs, because starting one takes longer than most renderings. A thread that exceeds the time
/// limit is abandoned, and ends when its job does.
pub(super) fn run<T: Send + 'static>(time: Duration, job: impl FnOnce() -> T + Send + 'static) -> Result<T, Overrun> {
    thread_local! {
        /// The count of starts and ends of nested jobs; `None` outside the threads of the sandbox.
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
        // The receiver is dropped after a timeout.
        let _ = answer.send(result);
    });
    let thread = loop {
        let kept = idle().pop();
        let thread = kept.map_or_else(spawn_thread, Ok)?;
        match thread.send(job) {
            Ok(()) => break thread,
            Err(SendError(unsent)) => job = unsent, // the thread has ended
        }
    };
    // Wait in slices: a process that is suspended for an hour then loses one slice, not the whole time.
    let slices = 50;
    let (mut slice, mut seen) = (0, 0);
    while slice < slices {
        match answers.recv_timeout(time / slices) {
            Ok(answer) => {
                // Only a thread that has answered is kept: any other may still be running.
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

/// Threads without a job; as many as there were jobs at the same time.
static IDLE: Mutex<Vec<Sender<Job>>> = Mutex::new(Vec::new());

/// Starts a thread that runs the jobs it is sent, until the sender is dropped.
fn spawn_thread() -> Result<Sender<Job>, Overrun> {
    let (jobs, received) = channel::<Job>();
    let builder = thread::Builder::new().name("chat template".into()).stack_size(STACK_BYTES);
    builder.spawn(move || received.into_iter().for_each(|job| job())).map_err(|_| Overrun::NoThread)?;
    Ok(jobs)
}

/// Checks the limits of a source and inserts the filters of [`install_guards`].
///
/// # Errors
///
/// The limit that is exceeded, or the lexer's error, as part of a sentence.
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
            return Err(format!("the escape `\\{escape}` is not supported (line {})", span.start_line));
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
    let mut guarded = String::with_capacity(source.len() + 24 * insertions.len());
    let mut end = 0;
    for (place, text) in insertions {
        // The lexer's offsets are character boundaries.
        guarded.push_str(source.get(end..place).unwrap_or_default());
        guarded.push_str(text);
        end = place;
    }
    guarded.push_str(&source[end..]);
    Ok(guarded)
}

/// The first escape in a string literal that Python and the engine read differently.
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

/// Adds the filters that guard one tag to `insertions`, by byte offset:
///
/// * `|moonlight_checked` after list and map literals and the values of `set`,
/// * `|moonlight_kept` after what is assigned to an attribute of a namespace,
/// * `|moonlight_repeated` on both operands of `*`,
/// * `|moonlight_written` on the operands of `~`, which Python converts to strings,
/// * `|moonlight_iterated` after what a `for` iterates over.
fn guard_tag(tag: &[Lexed<'_>], insertions: &mut Vec<(usize, &'static str)>) {
    let mut open: Vec<(usize, bool)> = Vec::new();
    let is_set = matches!(tag[0].token, Token::BlockStart)
        && matches!(tag.get(1), Some(Lexed { token: Token::Ident("set"), .. }));
    let is_loop = matches!(tag[0].token, Token::BlockStart)
        && matches!(tag.get(1), Some(Lexed { token: Token::Ident("for"), .. }));
    let (mut dotted, mut assigned, mut filtered) = (false, false, false);
    // Whether the iterated expression of a loop has started, and whether it has ended.
    let (mut looped, mut ended) = (false, false);
    for (index, lexed) in tag.iter().enumerate() {
        match &lexed.token {
            Token::BracketOpen | Token::BraceOpen | Token::ParenOpen => {
                let literal = !matches!(lexed.token, Token::ParenOpen) && begins_a_value(&tag[index - 1].token);
                open.push((index, literal));
            }
            Token::BracketClose | Token::BraceClose | Token::ParenClose => {
                // Only literals that contain a name: one of constants is no larger than its source.
                if let Some((from, true)) = open.pop()
                    && tag[from..index].iter().any(|lexed| matches!(lexed.token, Token::Ident(_)))
                {
                    insertions.push((tag[from].start, "("));
                    insertions.push((lexed.end, "|moonlight_checked)"));
                }
            }
            // After `(` or `,` the token is the `*` of `*args` in a call.
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
            // `set ns.x = ...` assigns to a namespace.
            Token::Dot if is_set && !assigned && !filtered => dotted = true,
            Token::Assign if is_set && !assigned && !filtered && open.is_empty() => {
                assigned = true;
                insertions.push((lexed.end, " ("));
            }
            // `set x | filter` starts a block.
            Token::Pipe if is_set && !assigned && open.is_empty() => filtered = true,
            Token::BlockEnd if is_set => insertions.extend(match (assigned, filtered, dotted) {
                (true, _, true) => Some((lexed.start, ")|moonlight_kept ")),
                (true, _, false) => Some((lexed.start, ")|moonlight_checked ")),
                (false, true, true) => Some((lexed.start, "|moonlight_kept ")),
                (false, true, false) => Some((lexed.start, "|moonlight_checked ")),
                // A `set` block makes a string.
                (false, false, _) => None,
            }),
            _ => {}
        }
    }
}

/// Whether a bracket after the token starts a literal, rather than an index or a call.
fn begins_a_value(before: &Token<'_>) -> bool {
    const WORDS: [&str; 8] = ["in", "and", "or", "not", "if", "else", "elif", "is"];
    match before {
        Token::Ident(word) => WORDS.contains(word),
        Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Int128(_) | Token::Float(_) => false,
        Token::BracketClose | Token::BraceClose | Token::ParenClose => false,
        _ => true,
    }
}

/// Whether a filter after the left operand of the operator at `index` applies to the whole operand: if it is a name, a
/// constant or a bracket with calls and filters on it. In an operand with other operators the filter would apply to the
/// last part only.
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

/// The last token of the operand that starts at `index`.
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

/// The token that closes the bracket at `index`; `index` itself if it is not a bracket.
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

/// Removes from an environment whatever cannot be limited, and adds the filters that [`guard_source`] inserts.
pub(super) fn install_guards(environment: &mut Environment<'static>) {
    // In debug mode an error contains the values of variables, which may be huge.
    environment.set_debug(false);
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.remove_global("debug");
    // Jinja has neither, and both repeat their arguments without consuming fuel.
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
        true => Err(invalid_operation("`*` repeats a list, which is not supported")),
        false => Ok(value),
    });
    environment.add_filter(ITERATED, |state: &State, value: Value| python::check_iterable(state, value));
    environment.add_filter(WRITTEN, |state: &State, value: Value| -> Result<Value, Error> {
        match value.as_str() {
            Some(_) => Ok(value),
            None => python::python_str(state, &value).map(Value::from),
        }
    });
    environment.set_unknown_method_callback(call_method);
}

pub(super) fn invalid_operation(problem: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

fn is_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

/// Consumes fuel for a value with all its items, and refuses one that is too large or nested too deeply.
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
        return Err(invalid_operation(format!("a list exceeds the limit of {MAX_VALUE_BYTES} bytes")));
    }
    if !is_container(value) {
        return Ok(());
    }
    if depth >= MAX_VALUE_DEPTH {
        return Err(invalid_operation(format!("nested lists exceed the limit of {MAX_VALUE_DEPTH} levels")));
    }
    if let Some(fields) = value.downcast_object_ref::<TrackedMessage>() {
        // From `entries`, so that measuring a message does not count as reading its fields.
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

/// A deep copy without namespaces and lazy iterators, so that a namespace cannot contain itself.
fn deep_copy(value: &Value, depth: usize) -> Result<Value, Error> {
    if depth > MAX_VALUE_DEPTH {
        return Err(invalid_operation(format!("nested lists exceed the limit of {MAX_VALUE_DEPTH} levels")));
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

/// Calls a method that values have in Python. `format` and `count` of the `pycompat` module consume no fuel, so they are
/// limited here.
fn call_method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let Some(result) = python::method(state, value, name, arguments)? {
        return Ok(result);
    }
    match (value.as_str(), name) {
        (Some(text), "format") => {
            let digits = text.as_bytes().chunk_by(|a, b| a.is_ascii_digit() && b.is_ascii_digit());
            if text.contains(":{") || digits.into_iter().any(|run| run.len() > 4 && run[0].is_ascii_digit()) {
                return Err(invalid_operation("a width in `format` exceeds the limit of four digits"));
            }
            let (positional, named): (&[Value], Kwargs) = from_args(arguments)?;
            let named: Vec<Value> = named.args().map(|name| named.get(name)).collect::<Result<_, _>>()?;
            if positional.iter().chain(&named).any(is_container) {
                return Err(invalid_operation("`format` takes strings and numbers only"));
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
    fn the_time_limit_stops_what_no_other_limit_does() {
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
        assert_eq!(Budget::for_conversation(0, 0).steps(), 500_000);
        assert_eq!(Budget::for_conversation(3_000, 12_000).steps(), 4_000_000);
        assert_eq!(Budget::for_conversation(10, 10_000_000).steps(), 4_000_000);
        assert_eq!(Budget::for_conversation(100_000, 400_000).steps(), 16_000_000);
    }
}
