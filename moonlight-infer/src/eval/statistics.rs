//! Means and ratios with their standard errors, as in lm-evaluation-harness.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The number of bootstrap resamples.
const RESAMPLES: usize = 1000;
/// The seed of the bootstrap, as in the harness.
const SEED: u64 = 1234;

/// The value of a metric, and its standard error.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// The standard error; `None` for a single row.
    pub stderr: Option<f64>,
}

/// The mean of a sample and its standard error `s / sqrt(n)`, where `s` is the sample standard deviation with `n - 1`
/// (`mean_stderr` of the harness). For an accuracy it is the binomial standard error.
pub(super) fn mean(values: &[f64]) -> Estimate {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let stderr = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt() / count.sqrt());
    Estimate { value: mean, stderr }
}

/// The value `of(sum of a, sum of b)`, where the sums are over rows `(a, b)`, and its standard deviation over bootstrap
/// resamples of the rows.
pub(super) fn ratio(rows: &[(f64, f64)], of: impl Fn(f64, f64) -> f64) -> Estimate {
    let sum = |rows: &mut dyn Iterator<Item = (f64, f64)>| rows.fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
    let (a, b) = sum(&mut rows.iter().copied());
    let value = of(a, b);
    if rows.len() < 2 {
        return Estimate { value, stderr: None };
    }
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let resamples: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let (a, b) = sum(&mut (0..rows.len()).map(|_| rows[random.random_range(0..rows.len())]));
            of(a, b)
        })
        .collect();
    let center = resamples.iter().sum::<f64>() / RESAMPLES as f64;
    let squares: f64 = resamples.iter().map(|value| (value - center).powi(2)).sum();
    Estimate { value, stderr: Some((squares / (RESAMPLES as f64 - 1.0)).sqrt()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accuracy_has_the_binomial_standard_error() {
        let Estimate { value, stderr } = mean(&[1.0, 1.0, 1.0, 0.0]);
        assert_eq!(value, 0.75);
        assert!((stderr.unwrap() - (0.75f64 * 0.25 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(mean(&[1.0]).stderr, None);
    }

    #[test]
    fn the_bootstrap_error_of_a_mean_is_close_to_the_analytic_one() {
        let rows: Vec<(f64, f64)> = (0..400).map(|n| (f64::from(n % 7), 1.0)).collect();
        let values: Vec<f64> = rows.iter().map(|(value, _)| *value).collect();
        let (bootstrap, plain) = (ratio(&rows, |a, b| a / b), mean(&values));
        assert!((bootstrap.value - plain.value).abs() < 1e-12);
        let (bootstrap, plain) = (bootstrap.stderr.unwrap(), plain.stderr.unwrap());
        assert!((bootstrap / plain - 1.0).abs() < 0.1, "{bootstrap} is not about {plain}");
        assert_eq!(ratio(&rows, |a, b| a / b), ratio(&rows, |a, b| a / b));
    }
}
