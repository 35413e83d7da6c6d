//! Detects the kind of a file from its first bytes, then from its name.

use std::path::Path;

use moonlight_convert::printable;

use super::RecordError;
use super::json_nesting::JsonNesting;

/// How a file stores its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A record in each line.
    JsonLines,
    /// The elements of one array.
    JsonArray,
    /// A sequence of objects that each span several lines.
    JsonObjects,
    /// A header and a row for each record, with fields separated by this byte.
    Delimited(u8),
    /// Apache parquet.
    Parquet,
}

impl FileKind {
    /// Whether reading can continue after a record that is not JSON. In an array, the end of such a record is not known.
    pub fn has_record_boundaries(self) -> bool {
        !matches!(self, Self::JsonArray | Self::JsonObjects)
    }
}

impl std::fmt::Display for FileKind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::JsonLines => "JSON Lines",
            Self::JsonArray => "JSON array",
            Self::JsonObjects => "JSON objects over several lines",
            Self::Delimited(b'\t') => "TSV",
            Self::Delimited(b';') => "CSV with semicolons",
            Self::Delimited(b',') => "CSV",
            Self::Delimited(_) => "CSV with another separator",
            Self::Parquet => "parquet",
        })
    }
}

/// A file that is not text.
#[derive(Debug, Clone, Copy)]
pub(super) struct NonText {
    /// The end of the sentence "it is ...".
    pub(super) what: &'static str,
    pub(super) hint: &'static str,
}

const UNPACK: &str = "unpack it, and name the files in it";
const NO_TEXT: &str = "exclude it with a narrower glob";
const ARROW: &str = "save it as parquet or JSON Lines (datasets: `load_from_disk(..).to_parquet(\"data.parquet\")`)";
const EXPORT: &str = "export its rows as JSON Lines, CSV or parquet";
const UTF_8: &str = "convert it to UTF-8 (`iconv -f UTF-16 -t UTF-8`)";

/// The offset, the magic bytes, what the file is, and a hint. Each magic contains a byte that text does not have, or is too
/// long to occur in text by chance.
const MAGIC: &[(usize, &[u8], &str, &str)] = &[
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "a git-lfs pointer in place of the data",
        "fetch the data with `git lfs pull` in its repository, or with `hf download`",
    ),
    (0, b"PK\x03\x04", "a zip archive (like xlsx, npz and torch files)", UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", NO_TEXT),
    (4, b"1AY&SY", "compressed with bzip2", "decompress it, or compress it with gzip or zstd"),
    (0, b"\xfd7zXZ\0", "compressed with xz", "decompress it, or compress it with gzip or zstd"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it, or compress it with gzip or zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (257, b"ustar\0", "a tar archive", UNPACK),
    (257, b"ustar  \0", "a tar archive", UNPACK),
    (0, b"ARROW1\0\0", "an Arrow (Feather) file", ARROW),
    (0, b"FEA1\0\0\0\0", "a Feather file", ARROW),
    (0, b"\xff\xff\xff\xff", "an Arrow stream, as datasets' `save_to_disk` writes", ARROW),
    (0, b"Obj\x01", "an Avro file", EXPORT),
    (0, b"SQLite format 3\0", "an SQLite database", EXPORT),
    (0, b"\x89HDF\r\n", "an HDF5 file", EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", EXPORT),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document", EXPORT),
    (0, b"GGUF\x03\0\0\0", "a GGUF model", NO_TEXT),
    (0, b"%PDF-", "a PDF document", NO_TEXT),
    (0, b"\x89PNG\r\n", "a PNG image", NO_TEXT),
    (0, b"\xff\xd8\xff", "a JPEG image", NO_TEXT),
    (0, b"GIF87a", "a GIF image", NO_TEXT),
    (0, b"GIF89a", "a GIF image", NO_TEXT),
    (0, b"\x7fELF", "a program", NO_TEXT),
];

/// The kind of a file that is neither text nor parquet; `None` if it may be one of these.
pub(super) fn detect_binary(head: &[u8]) -> Option<NonText> {
    let known = MAGIC.iter().find(|(at, magic, ..)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    if let Some(&(_, _, what, hint)) = known {
        return Some(NonText { what, hint });
    }
    // Pickles of protocol 2 and later start with this byte, which no UTF-8 text does.
    if matches!(head, [0x80, 2..=5, ..]) {
        return Some(NonText { what: "a Python pickle", hint: EXPORT });
    }
    let wide = match head {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some("UTF-32 text"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some("UTF-16 text"),
        _ => {
            // Without a byte order mark, UTF-16 that starts with ASCII has a 0 in every other byte.
            let pairs = || head[..head.len().min(16)].chunks_exact(2);
            let every = |zero: usize| {
                pairs().len() >= 4 && pairs().all(|pair| pair[zero] == 0 && matches!(pair[1 - zero], b'\t'..=b'~'))
            };
            (every(0) || every(1)).then_some("UTF-16 text")
        }
    };
    wide.map(|what| NonText { what, hint: UTF_8 })
}

/// The extension of a file's name in lower case, without the extension of its compression: `jsonl` for `A.JSONL.gz`.
pub fn extension(path: &Path) -> String {
    let lower = |path: &Path| path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    match lower(path) {
        Some(compression) if matches!(compression.as_str(), "gz" | "zst" | "zstd") => {
            path.file_stem().and_then(|stem| lower(Path::new(stem))).unwrap_or_default()
        }
        extension => extension.unwrap_or_default(),
    }
}

/// Detects the kind of a file from the first bytes of its contents, after decompression.
pub(super) fn detect_kind(path: &Path, head: &[u8]) -> Result<FileKind, RecordError> {
    let extension = extension(path);
    // A damaged file that is named `.parquet` is left to the parquet reader, which reports it.
    if head.starts_with(b"PAR1") || extension == "parquet" && detect_binary(head).is_none() {
        return Ok(FileKind::Parquet);
    }
    if let Some(NonText { what, hint }) = detect_binary(head) {
        return Err(RecordError::file(path, format!("it is {what}"), hint));
    }
    let text = head.trim_ascii_start();
    match text.first() {
        Some(b'[') if has_lists_in_lines(text) => {
            let hint = "write each record as an object: {\"messages\": [...]} for a list of messages";
            Err(RecordError::file(path, "each of its lines is a list, not an object", hint))
        }
        Some(b'[') => Ok(FileKind::JsonArray),
        Some(b'{') if is_over_lines(text) => Ok(FileKind::JsonObjects),
        Some(b'{') => Ok(FileKind::JsonLines),
        None => Ok(FileKind::JsonLines),
        Some(b'<') if is_markup(text) => {
            let hint = "download it again: a page to log in, or an error page, was saved instead of the data";
            Err(RecordError::file(path, "it is a page of HTML or XML", hint))
        }
        Some(_) => match extension.as_str() {
            "csv" | "tsv" => Ok(FileKind::Delimited(delimiter(text, &extension))),
            "jsonl" | "ndjson" | "json" => Ok(FileKind::JsonLines),
            _ => {
                let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
                let line: String = String::from_utf8_lossy(line).chars().take(40).collect();
                let problem =
                    format!("it is neither JSON nor parquet: it begins with `{}`", printable(line.trim_end()));
                let hint = "use JSON Lines, a JSON array, parquet, or CSV and TSV with the extension `.csv` or `.tsv`";
                Err(RecordError::file(path, problem, hint))
            }
        },
    }
}

fn is_markup(text: &[u8]) -> bool {
    let start = String::from_utf8_lossy(&text[..text.len().min(16)]).to_ascii_lowercase();
    ["<!doctype", "<html", "<head", "<body", "<?xml", "<!--"].iter().any(|tag| start.starts_with(tag))
}

/// The separator of the columns. Excel may name it in a line above the header (`sep=;`).
fn delimiter(text: &[u8], extension: &str) -> u8 {
    let line = text.split(|byte| matches!(byte, b'\n' | b'\r')).next().unwrap_or_default();
    if let [b's' | b'S', b'e' | b'E', b'p' | b'P', b'=', separator] = *line
        && separator.is_ascii()
        && !separator.is_ascii_alphanumeric()
        && separator != b'"'
    {
        return separator;
    }
    if extension == "tsv" {
        return b'\t';
    }
    [b',', b'\t', b';'].into_iter().find(|byte| line.contains(byte)).unwrap_or(b',')
}

/// The first line without white space at its end, and the text after it without white space at its start.
fn first_line(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr::memchr(b'\n', text)?;
    Some((text[..end].trim_ascii_end(), text[end..].trim_ascii_start()))
}

/// The nesting depth at the end of a line; `None` within a string.
fn depth_at_end(line: &[u8]) -> Option<isize> {
    let mut nesting = JsonNesting::default();
    line.iter().for_each(|&byte| nesting.take(byte));
    (!nesting.quoted).then_some(nesting.depth)
}

/// Whether the first object continues in the second line. A first line that is merely broken JSON must not count: all records
/// after it would become part of one object.
fn is_over_lines(text: &[u8]) -> bool {
    let Some((line, rest)) = first_line(text) else { return false };
    let continues =
        matches!(line.last(), Some(b'{' | b'[' | b',' | b':')) || matches!(rest.first(), Some(b',' | b'}' | b']'));
    continues && depth_at_end(line).is_some_and(|depth| depth > 0)
}

/// Whether the first line is a complete list, and the second line starts another.
fn has_lists_in_lines(text: &[u8]) -> bool {
    let Some((line, rest)) = first_line(text) else { return false };
    line.ends_with(b"]") && rest.first() == Some(&b'[') && depth_at_end(line) == Some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, head: &[u8]) -> Result<FileKind, String> {
        detect_kind(Path::new(name), head).map_err(|error| {
            assert!(error.hint().is_some());
            error.to_string()
        })
    }

    #[test]
    fn the_kind_is_detected_by_the_bytes_then_by_the_name() {
        use FileKind::*;
        for (name, head, expected) in [
            ("a.jsonl", "{\"a\": 1}\n{\"a\": 2}\n", JsonLines),
            ("a.txt", "\r\n {\"a\": 1}", JsonLines),
            ("a.json", "{\"a\": 1}\n{\"a\": 2}\n", JsonLines),
            ("a.json", "[\n{\"a\": 1}]", JsonArray),
            ("a.jsonl", "[{\"a\": 1}]", JsonArray),
            ("a.json", "{\n  \"a\": 1\n}", JsonObjects),
            ("a.json", "{\"a\": [\n1]}", JsonObjects),
            ("a.json", "{\"a\": 1\n}\n{\"a\": 2\n}", JsonObjects),
            // Broken lines, within a string and at the end; not objects over several lines.
            ("a.jsonl", "{\"a\": \"x\n{\"a\": 2}\n", JsonLines),
            ("a.jsonl", "{\"a\": 1\n{\"a\": 2}\n", JsonLines),
            ("a.jsonl", "words\n{\"a\": 2}\n", JsonLines),
            ("a.csv", "text,id\n", Delimited(b',')),
            ("a.CSV.gz", "text;id\n", Delimited(b';')),
            ("a.tsv", "text\tid, or so\n", Delimited(b'\t')),
            ("a.csv", "text\n", Delimited(b',')),
            ("a.csv", "sep=;\r\nid,or so\r\n", Delimited(b';')),
            ("a.csv", "sep=|\nid|text\n", Delimited(b'|')),
            ("a.csv", "sep=x\n", Delimited(b',')),
            ("a.csv", "{\"a\": 1}\n", JsonLines),
            ("a.jsonl", "PAR1....", Parquet),
            ("a.parquet", "....", Parquet),
            ("a.jsonl", "", JsonLines),
        ] {
            assert_eq!(of(name, head.as_bytes()), Ok(expected), "{name}: {head}");
        }
    }

    #[test]
    fn files_that_are_not_records_are_errors_that_say_what_they_are() {
        let utf_16 = |text: &str, big| -> Vec<u8> {
            text.encode_utf16().flat_map(|unit| if big { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
        };
        let tar = [&[b'a'; 257][..], b"ustar  \0"].concat();
        for (head, expected) in [
            (
                &b"version https://git-lfs.github.com/spec/v1\noid sha256:"[..],
                "it is a git-lfs pointer in place of the data",
            ),
            (b"PK\x03\x04....", "it is a zip archive"),
            (&tar, "it is a tar archive"),
            (b"ARROW1\0\0", "it is an Arrow (Feather) file"),
            (b"\xff\xff\xff\xff\x10\0\0\0", "it is an Arrow stream"),
            (b"SQLite format 3\0", "it is an SQLite database"),
            (b"\x80\x04\x95", "it is a Python pickle"),
            (b"<!DOCTYPE html>\n<html>", "it is a page of HTML or XML"),
            (b"\n<HTML>", "it is a page of HTML or XML"),
            (b"\xff\xfe{\0\"\0", "it is UTF-16 text"),
            (b"\xff\xfe\0\0{\0\0\0", "it is UTF-32 text"),
            (&utf_16("{\"messages\": []}", false), "it is UTF-16 text"),
            (&utf_16("{\"messages\": []}", true), "it is UTF-16 text"),
            (b"[1]\n[2]\n", "each of its lines is a list"),
        ] {
            for name in ["a.jsonl", "a.json", "a.csv", "a.txt", "a"] {
                let error = of(name, head).unwrap_err();
                assert!(error.starts_with(&format!("cannot read `{name}`: {expected}")), "{error}");
            }
        }
        let error = of("a.txt", b"Dear diary,\n").unwrap_err();
        assert!(error.ends_with("it is neither JSON nor parquet: it begins with `Dear diary,`"), "{error}");
    }
}
