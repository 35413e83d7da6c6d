//! The licenses of everything that is compiled into the programs, in one file, which wheels and archives contain: most of the
//! licenses ask for that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::shell::{cargo, output};

/// Also named in `pyproject.toml` and `.gitignore`.
const FILE: &str = "THIRD-PARTY-LICENSES.txt";
/// What the names of such files begin with, in capitals.
const NAMES: [&str; 6] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];

/// Writes the file for a build of `moonlight-train` with these features on this machine.
///
/// # Errors
///
/// A dependency that names no license and contains none, or whose sources are not in cargo's cache.
pub(crate) fn run(root: &Path, features: &str) -> Result<()> {
    // `cargo metadata` would list, and download, what is only named in the lock file.
    let line =
        "tree --locked --package moonlight-train --edges normal,no-proc-macro --prefix none --format {p}|{l}|{r}";
    let tree = output(cargo(root, line).args(["--features", features]))?;
    let (mut texts, mut without) = (BTreeMap::<String, BTreeSet<String>>::new(), BTreeSet::new());
    let packages: BTreeSet<_> = tree.lines().map(|line| line.trim_end_matches(" (*)")).collect();
    let mut count = 0;
    for package in packages {
        let mut parts = package.split('|');
        let (Some(package), Some(license), Some(address)) = (parts.next(), parts.next(), parts.next()) else {
            bail!("`cargo tree` prints `{package}`");
        };
        // `name v1.2.3`, and a folder in parentheses for the crates of the workspace.
        let words: Vec<_> = package.split(' ').collect();
        let &[name, version] = words.as_slice() else { continue };
        let title = format!("{name} {} ({license})", version.trim_start_matches('v'));
        let files = license_files(&sources(name, version.trim_start_matches('v'))?)?;
        if files.is_empty() {
            if license.is_empty() {
                bail!("`{title}` names no license and contains none");
            }
            without.insert(format!("{title}, {address}"));
        }
        for file in files {
            texts.entry(file).or_default().insert(title.clone());
        }
        count += 1;
    }
    let mut page = format!("The programs contain {count} packages of other authors, under these licenses.\n");
    let rule = "=".repeat(80);
    for (text, titles) in &texts {
        let titles: Vec<_> = titles.iter().map(String::as_str).collect();
        page += &format!("\n{rule}\n\n{}\n\n{text}\n", titles.join("\n"));
    }
    let names: Vec<_> = without.iter().map(String::as_str).collect();
    page +=
        &format!("\n{rule}\n\nThese packages name their license, and contain no file of it:\n\n{}\n", names.join("\n"));
    fs::write(root.join(FILE), page).with_context(|| format!("`{FILE}`"))?;
    println!("{FILE}: {count} packages, {} texts, {} packages without a text", texts.len(), names.len());
    Ok(())
}

/// The folder into which cargo unpacked a package.
fn sources(name: &str, version: &str) -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))).context("there is no home folder")?;
    let registries = home.join("registry/src");
    for registry in fs::read_dir(&registries).with_context(|| format!("`{}`", registries.display()))? {
        let folder = registry?.path().join(format!("{name}-{version}"));
        if folder.is_dir() {
            return Ok(folder);
        }
    }
    bail!("`{name}` {version} is not in `{}`: build the programs first", registries.display())
}

/// The texts of the files, all with the same ends of lines, so that equal licenses are printed once.
fn license_files(folder: &Path) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("`{}`", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        if path.is_file() && NAMES.iter().any(|start| name.starts_with(start)) {
            let bytes = fs::read(&path).with_context(|| format!("`{}`", path.display()))?;
            let lines: Vec<_> =
                String::from_utf8_lossy(&bytes).lines().map(|line| line.trim_end().to_owned()).collect();
            texts.push(lines.join("\n").trim().to_owned());
        }
    }
    Ok(texts)
}
