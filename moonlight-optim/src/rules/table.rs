//! The printed table.

use std::collections::HashMap;
use std::fmt;

use super::{AssignedParameter, Assignment, BUFFER};

impl fmt::Display for Assignment {
    /// A row for each parameter (path, shape, group, reason), then a line for each group with its totals.
    ///
    /// `{:#}` merges the corresponding parameters of all layers into one row: `layers.{0-26}.input_layernorm.weight`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ["parameter", "shape", "optimizer", "why"].map(str::to_string);
        let mut rows = vec![header];
        if f.alternate() {
            rows.extend(merged(self.rows()).iter().map(Merged::cells));
        } else {
            rows.extend(self.rows().iter().map(|row| cells(row.path.clone(), row)));
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let [path, shape, group] = [width(0), width(1), width(2)];
        for row in &rows {
            writeln!(f, "{:path$}  {:shape$}  {:group$}  {}", row[0], row[1], row[2], row[3])?;
        }
        writeln!(f)?;
        write!(f, "{}", self.summary())
    }
}

fn cells(path: String, row: &AssignedParameter) -> [String; 4] {
    [path, format!("{:?}", row.shape), row.group.clone(), row.reason.clone()]
}

/// Parameters whose paths differ only in the first number.
struct Merged<'a> {
    first: &'a AssignedParameter,
    /// The path before and after the number.
    around: Option<(&'a str, &'a str)>,
    numbers: Vec<usize>,
}

impl Merged<'_> {
    fn cells(&self) -> [String; 4] {
        let path = match self.around {
            Some((before, after)) if self.numbers.len() > 1 => format!("{before}{{{}}}{after}", ranges(&self.numbers)),
            _ => self.first.path.clone(),
        };
        cells(path, self.first)
    }
}

fn merged(rows: &[AssignedParameter]) -> Vec<Merged<'_>> {
    let mut merged: Vec<Merged<'_>> = Vec::new();
    let mut places = HashMap::new();
    for row in rows {
        let around = around_number(&row.path);
        let Some((before, number, after)) = around else {
            merged.push(Merged { first: row, around: None, numbers: Vec::new() });
            continue;
        };
        let key = (before, after, &row.shape, &row.group, &row.reason);
        let place = *places.entry(key).or_insert_with(|| {
            merged.push(Merged { first: row, around: Some((before, after)), numbers: Vec::new() });
            merged.len() - 1
        });
        merged[place].numbers.push(number);
    }
    merged
}

/// The first name of a path that is a number, and what comes before and after it.
fn around_number(path: &str) -> Option<(&str, usize, &str)> {
    let mut start = 0;
    for name in path.split('.') {
        if let Ok(number) = name.parse() {
            return Some((&path[..start], number, &path[start + name.len()..]));
        }
        start += name.len() + 1;
    }
    None
}

/// `[0, 1, 2, 5]` as `0-2,5`.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => runs.push((number, number)),
        }
    }
    let text = |&(start, end): &(usize, usize)| {
        if start == end { start.to_string() } else { format!("{start}-{end}") }
    };
    runs.iter().map(text).collect::<Vec<_>>().join(",")
}

impl Assignment {
    /// A line for each group, with the number of its tensors and of their elements.
    pub fn summary(&self) -> String {
        let mut lines = Vec::new();
        for (name, _) in self.groups() {
            let (count, elements) = total(self.parameters_of(name));
            lines.push(line(name, count, elements));
        }
        let (count, elements) = total(self.rows().iter().filter(|row| row.group == BUFFER));
        if count > 0 {
            lines.push(line(BUFFER, count, elements));
        }
        lines.join("\n")
    }
}

fn total<'a>(rows: impl Iterator<Item = &'a AssignedParameter>) -> (usize, usize) {
    rows.fold((0, 0), |(count, sum), row| (count + 1, sum + row.elements()))
}

fn line(name: &str, count: usize, elements: usize) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{name}: {count} tensor{plural}, {} elements", grouped(elements))
}

/// `1234567` as `1,234,567`.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(15_960_110_208), "15,960,110,208");
    }

    #[test]
    fn layers_are_written_as_ranges() {
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(around_number("layers.12.mlp.up"), Some(("layers.", 12, ".mlp.up")));
        assert_eq!(around_number("0.weight"), Some(("", 0, ".weight")));
        assert_eq!(around_number("norm.weight"), None);
    }
}
