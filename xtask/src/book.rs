//! Writes the generated pages of the manual, checks all pages, and builds it with `mdbook`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use regex::Regex;

use crate::pages::{self, MANUAL};
use crate::{commands, errors, evidence, links, shell};

/// The crate that compiles the manual's Rust code.
const DOCTESTS: &str = "docs/doctests/src/lib.rs";

/// Writes the pages of claims and of errors, or with `check` compares them; checks the form, links, commands and keys of all
/// pages; and builds the manual if `mdbook` is installed.
///
/// The pages of recipe keys and of commands are written by tests of the crates that define them: see `UPDATE_...` on the
/// manual's page of environment variables.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    evidence::run(root, check)?;
    errors::run(root, check)?;
    check_form(root)?;
    links::run(root, check)?;
    commands::run(root)?;
    if !shell::is_installed("mdbook") {
        eprintln!("SKIPPED: building the manual: `mdbook` is not installed (cargo install mdbook --locked)");
        return Ok(());
    }
    shell::run(&mut shell::command(root, "mdbook build docs"))
}

/// Every page is in the table of contents, and opens with what the reader will be able to do. The glossary has each term of
/// STYLE.md.
fn check_form(root: &Path) -> Result<()> {
    let mut problems = Vec::new();
    let pages = pages::manual(root)?;
    let contents = pages.iter().find(|page| page.path.ends_with("SUMMARY.md")).context("there is no SUMMARY.md")?;
    let doctests = fs::read_to_string(root.join(DOCTESTS)).with_context(|| format!("`{DOCTESTS}`"))?;
    let listed: BTreeSet<_> = contents.links.iter().map(|(_, link)| Path::new(MANUAL).join(link)).collect();
    for page in &pages {
        if page.path == contents.path {
            continue;
        }
        if !listed.contains(&page.path) {
            problems.push(format!("`{}` is not in SUMMARY.md", page.path.display()));
        }
        // A page's Rust code is compiled only if the doctests include the page.
        if page.blocks.iter().any(|block| block.is("rust"))
            && !doctests.contains(&format!("../../{}", page.path.strip_prefix("docs")?.display()))
        {
            problems.push(format!("`{}` has Rust code and no line in {DOCTESTS}", page.path.display()));
        }
        let opening = page.opening.1.to_lowercase();
        if !opening.contains("you will") {
            problems.push(format!("`{}` does not open with what the reader will be able to do", page.path.display()));
        }
    }
    let terms = |text: &str, heading: &str| -> Result<BTreeSet<String>> {
        let row = Regex::new(r"(?m)^\| ([^|]+?) \|")?;
        let part = text.split_once(heading).map_or(text, |(_, rest)| rest);
        let part = part.split("\n## ").next().unwrap_or_default();
        Ok(row.captures_iter(part).map(|found| found[1].to_owned()).filter(|term| term != "term").collect())
    };
    let style = fs::read_to_string(root.join("STYLE.md")).context("`STYLE.md`")?;
    let glossary = fs::read_to_string(root.join(MANUAL).join("reference/glossary.md")).context("the glossary")?;
    for missing in terms(&style, "## One word, one meaning")?.difference(&terms(&glossary, "# Glossary")?) {
        problems.push(format!("the glossary of the manual lacks `{missing}`"));
    }
    if !problems.is_empty() {
        bail!("{}", problems.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_their_form() {
        check_form(crate::root()).unwrap();
    }
}
