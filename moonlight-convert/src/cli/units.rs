//! Numbers in units that people read.

use std::fmt;

/// A count with a decimal prefix: `731`, `4.5 M`, `15.96 B`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count(pub(crate) u64);

impl fmt::Display for Count {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0 as f64;
        match self.0 {
            0..1_000 => write!(formatter, "{}", self.0),
            // At 999,950 one decimal would round up to 1000.0 k.
            1_000..999_950 => write!(formatter, "{:.1} k", count / 1e3),
            999_950..999_950_000 => write!(formatter, "{:.1} M", count / 1e6),
            // Two decimals, as in the names and papers of models.
            _ => write!(formatter, "{:.2} B", count / 1e9),
        }
    }
}

/// `1 tensor`, `2 tensors`.
pub(crate) fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_prefixes() {
        for (count, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1.0 k"),
            (999_949, "999.9 k"),
            (999_950, "1.0 M"),
            (4_538_480, "4.5 M"),
            (999_950_000, "1.00 B"),
            (15_960_110_208, "15.96 B"),
        ] {
            assert_eq!(Count(count).to_string(), text);
        }
    }

    #[test]
    fn nouns_agree_with_counts() {
        assert_eq!(
            (plural(0, "file"), plural(1, "file"), plural(2, "file")),
            ("0 files".into(), "1 file".into(), "2 files".into())
        );
    }
}
