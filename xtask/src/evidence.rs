//! Writes the manual's page of claims from `docs/evidence.toml`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

const DATA: &str = "docs/evidence.toml";
const PAGE: &str = "docs/src/evidence/claims.md";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Evidence {
    machines: BTreeMap<String, String>,
    claim: Vec<Claim>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Claim {
    topic: String,
    claim: String,
    budget: String,
    measured: String,
    command: String,
    date: String,
    machine: String,
    commit: String,
    #[serde(default)]
    not_shown: String,
}

/// Writes the page, or with `check` compares it.
///
/// # Errors
///
/// A data file that cannot be read or is incomplete; with `check` a page that is out of date.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let text = fs::read_to_string(root.join(DATA)).with_context(|| format!("`{DATA}`"))?;
    let evidence: Evidence = toml::from_str(&text).with_context(|| format!("`{DATA}`"))?;
    let page = evidence.page()?;
    write(root, PAGE, &page, check, "cargo xtask evidence")
}

/// Writes a generated page, or with `check` compares it with what `command` would write.
pub(crate) fn write(root: &Path, file: &str, made: &str, check: bool, command: &str) -> Result<()> {
    let path = root.join(file);
    let kept = fs::read_to_string(&path).unwrap_or_default();
    if kept == made {
        return Ok(());
    }
    if check {
        bail!("`{file}` is out of date: run `{command}`");
    }
    fs::write(&path, made).with_context(|| format!("`{file}`"))?;
    eprintln!("wrote `{file}`");
    Ok(())
}

const HEAD: &str = "\
<!-- Made from docs/evidence.toml by `cargo xtask evidence`: change that file, not this page. -->

# Claims

You will be able to check every claim of this project: what was compared, the limit, the measured value, the command that repeats the measurement, and what it does not show.

\"Six families\" are small models: Moonlight-like, DeepSeek-V3-like (groups, query compression, YaRN), V2-Lite-like (softmax, greedy), V2-like (group-limited), Llama and Qwen2. They are made with transformers and torch, and deliberately awkward: odd sizes, more experts than tokens,
experts without a token, a sequence of one token. A limit of \"none\" means that the value is reported and not asserted. The commit is the one that recorded the measurement.
";

impl Evidence {
    fn page(&self) -> Result<String> {
        let mut page = String::from(HEAD);
        page.push_str("\n| machine | |\n|---|---|\n");
        for (name, machine) in &self.machines {
            writeln!(page, "| {name} | {machine} |")?;
        }
        let mut topics: Vec<&str> = Vec::new();
        for claim in &self.claim {
            if !topics.contains(&claim.topic.as_str()) {
                topics.push(&claim.topic);
            }
        }
        for topic in topics {
            writeln!(page, "\n## {topic}\n")?;
            page.push_str("| claim | limit | measured | command | when, where |\n|---|---|---|---|---|\n");
            for claim in self.claim.iter().filter(|claim| claim.topic == topic) {
                claim.check(&self.machines)?;
                let Claim { claim: what, budget, measured, command, date, machine, commit, .. } = claim;
                let command = command_cell(command);
                writeln!(
                    page,
                    "| {} | {} | {} | {command} | {date}, {machine}, {commit} |",
                    cell(what),
                    cell(budget),
                    cell(measured)
                )?;
            }
        }
        page.push_str(
            "\n## Not shown\n\nWhat should not be concluded from a claim:\n\n| claim | not shown |\n|---|---|\n",
        );
        for claim in self.claim.iter().filter(|claim| !claim.not_shown.is_empty()) {
            writeln!(page, "| {} | {} |", cell(&claim.claim), cell(&claim.not_shown))?;
        }
        page.push_str(
            "\nNo claim covers Moonlight's published weights; Metal and any physical GPU; NCCL; MPI between real machines; vLLM, SGLang and \
             llama.cpp (the layout is transformers'); training longer than minutes; any run of a Moonlight-16B recipe.\n",
        );
        Ok(page)
    }
}

impl Claim {
    fn check(&self, machines: &BTreeMap<String, String>) -> Result<()> {
        let Self { claim, date, machine, commit, command, measured, .. } = self;
        ensure!(machines.contains_key(machine), "claim `{claim}`: there is no machine `{machine}`");
        let is_date = date.len() == 10 && date.split('-').map(str::len).eq([4, 2, 2]);
        ensure!(
            is_date && date.chars().all(|c| c == '-' || c.is_ascii_digit()),
            "claim `{claim}`: `{date}` is not a date"
        );
        ensure!(
            commit.len() >= 7 && commit.chars().all(|c| c.is_ascii_hexdigit()),
            "claim `{claim}`: `{commit}` is not a commit"
        );
        ensure!(!command.is_empty() && !measured.is_empty(), "claim `{claim}` is incomplete");
        Ok(())
    }
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// Commands are separated by `; `. A part that is not a command remains text.
fn command_cell(commands: &str) -> String {
    let is_command = |command: &str| {
        let program = command.split_whitespace().next().unwrap_or_default();
        ["cargo", "python", "python3", "sudo"].contains(&program) || program.starts_with("scripts/")
    };
    let cells = commands.split("; ").map(|command| match is_command(command) {
        true => format!("`{}`", cell(command)),
        false => cell(command),
    });
    cells.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_code_and_the_rest_is_text() {
        assert_eq!(command_cell("cargo a | b; see [x](y.md)"), "`cargo a \\| b`; see [x](y.md)");
    }

    #[test]
    fn the_page_of_claims_is_current() {
        run(crate::root(), true).unwrap();
    }
}
