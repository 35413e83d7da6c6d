//! The printed table.

use std::fmt;

use super::{Assignment, BUFFER};

impl fmt::Display for Assignment {
    /// A row for each parameter (path, shape, group, reason), then a line for each group with its totals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ["parameter", "shape", "optimizer", "why"].map(str::to_string);
        let rows: Vec<[String; 4]> = self
            .rows()
            .iter()
            .map(|row| [row.path.clone(), format!("{:?}", row.shape), row.group.clone(), row.reason.clone()])
            .collect();
        let width = |column: usize| {
            std::iter::once(&header).chain(&rows).map(|row| row[column].chars().count()).max().unwrap_or(0)
        };
        let [path, shape, group] = [width(0), width(1), width(2)];
        for row in std::iter::once(&header).chain(&rows) {
            writeln!(f, "{:path$}  {:shape$}  {:group$}  {}", row[0], row[1], row[2], row[3])?;
        }
        writeln!(f)?;
        write!(f, "{}", self.summary())
    }
}

impl Assignment {
    /// A line for each group: how many parameters it has and how many elements they have.
    pub fn summary(&self) -> String {
        let mut lines = Vec::new();
        for (name, _) in self.groups() {
            let (count, elements) = total(self.parameters_of(name).map(|row| row.elements()));
            lines.push(line(name, count, elements));
        }
        let buffers = self.rows().iter().filter(|row| row.group == BUFFER);
        let (count, elements) = total(buffers.map(|row| row.elements()));
        if count > 0 {
            lines.push(line(BUFFER, count, elements));
        }
        lines.join("\n")
    }
}

fn total(elements: impl Iterator<Item = usize>) -> (usize, usize) {
    elements.fold((0, 0), |(count, sum), elements| (count + 1, sum + elements))
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
    use super::grouped;

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(15_960_110_208), "15,960,110,208");
    }
}
