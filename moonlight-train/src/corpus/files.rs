//! The files of a corpus: which are taken, and why others are left out.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::CorpusOptions;
use super::packages::{Package, is_hidden, is_valid, order};
use crate::error::TrainError;

/// A file with a longer line is taken for generated, bytes.
const LONGEST_LINE: usize = 2000;

/// A split has at least this many packages, if there are as many.
const MIN_PACKAGES: u64 = 20;

/// Folders of Rust packages that are not their source.
const NOT_SOURCE: [&str; 4] = ["tests", "benches", "examples", "target"];

/// A file of a corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceFile {
    pub(super) package: String,
    /// `serde/src/lib.rs`: the name of the package, and the path in it.
    pub(super) path: String,
    pub(super) text: String,
}

/// The size of a split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitCounts {
    /// The packages with at least one file.
    pub packages: u64,
    /// The files.
    pub files: u64,
    /// The bytes of their texts.
    pub bytes: u64,
}

/// What was not taken, by the first reason that applies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Packages that were not read because their split was full.
    pub packages_after_the_limit: u64,
    /// Packages that were read and had no file to take.
    pub packages_without_files: u64,
    /// Folders with tests, benchmarks, examples or build outputs of Rust packages.
    pub folders: u64,
    /// Files above the limit of a file.
    pub too_large: u64,
    /// Files that are not UTF-8.
    pub not_utf8: u64,
    /// Files without text.
    pub empty: u64,
    /// Files that look generated: `@generated` in the first five lines, or a line of more than 2000 bytes.
    pub generated: u64,
    /// Files with the content of a file that was taken.
    pub repeated: u64,
    /// Files that did not fit into what a package or a split may have.
    pub over_limit: u64,
}

impl LeftOut {
    /// The counts that are not zero, each with the words after the number.
    pub fn reasons(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let reasons = [
            ("packages after their split was full", self.packages_after_the_limit),
            ("packages without files to take", self.packages_without_files),
            ("folders of tests, benchmarks, examples and build outputs", self.folders),
            ("files above the limit of a file", self.too_large),
            ("files that are not UTF-8", self.not_utf8),
            ("files without text", self.empty),
            ("files that look generated", self.generated),
            ("files that repeat another", self.repeated),
            ("files that did not fit into the limit of a package or split", self.over_limit),
        ];
        reasons.into_iter().filter(|(_, count)| *count > 0)
    }
}

/// The files of both splits.
pub(super) struct Collected {
    pub(super) train: Vec<SourceFile>,
    pub(super) valid: Vec<SourceFile>,
    pub(super) train_counts: SplitCounts,
    pub(super) valid_counts: SplitCounts,
    pub(super) left_out: LeftOut,
    /// The packages that there were.
    pub(super) packages: usize,
}

/// Reads packages, in an order that the seed determines, until both splits are full.
pub(super) fn collect(packages: &[Package], options: &CorpusOptions) -> Result<Collected, TrainError> {
    let mut ordered: Vec<&Package> = packages.iter().collect();
    ordered.sort_by_key(|package| (order(&package.name, options.seed), &package.name));
    let (valid, train): (Vec<&Package>, Vec<&Package>) =
        ordered.into_iter().partition(|package| is_valid(&package.name, options.valid_fraction, options.seed));
    let mut collector = Collector { options, seen: HashSet::new(), left_out: LeftOut::default() };
    let (train, train_counts) = collector.split(&train, options.max_bytes)?;
    let valid_bytes = (options.max_bytes as f64 * options.valid_fraction) as u64;
    let (valid, valid_counts) = collector.split(&valid, valid_bytes)?;
    Ok(Collected { train, valid, train_counts, valid_counts, left_out: collector.left_out, packages: packages.len() })
}

struct Collector<'a> {
    options: &'a CorpusOptions,
    /// The hashes of all texts that were taken, of both splits: a copy of a training file would be a test of memory.
    seen: HashSet<u128>,
    left_out: LeftOut,
}

impl Collector<'_> {
    fn split(&mut self, packages: &[&Package], max_bytes: u64) -> Result<(Vec<SourceFile>, SplitCounts), TrainError> {
        let (mut files, mut counts) = (Vec::new(), SplitCounts::default());
        let max_of_package = self.options.max_folder_bytes.min(max_bytes.div_ceil(MIN_PACKAGES));
        let mut is_full = false;
        for package in packages {
            if is_full {
                self.left_out.packages_after_the_limit += 1;
                continue;
            }
            let mut taken = 0;
            let mut paths = Vec::new();
            self.walk(&package.folder, &mut paths)?;
            let before = files.len();
            for path in paths {
                let Some(text) = self.read(&path)? else { continue };
                let bytes = text.len() as u64;
                if taken + bytes > max_of_package || counts.bytes + bytes > max_bytes {
                    is_full |= counts.bytes + bytes > max_bytes;
                    self.left_out.over_limit += 1;
                    continue;
                }
                if !self.seen.insert(xxh3_128(text.as_bytes())) {
                    self.left_out.repeated += 1;
                    continue;
                }
                taken += bytes;
                counts.bytes += bytes;
                files.push(SourceFile { package: package.name.clone(), path: name_of(package, &path), text });
            }
            match files.len() > before {
                true => counts.packages += 1,
                false => self.left_out.packages_without_files += 1,
            }
        }
        counts.files = files.len() as u64;
        Ok((files, counts))
    }

    /// Adds the files under a folder with one of the extensions, sorted. Links are not followed.
    fn walk(&mut self, folder: &Path, paths: &mut Vec<PathBuf>) -> Result<(), TrainError> {
        let entries = fs::read_dir(folder).and_then(|entries| {
            entries
                .map(|entry| entry.and_then(|entry| Ok((entry.path(), entry.file_type()?))))
                .collect::<Result<Vec<_>, _>>()
        });
        let mut entries = entries.map_err(TrainError::read(folder))?;
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        for (path, kind) in entries.into_iter().filter(|(path, _)| !is_hidden(path)) {
            let extension = path.extension().map(|extension| extension.to_string_lossy());
            if kind.is_dir() {
                let is_rust = self.options.extensions.iter().any(|extension| extension == "rs");
                if is_rust && path.file_name().is_some_and(|name| NOT_SOURCE.iter().any(|not| name == *not)) {
                    self.left_out.folders += 1;
                } else {
                    self.walk(&path, paths)?;
                }
            } else if kind.is_file() && extension.is_some_and(|it| self.options.extensions.iter().any(|one| *one == it))
            {
                paths.push(path);
            }
        }
        Ok(())
    }

    /// The text of a file, unless a property of the file itself leaves it out.
    fn read(&mut self, path: &Path) -> Result<Option<String>, TrainError> {
        let bytes = fs::metadata(path).map_err(TrainError::read(path))?.len();
        if bytes > self.options.max_file_bytes {
            self.left_out.too_large += 1;
            return Ok(None);
        }
        let Ok(text) = String::from_utf8(fs::read(path).map_err(TrainError::read(path))?) else {
            self.left_out.not_utf8 += 1;
            return Ok(None);
        };
        let reason = if text.trim().is_empty() {
            &mut self.left_out.empty
        } else if looks_generated(&text) {
            &mut self.left_out.generated
        } else {
            return Ok(Some(text));
        };
        *reason += 1;
        Ok(None)
    }
}

fn looks_generated(text: &str) -> bool {
    text.lines().take(5).any(|line| line.contains("@generated")) || text.lines().any(|line| line.len() > LONGEST_LINE)
}

/// The path of a file in its package, with `/` on every system.
fn name_of(package: &Package, path: &Path) -> String {
    let inside = path.strip_prefix(&package.folder).unwrap_or(path);
    let parts = inside.components().map(|part| part.as_os_str().to_string_lossy());
    std::iter::once(package.name.as_str().into()).chain(parts).collect::<Vec<_>>().join("/")
}
