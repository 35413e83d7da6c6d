//! Reads `metrics.jsonl` and `samples.jsonl` while a run writes them: in parts, in bounded memory, from any position.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

use serde::Serialize;
use serde_json::{Map, Value};

/// The most bytes of a file that one request reads.
const SPAN_BYTES: u64 = 16 << 20;
/// A longer line is not a record of this program.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Training steps of a complete file that are returned; of a longer file every n-th step is.
const MAX_STEPS: u64 = 2000;
/// Records of one answer. The next request continues after them.
const MAX_RECORDS: usize = 4000;
/// The start of the file from which the length of its lines is estimated.
const PROBED_BYTES: u64 = 16 << 10;
/// The end of `samples.jsonl` that is read; older samples are not shown.
const SAMPLES_BYTES: u64 = 1 << 20;
/// The most samples that are returned, the newest ones.
const MAX_SAMPLES: usize = 200;
/// Metrics of one record. The program writes about 15.
const MAX_METRICS: usize = 64;

/// A position in a file, as a client sends it back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Position {
    /// Bytes that the client has.
    pub(super) after: u64,
    /// The file that they are from. A run that resumes replaces its files.
    pub(super) file: Option<String>,
}

/// Records of a file, and where it continues.
#[derive(Debug, Default, Serialize)]
pub(super) struct MetricsPart {
    /// Each has `split`, and numbers by the keys of `metrics.jsonl`.
    pub(super) records: Vec<Value>,
    /// The `after` of the next request.
    pub(super) next: u64,
    /// The length of the file in bytes. There is more to read if `next` is less, except for an incomplete last line.
    pub(super) size: u64,
    /// Identifies the file.
    pub(super) file: String,
    /// Whether the records are those from the start of the file, and replace those that the client has.
    pub(super) restarted: bool,
    /// One of this many training steps is returned; validations are all returned.
    pub(super) every: u64,
    /// Lines that are not records.
    pub(super) damaged: u64,
}

/// Identifies a file that another one may replace under the same path.
fn identity(metadata: &Metadata) -> String {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        format!("{:x}-{:x}", metadata.dev(), metadata.ino())
    }
    #[cfg(not(unix))]
    {
        let created = metadata.created().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        format!("{:x}", created.map_or(0, |time| time.as_nanos()))
    }
}

/// Where reading starts, and whether that is the start although the client has a part.
fn start(position: &Position, file: &str, size: u64) -> (u64, bool) {
    let is_other = position.file.as_deref().is_some_and(|of_client| of_client != file);
    if is_other || position.after > size { (0, position.after > 0) } else { (position.after, false) }
}

/// The records of `metrics.jsonl` after a position.
///
/// A line that is not complete yet is left for the next request. Any other line that is not a record is counted.
pub(super) fn read_metrics(mut file: File, position: &Position) -> io::Result<MetricsPart> {
    let metadata = file.metadata()?;
    let (size, identity) = (metadata.len(), identity(&metadata));
    let (start, restarted) = start(position, &identity, size);
    let every = (size / line_bytes(&mut file)?).div_ceil(MAX_STEPS).max(1);
    file.seek(SeekFrom::Start(start))?;
    let mut part = MetricsPart { next: start, size, file: identity, restarted, every, ..MetricsPart::default() };
    let mut lines = Lines { reader: BufReader::with_capacity(1 << 16, file), line: Vec::new() };
    let (mut steps, mut skipped) = (0u64, None);
    while part.next < start + SPAN_BYTES && part.records.len() < MAX_RECORDS {
        let Some(bytes) = lines.next()? else { break };
        part.next += bytes;
        let line = lines.line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        // Most lines of a long file are not returned, so they are not parsed either.
        let is_step = line.starts_with(b"{\"split\":\"train\"");
        let is_returned = !is_step || steps.is_multiple_of(every);
        steps += u64::from(is_step);
        skipped = if is_returned { None } else { Some(line.to_vec()) };
        if is_returned {
            match record(line) {
                Some(record) => part.records.push(record),
                None => part.damaged += 1,
            }
        }
    }
    // The newest step is always returned, so that a page shows where the run is.
    part.records.extend(skipped.and_then(|line| record(&line)));
    Ok(part)
}

/// The mean length of the lines at the start of a file, at least 1.
fn line_bytes(file: &mut File) -> io::Result<u64> {
    let mut probed = Vec::new();
    file.by_ref().take(PROBED_BYTES).read_to_end(&mut probed)?;
    let lines = probed.iter().filter(|byte| **byte == b'\n').count();
    Ok((probed.len() as u64 / (lines as u64).max(1)).max(1))
}

/// A record with its split and its numbers. Texts of any other key are not of this program, and are left out.
fn record(line: &[u8]) -> Option<Value> {
    let Ok(Value::Object(fields)) = serde_json::from_slice(line) else { return None };
    fields.get("step").filter(|step| step.is_u64())?;
    fields.get("split").filter(|split| *split == "train" || *split == "valid")?;
    let is_shown = |(key, value): &(String, Value)| value.is_number() || key == "split";
    Some(Value::Object(fields.into_iter().filter(is_shown).take(MAX_METRICS).collect::<Map<_, _>>()))
}

/// Complete lines of a file, of bounded length.
struct Lines {
    reader: BufReader<File>,
    /// The last line that was read; empty for one that is too long.
    line: Vec<u8>,
}

impl Lines {
    /// Reads the next line, and returns its length with the line break; `None` if no complete line is left.
    fn next(&mut self) -> io::Result<Option<u64>> {
        self.line.clear();
        let mut bytes = self.reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut self.line)? as u64;
        if self.line.last() == Some(&b'\n') {
            return Ok(Some(bytes));
        }
        if bytes < MAX_LINE_BYTES {
            return Ok(None);
        }
        // Its rest is read and not kept. What is left of the line is no JSON, so it counts as damaged.
        self.line.truncate(1);
        loop {
            let buffer = self.reader.fill_buf()?;
            let found = buffer.iter().position(|byte| *byte == b'\n');
            let (length, ends) = (found.map_or(buffer.len(), |at| at + 1), found.is_some());
            let at_end = buffer.is_empty();
            self.reader.consume(length);
            bytes += length as u64;
            if ends || at_end {
                return Ok(Some(bytes));
            }
        }
    }
}

/// A text that the model of a run wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct SampleText {
    step: u64,
    prompt: String,
    text: String,
}

/// The samples of a run, and where its file ends.
#[derive(Debug, Default, Serialize)]
pub(super) struct SamplesPart {
    /// The newest samples, in the order of their steps.
    pub(super) samples: Vec<SampleText>,
    /// Whether the file has not changed since the client's position; `samples` is then empty.
    pub(super) unchanged: bool,
    pub(super) next: u64,
    pub(super) file: String,
}

/// The newest samples of `samples.jsonl`.
pub(super) fn read_samples(mut file: File, position: &Position) -> io::Result<SamplesPart> {
    let metadata = file.metadata()?;
    let (size, identity) = (metadata.len(), identity(&metadata));
    if position.after == size && position.file.as_deref() == Some(&identity) {
        return Ok(SamplesPart { unchanged: true, next: size, file: identity, samples: Vec::new() });
    }
    let tail = tail(&mut file, size, SAMPLES_BYTES)?;
    let mut samples: Vec<SampleText> = lines(&tail).filter_map(sample).collect();
    samples.drain(..samples.len().saturating_sub(MAX_SAMPLES));
    Ok(SamplesPart { samples, unchanged: false, next: size, file: identity })
}

fn sample(line: &[u8]) -> Option<SampleText> {
    let value: Value = serde_json::from_slice(line).ok()?;
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    Some(SampleText { step: value["step"].as_u64()?, prompt: text("prompt")?, text: text("text")? })
}

/// The last `most` bytes of a file, from the start of a line.
pub(super) fn tail(file: &mut File, size: u64, most: u64) -> io::Result<Vec<u8>> {
    let start = size.saturating_sub(most);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.by_ref().take(most).read_to_end(&mut bytes)?;
    if start > 0 {
        let line = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| end + 1);
        bytes.drain(..line);
    }
    Ok(bytes)
}

/// The complete lines of a text.
pub(super) fn lines(text: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    let complete = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    text[..complete].split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde_json::json;

    use super::*;

    struct Written(tempfile::NamedTempFile);

    impl Written {
        fn new(text: &[u8]) -> Self {
            let written = Self(tempfile::NamedTempFile::new().unwrap());
            written.append(text);
            written
        }

        fn append(&self, text: &[u8]) {
            File::options().append(true).open(self.0.path()).unwrap().write_all(text).unwrap();
        }

        fn read(&self, position: &Position) -> MetricsPart {
            read_metrics(File::open(self.0.path()).unwrap(), position).unwrap()
        }

        fn samples(&self, position: &Position) -> SamplesPart {
            read_samples(File::open(self.0.path()).unwrap(), position).unwrap()
        }
    }

    fn line(split: &str, step: u64) -> String {
        json!({"split": split, "step": step, "loss": 2.5}).to_string().replace(
            // serde_json sorts keys here; the program writes the split first.
            &format!("{{\"loss\":2.5,\"split\":\"{split}\""),
            &format!("{{\"split\":\"{split}\",\"loss\":2.5"),
        ) + "\n"
    }

    fn steps(part: &MetricsPart) -> Vec<u64> {
        part.records.iter().map(|record| record["step"].as_u64().unwrap()).collect()
    }

    fn after(part: &MetricsPart) -> Position {
        Position { after: part.next, file: Some(part.file.clone()) }
    }

    #[test]
    fn only_new_lines_are_read_and_an_incomplete_one_waits() {
        let file = Written::new((line("train", 1) + &line("valid", 1) + "{\"split\":\"tr").as_bytes());
        let part = file.read(&Position::default());
        assert_eq!((steps(&part), part.damaged, part.every, part.restarted), (vec![1, 1], 0, 1, false));
        assert!(part.next < part.size);
        let part = file.read(&after(&part));
        assert_eq!((steps(&part), part.damaged), (vec![], 0));
        file.append(b"ain\",\"step\":2,\"loss\":1.0}\n");
        let part = file.read(&after(&part));
        assert_eq!((steps(&part), part.next), (vec![2], part.size));
    }

    #[test]
    fn damaged_lines_are_counted_whatever_their_bytes() {
        let mut text = b"\xff\xfe\n[]\n{\"split\":\"train\"}\n{\"split\":\"train\",\"step\":\"x\"}\n".to_vec();
        text.extend(vec![b'['; 3 << 20]);
        text.extend(b"\n\n  \n{\"split\":\"other\",\"step\":1}\n");
        text.extend(line("train", 7).bytes());
        let part = Written::new(&text).read(&Position::default());
        assert_eq!((steps(&part), part.damaged, part.next), (vec![7], 6, part.size));
    }

    #[test]
    fn a_record_has_its_split_and_numbers_only() {
        let text = b"{\"split\":\"train\",\"step\":1,\"loss\":2,\"note\":\"<b>\",\"deep\":[[1]],\"lr\":null}\n";
        let part = Written::new(text).read(&Position::default());
        assert_eq!(part.records, [json!({"split": "train", "step": 1, "loss": 2})]);
    }

    #[test]
    fn another_file_or_a_shorter_one_is_read_from_its_start() {
        let file = Written::new(line("train", 1).as_bytes());
        let part = file.read(&Position::default());
        let other = Written::new((line("train", 1) + &line("train", 2)).as_bytes());
        let again = other.read(&after(&part));
        assert_eq!((steps(&again), again.restarted), (vec![1, 2], true));
        let shorter = file.read(&Position { after: 10_000, file: Some(part.file) });
        assert_eq!((steps(&shorter), shorter.restarted), (vec![1], true));
    }

    #[test]
    fn of_a_long_file_every_nth_step_is_returned_with_all_validations_and_the_newest_step() {
        let mut text = String::new();
        for step in 1..=50_001 {
            text += &line("train", step);
            if step % 100 == 0 {
                text += &line("valid", step);
            }
        }
        let file = Written::new(text.as_bytes());
        let part = file.read(&Position::default());
        assert!((20..=30).contains(&part.every), "{}", part.every);
        let count = |split: &str| part.records.iter().filter(|record| record["split"] == split).count();
        assert_eq!(count("valid"), 500);
        assert!((1500..2600).contains(&count("train")), "{}", count("train"));
        assert_eq!((steps(&part).last(), part.next), (Some(&50_001), part.size));
        // A step that is appended is returned at once, though it is one of many.
        file.append(line("train", 50_002).as_bytes());
        assert_eq!(steps(&file.read(&after(&part))), [50_002]);
    }

    #[test]
    fn a_file_of_any_length_is_read_in_parts() {
        let padding = format!(",\"note\":\"{}\"}}\n", "x".repeat(100_000));
        let text: String = (1..=400).map(|step| line("valid", step).replace("}\n", &padding)).collect();
        let file = Written::new(text.as_bytes());
        let (mut all, mut position, mut parts) = (Vec::new(), Position::default(), 0);
        loop {
            let part = file.read(&position);
            assert!(part.next - position.after <= SPAN_BYTES + MAX_LINE_BYTES);
            all.extend(steps(&part));
            (position, parts) = (after(&part), parts + 1);
            if part.next == part.size {
                break;
            }
        }
        assert_eq!((all, parts), ((1..=400).collect(), 3));
    }

    #[test]
    fn the_newest_samples_are_returned_until_the_file_is_known() {
        let of = |step: u64| json!({"step": step, "prompt": "a", "text": "<img src=x>"});
        let text: String = (0..300).map(|step| format!("{}\n", of(step))).collect();
        let file = Written::new((text + "{\"step\":1}\n{\"ste").as_bytes());
        let part = file.samples(&Position::default());
        assert_eq!((part.samples.len(), part.samples[199].step, &*part.samples[0].text), (200, 299, "<img src=x>"));
        let known = Position { after: part.next, file: Some(part.file) };
        assert!(file.samples(&known).unchanged && file.samples(&known).samples.is_empty());
        file.append(b"\n");
        assert_eq!(file.samples(&known).samples.len(), 200);
    }

    #[test]
    fn the_end_of_a_file_starts_with_a_complete_line() {
        let file = Written::new(b"first\nsecond\nthird\npart");
        let mut open = File::open(file.0.path()).unwrap();
        let end = tail(&mut open, 23, 14).unwrap();
        assert_eq!(lines(&end).collect::<Vec<_>>(), [b"third"]);
        let all = tail(&mut open, 23, 1000).unwrap();
        assert_eq!(lines(&all).count(), 3);
    }
}
