//! Finds words that STYLE.md excludes, by the patterns of `xtask/words.toml`, in every text file that git tracks.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use glob::{MatchOptions, Pattern};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;

use crate::shell;

/// The contents of `words.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    /// Globs of files that are not read: data, and files from earlier versions.
    except: Vec<String>,
    /// A regular expression of lines that are not read.
    except_lines: String,
    word: Vec<Word>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Word {
    /// A regular expression that ignores case.
    pattern: String,
    /// What to write instead, or the reason.
    instead: String,
    /// A text that the pattern matches, for the test.
    #[cfg_attr(not(test), expect(dead_code, reason = "read by the test alone"))]
    finds: String,
    /// A text that the pattern does not match, for the test.
    #[serde(default)]
    #[cfg_attr(not(test), expect(dead_code, reason = "read by the test alone"))]
    passes: String,
    /// Globs of files in which the word is correct.
    #[serde(default)]
    except: Vec<String>,
}

struct Rule {
    regex: Regex,
    instead: String,
    except: Vec<Pattern>,
}

/// Prints each excluded word as `file:line: word: what to write instead`.
///
/// # Errors
///
/// A word was found, or a file cannot be read.
pub(crate) fn run(root: &Path, paths: &[String]) -> Result<()> {
    let rules = read_rules(root)?;
    let except = patterns(&rules.except)?;
    let except_lines = Regex::new(&rules.except_lines)?;
    let rules = rules.word.iter().map(compile).collect::<Result<Vec<_>>>()?;
    let mut list = shell::command(root, "git ls-files -z --");
    let files = shell::output(list.args(paths))?;
    let mut count = 0;
    for name in files.split('\0').filter(|name| !name.is_empty() && !is_in(&except, name)) {
        // Symbolic links to folders, deleted files and binary files are skipped.
        let Ok(text) = fs::read_to_string(root.join(name)) else { continue };
        count += check_file(name, &text, &rules, &except_lines);
    }
    match count {
        0 => Ok(()),
        1 => bail!("1 word that STYLE.md does not use"),
        _ => bail!("{count} words that STYLE.md does not use"),
    }
}

fn check_file(name: &str, text: &str, rules: &[Rule], except_lines: &Regex) -> usize {
    let rules: Vec<_> = rules.iter().filter(|rule| !is_in(&rule.except, name)).collect();
    let mut count = 0;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !except_lines.is_match(line)) {
        for rule in &rules {
            for found in rule.regex.find_iter(line) {
                println!("{name}:{}: `{}`: {}", number + 1, found.as_str(), rule.instead);
                count += 1;
            }
        }
    }
    count
}

fn read_rules(root: &Path) -> Result<Rules> {
    let path = root.join("xtask/words.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("`{}` cannot be read", path.display()))?;
    toml::from_str(&text).context("xtask/words.toml")
}

fn compile(word: &Word) -> Result<Rule> {
    let regex = RegexBuilder::new(&word.pattern).case_insensitive(true).build()?;
    Ok(Rule { regex, instead: word.instead.clone(), except: patterns(&word.except)? })
}

fn patterns(globs: &[String]) -> Result<Vec<Pattern>> {
    globs.iter().map(|glob| Pattern::new(glob).with_context(|| format!("`{glob}` is not a glob"))).collect()
}

fn is_in(patterns: &[Pattern], name: &str) -> bool {
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
    patterns.iter().any(|pattern| pattern.matches_with(name, options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pattern_finds_its_example_and_passes_its_counterexample() {
        let rules = read_rules(crate::root()).unwrap();
        for word in &rules.word {
            let rule = compile(word).unwrap();
            assert!(rule.regex.is_match(&word.finds), "`{}` does not find `{}`", word.pattern, word.finds);
            assert!(!rule.regex.is_match(&word.passes), "`{}` finds `{}`", word.pattern, word.passes);
            assert!(!rule.regex.is_match(""), "`{}` finds the empty text", word.pattern);
        }
    }

    #[test]
    fn a_word_is_counted_once_a_place_and_not_in_excepted_files() {
        let word = Word {
            pattern: r"\bforetold\b".into(),
            instead: "predicted".into(),
            finds: String::new(),
            passes: String::new(),
            except: vec!["docs/**/*.md".into()],
        };
        let rules = [compile(&word).unwrap()];
        let check = |name, text| check_file(name, text, &rules, &Regex::new("alias").unwrap());
        assert_eq!(check("a.rs", "it was Foretold\nand foretold, foretold"), 3);
        assert_eq!(check("docs/a/b.md", "foretold"), 0);
        assert_eq!(check("a.rs", "#[serde(alias = \"foretold\")]"), 0);
    }
}
