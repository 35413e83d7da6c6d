//! How much a sweep may train.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

/// The time, floating-point operations or optimizer steps after which a sweep starts no further run. Runs in progress end.
///
/// Written as a number and a unit: `2h`, `90m`, `30s`, `1e15flop`, `20000steps`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub enum Budget {
    /// Time since the sweep started.
    Time(Duration),
    /// Operations of the runs that this sweep started: forward and backward passes, and Newton-Schulz.
    Flops(f64),
    /// Optimizer steps of the runs that this sweep started.
    Steps(f64),
}

/// What a sweep has used so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Used {
    pub time: Duration,
    pub flops: f64,
    pub steps: f64,
}

impl Budget {
    pub(super) fn is_used_up(self, used: Used) -> bool {
        match self {
            Self::Time(time) => used.time >= time,
            Self::Flops(flops) => used.flops >= flops,
            Self::Steps(steps) => used.steps >= steps,
        }
    }
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        // In 1e15flop the `e15` belongs to the number.
        let unit =
            unit.strip_prefix(['e', 'E']).map_or(unit, |rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()));
        let number = text[..text.len() - unit.len()].parse::<f64>();
        let number = number.ok().filter(|number| number.is_finite()).ok_or("write a number and a unit, such as 2h")?;
        let time = |seconds: f64| Duration::try_from_secs_f64(number * seconds).map(Self::Time);
        match unit {
            "h" => time(3600.0),
            "m" => time(60.0),
            "s" => time(1.0),
            "flop" => return Ok(Self::Flops(number)),
            "steps" => return Ok(Self::Steps(number)),
            _ => return Err("the unit must be h, m, s, flop or steps, as in 2h or 1e15flop".into()),
        }
        .map_err(|_| "the time is too long".into())
    }
}

impl TryFrom<String> for Budget {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) => write!(f, "{}s", time.as_secs_f64()),
            Self::Flops(flops) => write!(f, "{flops:e}flop"),
            Self::Steps(steps) => write!(f, "{steps}steps"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_number_and_a_unit() {
        for (text, expected) in [
            ("1.5h", Budget::Time(Duration::from_secs(5400))),
            ("90m", Budget::Time(Duration::from_secs(5400))),
            ("30s", Budget::Time(Duration::from_secs(30))),
            ("1e15flop", Budget::Flops(1e15)),
            ("2.5E9flop", Budget::Flops(2.5e9)),
            ("20000steps", Budget::Steps(2e4)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
            assert_eq!(expected.to_string().parse(), Ok(expected));
        }
        for text in ["", "90", "h", "-1h", "1e", "1e15", "2 h", "1e400h", "1e30h", "3tokens"] {
            assert!(text.parse::<Budget>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_budget_is_used_up_in_its_own_unit() {
        let used = Used { time: Duration::from_secs(60), flops: 1e9, steps: 100.0 };
        for (budget, expected) in [
            ("1m", true),
            ("2m", false),
            ("1e9flop", true),
            ("1e10flop", false),
            ("100steps", true),
            ("101steps", false),
        ] {
            assert_eq!(budget.parse::<Budget>().unwrap().is_used_up(used), expected, "{budget}");
        }
    }
}
