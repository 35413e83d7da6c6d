//! Checks that the commands, options, recipe keys and files that pages name exist.
//!
//! The pages of commands and of recipe keys are generated from the code, and tests in `moonlight-train` and `moonlight-convert`
//! keep them current. Other pages are compared with these, so this program need not be built with Burn.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use regex::Regex;

use crate::pages::{self, Page};
use crate::shell;

const PROGRAMS: [&str; 2] = ["moonlight", "moonlight-convert"];
/// Programs that start another program.
const LAUNCHERS: [&str; 5] = ["mpirun", "srun", "sudo", "nohup", "time"];
const RECIPE: &str = "docs/src/reference/recipe.md";
/// Words after a section's name and a dot that are file extensions or parameters, not keys.
const NOT_KEYS: [&str; 12] = [
    "txt",
    "json",
    "jsonl",
    "toml",
    "rs",
    "bpk",
    "safetensors",
    "svg",
    "layers",
    "embed_tokens",
    "norm",
    "language_model",
];
/// Pages that name things which do not exist: earlier names in the changelog, mistakes on the page of errors.
const EXAMPLES: [&str; 2] = ["CHANGELOG.md", "errors.md"];

/// Options by command: `moonlight data inspect` has `--json`, ...
type Known = BTreeMap<String, BTreeSet<String>>;
/// Keys by section.
type Keys = BTreeMap<String, BTreeSet<String>>;

/// Checks every page of the repository.
///
/// # Errors
///
/// An unknown command, option, recipe key or file; all of them are printed first.
pub(crate) fn run(root: &Path) -> Result<()> {
    let (known, keys) = (known(root)?, recipe_keys(root)?);
    let mut problems = Vec::new();
    for page in pages::all(root)? {
        if EXAMPLES.iter().any(|name| page.path.ends_with(name)) {
            continue;
        }
        check(&page, root, &known, &keys, &mut problems);
    }
    if !problems.is_empty() {
        bail!("{} mistakes in pages:\n{}", problems.len(), problems.join("\n"));
    }
    Ok(())
}

fn check(page: &Page, root: &Path, known: &Known, keys: &Keys, problems: &mut Vec<String>) {
    for block in &page.blocks {
        if block.is("sh") || block.is("bash") || block.is("console") {
            for (line, command) in commands(&block.text) {
                if let Err(problem) = check_command(&command, known, keys) {
                    problems.push(format!("{}: {problem}", page.place(block.line + line)));
                }
                problems
                    .extend(missing_files(&command, root).map(|it| format!("{}: {it}", page.place(block.line + line))));
            }
        }
        if block.is("toml") {
            problems.extend(
                check_recipe(&block.text, keys).into_iter().map(|it| format!("{}: {it}", page.place(block.line))),
            );
        }
    }
    for (line, code) in &page.codes {
        for (_, command) in commands(code) {
            let is_command = command.first().is_some_and(|word| PROGRAMS.contains(&word.as_str())) && command.len() > 1;
            if (is_command || code.starts_with("cargo run"))
                && let Err(problem) = check_command(&command, known, keys)
            {
                problems.push(format!("{}: {problem}", page.place(*line)));
            }
            problems.extend(missing_files(&command, root).map(|it| format!("{}: {it}", page.place(*line))));
        }
        if let Err(problem) = check_key(code, keys) {
            problems.push(format!("{}: {problem}", page.place(*line)));
        }
    }
}

/// The commands of a block, each split into words, with its line number from 0.
fn commands(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut commands = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let mut line = line.trim().trim_start_matches("$ ").to_owned();
        while line.ends_with('\\')
            && let Some((_, next)) = lines.next()
        {
            line.truncate(line.len() - 1);
            line.push_str(next.trim());
        }
        let Some(words) = shlex::split(&line) else { continue };
        let simple = words.split(|word| ["&&", "||", "|", ";", ">", "&"].contains(&word.as_str()));
        commands.extend(simple.filter(|words| !words.is_empty()).map(|words| (number, words.to_vec())));
    }
    commands
}

/// The words from the program's name on; `None` if it is not one of this project's programs.
fn program(words: &[String]) -> Option<&[String]> {
    let is_program = |word: &String| PROGRAMS.iter().any(|program| word.rsplit('/').next() == Some(program));
    let words = &words[words.iter().position(|word| !is_assignment(word))?..];
    if words.first().is_some_and(is_program) {
        return Some(words);
    }
    if words.first().is_some_and(|word| LAUNCHERS.contains(&word.as_str())) {
        return words.iter().position(is_program).map(|at| &words[at..]);
    }
    // `cargo run --bin moonlight -- train ...`
    let arguments = words.iter().position(|word| word == "--")?;
    let name = words[..arguments].iter().position(|word| word == "--bin")? + 1;
    (words[0] == "cargo" && is_program(words.get(name)?)).then(|| &words[arguments..])
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
}

fn check_command(words: &[String], known: &Known, keys: &Keys) -> Result<(), String> {
    let Some(words) = program(words) else { return Ok(()) };
    let mut command = match words[0].as_str() {
        // After `cargo run --bin NAME --`; the pages run only `moonlight` this way.
        "--" => "moonlight".to_owned(),
        word => word.rsplit('/').next().unwrap_or_default().to_owned(),
    };
    let mut rest = &words[1..];
    while let Some(next) = rest.first().map(|word| format!("{command} {word}")).filter(|next| known.contains_key(next))
    {
        (command, rest) = (next, &rest[1..]);
    }
    let options = known.get(&command).ok_or_else(|| format!("there is no program `{command}`"))?;
    // A program's options are valid for all its commands.
    let global = command.split(' ').next().and_then(|program| known.get(program));
    if PROGRAMS.contains(&command.as_str())
        && let Some(word) = rest.first()
        && !word.starts_with('-')
        && word != "help"
    {
        // A placeholder such as `COMMAND` is accepted.
        let is_placeholder = word.chars().all(|c| c.is_ascii_uppercase() || "…<>[]|.".contains(c));
        return if is_placeholder { Ok(()) } else { Err(format!("`{command}` has no command `{word}`")) };
    }
    for (at, word) in rest.iter().enumerate() {
        let option = word.split('=').next().unwrap_or_default();
        let is_option = option.starts_with("--") && option.len() > 2;
        let is_known = options.contains(option) || global.is_some_and(|global| global.contains(option));
        if is_option && !is_known && !["--help", "--version"].contains(&option) {
            return Err(format!("`{command}` has no option `{option}`"));
        }
        if word == "--set"
            && let Some(value) = rest.get(at + 1)
        {
            check_key(value, keys)?;
        }
    }
    Ok(())
}

/// Checks `train.steps`, `train.steps=200` or `train.steps = 200`: an error if the section has no such key.
fn check_key(code: &str, keys: &Keys) -> Result<(), String> {
    let Some((section, rest)) = code.split_once('.') else { return Ok(()) };
    let Some(known) = keys.get(section) else { return Ok(()) };
    let key: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_').collect();
    // Otherwise it may be a path or a glob, such as `data.d/*.txt`.
    let follows = rest[key.len()..].chars().next();
    let is_key = follows.is_none_or(|next| " =.".contains(next));
    match key.is_empty() || !is_key || NOT_KEYS.contains(&key.as_str()) || known.contains(&key) {
        true => Ok(()),
        false => Err(format!("`[{section}]` has no key `{key}`")),
    }
}

/// Checks a block of TOML if all its sections are those of recipes.
fn check_recipe(text: &str, keys: &Keys) -> Vec<String> {
    let table: toml::Table = match toml::from_str(text) {
        Ok(table) => table,
        Err(error) => return vec![format!("not TOML: {}", error.message())],
    };
    if !table.keys().all(|section| keys.contains_key(section)) {
        return Vec::new();
    }
    let inside = table.iter().filter_map(|(section, value)| Some((section, value.as_table()?)));
    inside
        .flat_map(|(section, table)| table.keys().map(move |key| format!("{section}.{key}")))
        .filter_map(|key| check_key(&key, keys).err())
        .collect()
}

/// Files of this repository that the words name and that do not exist.
fn missing_files<'a>(words: &'a [String], root: &'a Path) -> impl Iterator<Item = String> + 'a {
    const FOLDERS: [&str; 8] = [
        "scripts",
        "configs",
        "docs",
        "xtask",
        "moonlight-train",
        "moonlight-model",
        "moonlight-optim",
        "moonlight-convert",
    ];
    const ENDINGS: [&str; 6] = [".py", ".sh", ".toml", ".rs", ".md", ".json"];
    let names = words.iter().map(|word| word.trim_end_matches([',', ';', ':']));
    let files = names.filter(|word| {
        FOLDERS.contains(&word.split('/').next().unwrap_or_default())
            && ENDINGS.iter().any(|ending| word.ends_with(ending))
            && !word.contains(['*', '{', '<'])
            && !word.split(['/', '.']).any(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_uppercase()))
    });
    files.filter(|file| !root.join(file).exists()).map(|file| format!("there is no file `{file}`"))
}

/// The commands and options of the pages of commands.
fn known(root: &Path) -> Result<Known> {
    let (heading, option) = (Regex::new(r"^## `([^`]+)`")?, Regex::new(r"--[a-z][a-z0-9-]*")?);
    let mut known = Known::new();
    for program in PROGRAMS {
        let file = format!("docs/src/reference/{program}.md");
        let text = fs::read_to_string(root.join(&file)).with_context(|| format!("`{file}`"))?;
        let mut command = program.to_owned();
        for line in text.lines() {
            if let Some(found) = heading.captures(line) {
                command = found[1].to_owned();
                known.entry(command.clone()).or_default();
            } else if let Some(names) = line.strip_prefix("* `-").and_then(|rest| rest.split(" — ").next()) {
                let names = format!("-{names}");
                let found = option.find_iter(&names).map(|name| name.as_str().to_owned());
                known.entry(command.clone()).or_default().extend(found);
            }
        }
    }
    Ok(known)
}

/// The keys of the page of recipe keys.
fn recipe_keys(root: &Path) -> Result<Keys> {
    let text = fs::read_to_string(root.join(RECIPE)).with_context(|| format!("`{RECIPE}`"))?;
    let code = Regex::new(r"`([a-z0-9_]+)`")?;
    let (mut keys, mut section) = (Keys::new(), String::new());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## `[").and_then(|rest| rest.strip_suffix("]`")) {
            section = name.to_owned();
            keys.entry(section.clone()).or_default();
        } else if let Some(rest) = line.strip_prefix("* ").filter(|_| !section.is_empty()) {
            let into = keys.entry(section.clone()).or_default();
            match rest.starts_with('`') {
                true => into.extend(code.captures(rest).map(|found| found[1].to_owned())),
                // A line that lists keys without descriptions.
                false => into.extend(code.captures_iter(rest).map(|found| found[1].to_owned())),
            }
        }
    }
    Ok(keys)
}

/// Runs the blocks of the manual that are marked with `run`, in the root of the repository, with the programs of a folder.
///
/// # Errors
///
/// A block that ends with a status other than 0.
pub(crate) fn run_blocks(root: &Path, programs: &Path) -> Result<()> {
    let programs = programs.canonicalize().with_context(|| format!("`{}`", programs.display()))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(programs).chain(std::env::split_paths(&path)))?;
    let mut count = 0;
    remove_traces(root)?;
    for page in pages::manual(root)? {
        for block in page.blocks.iter().filter(|block| block.is("sh") && block.is_marked("run")) {
            eprintln!("{}", page.place(block.line));
            let mut shell = Command::new("sh");
            shell.args(["-euc", &block.text]).current_dir(root).env("PATH", &path);
            shell::run(&mut shell)?;
            count += 1;
        }
    }
    eprintln!("{count} blocks ran");
    remove_traces(root)
}

/// Removes the output of earlier blocks, whose runs and files are named `book-...`.
fn remove_traces(root: &Path) -> Result<()> {
    for pattern in ["runs/book-*", "target/book-*"] {
        for path in glob::glob(&root.join(pattern).to_string_lossy())? {
            let path = path?;
            fs::remove_dir_all(&path).with_context(|| format!("`{}`", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        let options = ["--set", "--resume"].map(str::to_owned);
        [("moonlight", vec![]), ("moonlight train", options.to_vec()), ("moonlight data", vec![])]
            .map(|(name, options)| (name.to_owned(), options.into_iter().collect()))
            .into()
    }

    fn keys() -> Keys {
        [("train".to_owned(), BTreeSet::from(["steps".to_owned()])), ("data".to_owned(), BTreeSet::new())].into()
    }

    fn problem(line: &str) -> Option<String> {
        commands(line).into_iter().find_map(|(_, words)| check_command(&words, &known(), &keys()).err())
    }

    #[test]
    fn commands_are_found_wherever_they_begin() {
        for line in [
            "moonlight train a.toml --resume # again",
            "A=1 mpirun -n 2 target/release/moonlight train x --set train.steps=2",
            "cd x && moonlight train x \\\n  --resume | tail",
            "cargo run --release --bin moonlight -- train x",
            "cargo build --bin moonlight --features x",
            "moonlight help train",
            "vllm serve --model x",
        ] {
            assert_eq!(problem(line), None, "{line}");
        }
        assert_eq!(problem("moonlight train x --steps 2").unwrap(), "`moonlight train` has no option `--steps`");
        assert_eq!(problem("srun moonlight fit x").unwrap(), "`moonlight` has no command `fit`");
        assert_eq!(problem("moonlight train x --set train.step=1").unwrap(), "`[train]` has no key `step`");
    }

    #[test]
    fn keys_are_those_of_the_sections() {
        let keys = keys();
        assert_eq!(check_recipe("[train]\nstep = 1\n", &keys), ["`[train]` has no key `step`"]);
        assert_eq!(check_recipe("[dependencies]\nburn = \"1\"\n", &keys), Vec::<String>::new());
        for code in ["train.steps = 2", "data.txt", "train-x.jsonl", "other.key", "data.*"] {
            assert_eq!(check_key(code, &keys), Ok(()), "{code}");
        }
        assert!(check_key("data.path", &keys).is_err());
    }

    #[test]
    fn pages_write_what_the_programs_have() {
        run(crate::root()).unwrap();
    }
}
