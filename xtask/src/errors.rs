//! Writes the manual's page of errors from the snapshots of the messages.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::evidence::write;
use crate::shell;

const PAGE: &str = "docs/src/reference/errors.md";

const HEAD: &str = "\
<!-- Made from the snapshots of the messages by `cargo xtask book`: change the messages, not this page. -->

# Errors

You will be able to look up an error message, and know what to do about it.

A program that fails prints one line, `error: ...`, and often a second, `hint: ...`, on stderr, and ends with the code of [Exit codes](exit-codes.md). Names, numbers and paths below are examples: search for the words around them. Open an issue for a message that is
missing here, or a hint that did not help.
";

/// A message and its hint.
type Entry = (String, Option<String>);

/// Writes the page, or with `check` compares it.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let page = page(&entries(root)?)?;
    write(root, PAGE, &page, check, "cargo xtask book")
}

/// Messages by crate and source file.
fn entries(root: &Path) -> Result<BTreeMap<(String, String), Vec<Entry>>> {
    let mut git = shell::command(root, "git ls-files --cached --others --exclude-standard *.snap");
    let listed = shell::output(&mut git)?;
    let mut entries: BTreeMap<_, Vec<Entry>> = BTreeMap::new();
    for file in listed.lines() {
        let name = Path::new(file).file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
        if !file.contains("/snapshots/") || !["error", "message", "hint"].iter().any(|word| name.contains(word)) {
            continue;
        }
        let Ok(text) = fs::read_to_string(root.join(file)) else { continue };
        let (source, messages) = parse(&text).with_context(|| format!("`{file}`"))?;
        let (krate, rest) = file.split_once('/').unwrap_or((file, ""));
        let topic = if source.is_empty() { rest } else { source.split_once('/').map_or(source, |(_, rest)| rest) };
        let known = entries.entry((krate.to_owned(), topic.to_owned())).or_default();
        for message in messages {
            if !known.contains(&message) {
                known.push(message);
            }
        }
    }
    Ok(entries)
}

/// The source file that a snapshot names, and its messages: lines `error: ...`, each optionally followed by a line `hint: ...`.
fn parse(snapshot: &str) -> Result<(&str, Vec<Entry>)> {
    let rest = snapshot.strip_prefix("---\n").context("it has no head")?;
    let (head, body) = rest.split_once("\n---\n").context("its head does not end")?;
    let source = head.lines().find_map(|line| line.strip_prefix("source:")).unwrap_or_default();
    let mut entries: Vec<Entry> = Vec::new();
    for line in body.lines() {
        if let Some((_, message)) = line.split_once("error: ").filter(|(before, _)| !before.contains('`')) {
            entries.push((message.trim().to_owned(), None));
        } else if let Some(hint) = line.trim().strip_prefix("hint: ")
            && let Some((_, last)) = entries.last_mut()
        {
            *last = Some(hint.trim().to_owned());
        }
    }
    Ok((source.trim().trim_matches('"'), entries))
}

fn page(entries: &BTreeMap<(String, String), Vec<Entry>>) -> Result<String> {
    let mut page = String::from(HEAD);
    let mut last = "";
    for ((krate, topic), messages) in entries {
        if messages.is_empty() {
            continue;
        }
        if krate != last {
            writeln!(page, "\n## `{krate}`")?;
            last = krate;
        }
        writeln!(page, "\n### `{krate}/{topic}`\n")?;
        for (message, hint) in messages {
            writeln!(page, "* {}", markdown(message))?;
            if let Some(hint) = hint {
                writeln!(page, "  * **hint:** {}", markdown(hint))?;
            }
        }
    }
    if entries.is_empty() {
        page.push_str("\nNo snapshots were found.\n");
    }
    Ok(page)
}

/// A message as Markdown: text in backticks remains code, and markup characters outside of it are escaped.
fn markdown(text: &str) -> String {
    let mut made = String::new();
    let mut parts = text.split('`').enumerate().peekable();
    while let Some((at, part)) = parts.next() {
        let is_code = at % 2 == 1 && parts.peek().is_some();
        for character in part.chars() {
            if !is_code && "<>*[]|\\".contains(character) {
                made.push('\\');
            }
            made.push(character);
        }
        if parts.peek().is_some() {
            made.push('`');
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_from_snapshots() {
        let snapshot = "---\nsource: moonlight-x/src/error.rs\nexpression: all\n---\nMissing:\n  error: no file `a<b`\n  hint: make it\n\nerror: other\n";
        let (source, entries) = parse(snapshot).unwrap();
        assert_eq!(source, "moonlight-x/src/error.rs");
        assert_eq!(entries, [("no file `a<b`".into(), Some("make it".into())), ("other".into(), None)]);
        assert_eq!(markdown("no `a<b` in <x>, `half"), "no `a<b` in \\<x\\>, `half");
    }

    #[test]
    fn the_page_of_errors_is_current() {
        run(crate::root(), true).unwrap();
    }
}
