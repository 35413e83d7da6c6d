//! Multiple-choice questions from a text: which lines come next? The layout is HellaSwag's.
//!
//! The wrong endings are lines of other packages that begin alike (the same indentation, and all with code or all with a comment)
//! and have a similar length, so that neither gives the answer away; names and meaning do.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::files::SourceFile;

/// The bytes of a context, whole lines.
const CONTEXT: RangeInclusive<usize> = 150..=300;
/// The bytes of an ending, whole lines without the last line break.
const ENDING: RangeInclusive<usize> = 40..=120;
const PER_FILE: usize = 2;
/// The most bytes by which the length of a wrong ending differs from the true one's.
const LENGTH_DIFFERENCE: usize = 15;
const WRONG: usize = 3;

/// A place in a file where a question can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place<'a> {
    file: &'a SourceFile,
    /// The byte at which the context starts.
    start: usize,
    context: &'a str,
    ending: &'a str,
}

impl<'a> Place<'a> {
    fn opening(&self) -> &'a str {
        opening(self.ending)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let end = |place: &Self| place.start + place.context.len() + place.ending.len();
        self.start < end(other) && other.start < end(self)
    }
}

/// Up to `most` questions, rows of `ctx`, `endings`, `label` and the `path` of the file.
pub(super) fn questions(files: &[SourceFile], most: usize, seed: u64) -> Vec<Value> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let of_files: Vec<Vec<Place<'_>>> = files.iter().map(places).collect();
    let mut endings: BTreeMap<&str, Vec<Place<'_>>> = BTreeMap::new();
    for place in of_files.iter().flatten() {
        endings.entry(place.opening()).or_default().push(*place);
    }
    let mut rows = Vec::new();
    for mut places in of_files {
        places.shuffle(&mut random);
        let mut asked: Vec<Place<'_>> = Vec::new();
        for place in places {
            if asked.len() == PER_FILE {
                break;
            }
            let pool = endings.get(place.opening()).map(Vec::as_slice).unwrap_or_default();
            if asked.iter().all(|other| !place.overlaps(other))
                && let Some(mut endings) = wrong_endings(&place, pool, &mut random)
            {
                let label = random.random_range(0..=WRONG);
                endings.insert(label, place.ending);
                rows.push(json!({"ctx": place.context, "endings": endings, "label": label, "path": place.file.path}));
                asked.push(place);
            }
        }
    }
    // All files are asked first, so that fewer questions are a sample of all.
    rows.shuffle(&mut random);
    rows.truncate(most);
    rows
}

/// Endings of other packages, each of another one; `None` if there are too few.
fn wrong_endings<'a>(place: &Place<'a>, pool: &[Place<'a>], random: &mut ChaCha8Rng) -> Option<Vec<&'a str>> {
    let mut fitting: Vec<&Place<'a>> = pool
        .iter()
        .filter(|other| {
            other.file.package != place.file.package
                && other.ending.len().abs_diff(place.ending.len()) <= LENGTH_DIFFERENCE
                && other.ending != place.ending
        })
        .collect();
    let mut wrong: Vec<&Place<'a>> = Vec::new();
    while wrong.len() < WRONG {
        if fitting.is_empty() {
            return None;
        }
        let next = fitting.swap_remove(random.random_range(0..fitting.len()));
        if wrong.iter().all(|other| other.ending != next.ending && other.file.package != next.file.package) {
            wrong.push(next);
        }
    }
    Some(wrong.into_iter().map(|place| place.ending).collect())
}

/// All places of a file, in their order.
fn places(file: &SourceFile) -> Vec<Place<'_>> {
    let text = file.text.as_str();
    // The starts of lines.
    let starts: Vec<usize> = std::iter::once(0)
        .chain(text.match_indices('\n').map(|(at, _)| at + 1))
        .filter(|at| *at < text.len())
        .collect();
    let mut places = Vec::new();
    for (line, &at) in starts.iter().enumerate() {
        // The longest context and the shortest ending that are allowed.
        let Some(&start) = starts[..line].iter().find(|start| at - *start <= *CONTEXT.end()) else { continue };
        let ends = starts[line + 1..].iter().copied().chain([text.len()]);
        let mut endings = ends.map(|end| text[at..end].trim_end_matches(['\n', '\r']));
        let Some(ending) = endings.find(|ending| ending.len() >= *ENDING.start()) else { continue };
        let context = &text[start..at];
        if CONTEXT.contains(&context.len()) && ENDING.contains(&ending.len()) && is_clear(context, ending) {
            places.push(Place { file, start, context, ending });
        }
    }
    places
}

/// Whether a model can be asked for the ending.
fn is_clear(context: &str, ending: &str) -> bool {
    // Evaluations of HellaSwag remove brackets and what is in them from context and endings.
    let has_brackets = |text: &str| text.contains(['[', ']']);
    let first = ending.lines().next().unwrap_or_default();
    first.contains(char::is_alphanumeric) && !has_brackets(context) && !has_brackets(ending)
}

/// The indentation of a text, and the character after it unless it is a letter or a digit: a comment is no alternative to code.
fn opening(text: &str) -> &str {
    let start = text.len() - text.trim_start_matches([' ', '\t']).len();
    let sign = text[start..].chars().next().filter(|character| !character.is_alphanumeric());
    &text[..start + sign.map_or(0, char::len_utf8)]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Files of functions whose lines name the package.
    fn files() -> Vec<SourceFile> {
        let file = |package: usize, number: usize| {
            let function = |index: usize| {
                format!(
                    "fn function_{index}_of_{number}() {{\n    let first_of_{package} = {index} + {number};\n    \
                     call_with_{package}(first_of_{package}, \"{number}\");\n}}\n\n"
                )
            };
            SourceFile {
                package: format!("package-{package}"),
                path: format!("package-{package}/src/{number}.rs"),
                text: (0..20).map(function).collect(),
            }
        };
        (0..6).flat_map(|package| (0..5).map(move |number| file(package, number))).collect()
    }

    fn text(value: &Value) -> &str {
        value.as_str().unwrap()
    }

    #[test]
    fn the_true_ending_continues_the_context_in_the_file() {
        let files = files();
        let rows = questions(&files, 40, 3);
        assert_eq!(rows.len(), 40);
        for row in &rows {
            let file = files.iter().find(|file| file.path == text(&row["path"])).unwrap();
            let ending = text(&row["endings"][row["label"].as_u64().unwrap() as usize]);
            let (context, start) = (text(&row["ctx"]), file.text.find(text(&row["ctx"])).unwrap());
            assert!(start == 0 || file.text[..start].ends_with('\n'));
            assert!(context.ends_with('\n') && CONTEXT.contains(&context.len()) && ENDING.contains(&ending.len()));
            let rest = &file.text[start + context.len()..];
            assert!(rest.strip_prefix(ending).unwrap().starts_with('\n'), "{ending:?} in {rest:?}");
        }
    }

    #[test]
    fn wrong_endings_are_from_other_packages_and_look_alike() {
        let files = files();
        for row in questions(&files, 40, 3) {
            let endings: Vec<&str> = row["endings"].as_array().unwrap().iter().map(text).collect();
            let label = row["label"].as_u64().unwrap() as usize;
            let package = text(&row["path"]).split('/').next().unwrap();
            assert_eq!(endings.len(), 4);
            for (index, ending) in endings.iter().enumerate() {
                let found: Vec<&str> =
                    files.iter().filter(|file| file.text.contains(ending)).map(|file| file.package.as_str()).collect();
                assert_eq!(found.contains(&package), index == label, "{ending:?}");
                assert_eq!(opening(ending), opening(endings[label]));
                assert!(ending.len().abs_diff(endings[label].len()) <= LENGTH_DIFFERENCE);
            }
        }
    }

    #[test]
    fn an_opening_is_an_indentation_and_a_sign() {
        let openings = ["    let a", "\t// a", "}", "", "  ", " ü", "«a"].map(opening);
        assert_eq!(openings, ["    ", "\t/", "}", "", "  ", " ", "«"]);
    }

    #[test]
    fn every_label_occurs_and_no_file_has_more_than_two_questions() {
        let rows = questions(&files(), usize::MAX, 0);
        let (mut labels, mut of_file) = (HashMap::new(), HashMap::new());
        for row in &rows {
            *labels.entry(row["label"].as_u64().unwrap()).or_insert(0) += 1;
            *of_file.entry(text(&row["path"])).or_insert(0) += 1;
        }
        assert_eq!(labels.len(), 4);
        assert!(of_file.values().all(|count| *count <= PER_FILE));
        assert_eq!(rows, questions(&files(), usize::MAX, 0));
        assert_ne!(rows, questions(&files(), usize::MAX, 1));
    }

    #[test]
    fn lines_with_brackets_are_not_asked_for() {
        let mut files = files();
        files.iter_mut().for_each(|file| file.text = file.text.replace("let first", "let [first]"));
        assert_eq!(questions(&files, 10, 0), Vec::<Value>::new());
        assert_eq!(questions(&[], 10, 0), Vec::<Value>::new());
    }
}
