//! Statistics for comparisons of runs: intervals over seeds, power laws of loss over compute, the share of the FLOPs that one
//! method needs for the loss of another, and the minimum of a tuning curve.
//!
//! All functions are pure and in f64. FLOPs are those of a whole training, losses are in nats per token.

use std::fmt;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How often an interval is to contain the true value.
const CONFIDENCE: f64 = 0.95;

/// Resamples of [`bootstrap`]. 50 of them are below the low end of an interval and 50 above its high end.
const RESAMPLES: usize = 2000;

/// Of the resamples, the share that may have no fit. With more, the ends of the intervals could be among them.
const MAX_SKIPPED: f64 = (1.0 - CONFIDENCE) / 2.0;

/// An estimate and the interval around it, usually of 95 %.
///
/// It is displayed with two significant digits of half its width: as `2.281 ± 0.013` if the estimate is in the middle, else as
/// `1.31 [1.22, 1.43]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The best single value.
    pub estimate: f64,
    /// The low end.
    pub low: f64,
    /// The high end.
    pub high: f64,
}

impl Interval {
    /// Half of `high - low`, in the unit of the estimate.
    pub fn half_width(&self) -> f64 {
        (self.high - self.low) / 2.0
    }

    /// Whether the value is in the interval, its ends included.
    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { estimate, low, high } = *self;
        let half = self.half_width();
        let symmetric = ((high - estimate) - (estimate - low)).abs() <= 1e-6 * half.abs();
        let exponent = power_of_ten(estimate.abs().max(half.abs()));
        // FLOPs and very small rates are not readable as decimals.
        let (scale, suffix) =
            if (-4..6).contains(&exponent) { (1.0, String::new()) } else { (scale(exponent), format!("e{exponent}")) };
        let decimals = match half / scale {
            // Without a width, four digits of the estimate.
            0.0 => 3 - power_of_ten(estimate / scale),
            half => 1 - power_of_ten(half),
        };
        let decimals = decimals.clamp(0, 17) as usize;
        let number = |value: f64| {
            let text = format!("{:.decimals$}", value / scale);
            let zero = text.starts_with('-') && text.chars().all(|character| "-0.".contains(character));
            if zero { text[1..].to_owned() } else { text }
        };
        f.pad(&match (symmetric, suffix.is_empty()) {
            (true, true) => format!("{} ± {}", number(estimate), number(half)),
            (true, false) => format!("({} ± {}){suffix}", number(estimate), number(half)),
            (false, _) => format!("{}{suffix} [{}{suffix}, {}{suffix}]", number(estimate), number(low), number(high)),
        })
    }
}

/// The exponent of a value's first digit, once it is rounded to two digits: -2 of 0.0123, but -1 of 0.0996, which is rounded to
/// 0.10. 0 of 0 and of non-finite values.
fn power_of_ten(value: f64) -> i32 {
    format!("{value:.1e}").split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0)
}

/// `10^exponent`, and not 0 for the smallest floats.
fn scale(exponent: i32) -> f64 {
    10f64.powi(exponent).max(f64::MIN_POSITIVE)
}

/// The mean of independent values with its 95 % interval by Student's t: `mean ± t(n - 1) s / sqrt(n)`, where `s` is the standard
/// deviation with `n - 1` in the denominator.
///
/// `None` for fewer than two values, and if one is non-finite.
pub fn mean_interval(values: &[f64]) -> Option<Interval> {
    if values.len() < 2 || values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let (n, freedom) = (values.len() as f64, values.len() - 1);
    let mean = mean(values);
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / freedom as f64;
    let half = t_quantile(CONFIDENCE, freedom) * (variance / n).sqrt();
    Some(Interval { estimate: mean, low: mean - half, high: mean + half })
}

/// The mean of `first[i] - second[i]` with its 95 % interval by Student's t.
///
/// Runs of the same seed have the same data and order, so their difference varies less than each of them.
///
/// `None` if the lengths differ, for fewer than two pairs, and if a value is non-finite.
pub fn paired_difference(first: &[f64], second: &[f64]) -> Option<Interval> {
    if first.len() != second.len() {
        return None;
    }
    mean_interval(&first.iter().zip(second).map(|(first, second)| first - second).collect::<Vec<_>>())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The `t` with `P(|T| < t) = confidence`, for Student's distribution with so many degrees of freedom, at least 1.
fn t_quantile(confidence: f64, freedom: usize) -> f64 {
    let mut high = 2.0;
    while t_probability(high, freedom) < confidence {
        high *= 2.0;
    }
    let mut low = 0.0;
    // As many halvings as an f64 has bits of precision, and some for the width of the first bracket.
    for _ in 0..64 {
        let middle = (low + high) / 2.0;
        if t_probability(middle, freedom) < confidence {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// `P(|T| < t)` of Student's distribution: Abramowitz and Stegun, equations 26.7.3 and 26.7.4. Both are finite sums, because the
/// degrees of freedom are an integer.
fn t_probability(t: f64, freedom: usize) -> f64 {
    let nu = freedom as f64;
    // Sine and square of the cosine of theta = atan(t / sqrt(nu)).
    let (sine, square) = (t / (nu + t * t).sqrt(), nu / (nu + t * t));
    let odd = freedom % 2 == 1;
    let mut term = if odd { square.sqrt() } else { 1.0 };
    let mut sum = 0.0;
    for k in 1..=freedom / 2 {
        sum += term;
        let k = 2.0 * k as f64;
        term *= square * if odd { k / (k + 1.0) } else { (k - 1.0) / k };
    }
    if odd { std::f64::consts::FRAC_2_PI * ((t / nu.sqrt()).atan() + sine * sum) } else { sine * sum }
}

/// The loss that a power law does not go below, however much is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LossFloor {
    /// A value known in advance: 0, or the entropy of synthetic data.
    Known(f64),
    /// Fitted, for each method by itself, as [`PowerLaw::fit_with_floor`] does.
    Fitted,
}

/// Loss as a function of compute: `L(C) = floor + a C^-b`.
///
/// The Muon report's fits have no floor (arXiv 2502.16982, the scaling law experiments).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PowerLaw {
    /// The factor, in the unit of the loss.
    pub a: f64,
    /// The exponent; positive if the loss falls.
    pub b: f64,
    /// The limit of the loss for large C.
    pub floor: f64,
}

impl PowerLaw {
    /// Least squares of `ln(L - floor)` over `ln C`, for points `(C, L)`.
    ///
    /// `None` for fewer than two different C, and if a C is not positive, a loss is not above the floor or a value is non-finite.
    pub fn fit(points: &[(f64, f64)], floor: f64) -> Option<Self> {
        let logs: Vec<(f64, f64)> = points.iter().map(|&(c, loss)| (c.ln(), (loss - floor).ln())).collect();
        // The logarithm of 0 is infinite and that of a negative value is NaN.
        if logs.iter().any(|(x, y)| !x.is_finite() || !y.is_finite()) || distinct(points) < 2 {
            return None;
        }
        let n = logs.len() as f64;
        let mean_x = logs.iter().map(|log| log.0).sum::<f64>() / n;
        let mean_y = logs.iter().map(|log| log.1).sum::<f64>() / n;
        let square: f64 = logs.iter().map(|log| (log.0 - mean_x).powi(2)).sum();
        let product: f64 = logs.iter().map(|log| (log.0 - mean_x) * (log.1 - mean_y)).sum();
        let b = -product / square;
        let a = (mean_y + b * mean_x).exp();
        (a.is_finite() && a > 0.0 && b.is_finite()).then_some(Self { a, b, floor })
    }

    /// The fit with the floor in `[0, min L)` for which [`log_error`](Self::log_error) is least. The floor is searched on a grid, then by
    /// golden section.
    ///
    /// Three parameters need at least four different C; the fit is `None` with fewer, and where [`PowerLaw::fit`] is for a floor of 0.
    pub fn fit_with_floor(points: &[(f64, f64)]) -> Option<Self> {
        /// Steps of the grid.
        const STEPS: u32 = 64;
        /// The floor is at most so near to the lowest loss, as a share of it.
        const NEAREST: f64 = 1e-4;
        /// Each step of the golden section leaves 0.618 of the bracket.
        const SECTIONS: u32 = 40;

        let lowest = points.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
        if distinct(points) < 4 || !(lowest > 0.0 && lowest.is_finite()) {
            return None;
        }
        // The fit changes with the logarithm of the gap, 1 - floor / lowest: a grid in the floor would be too coarse near its end.
        let fit = |log_gap: f64| {
            let law = Self::fit(points, lowest * (1.0 - log_gap.exp()))?;
            Some((law.log_error(points), law))
        };
        let error = |log_gap| fit(log_gap).map_or(f64::INFINITY, |(error, _)| error);
        let grid = |index: u32| NEAREST.ln() * f64::from(index) / f64::from(STEPS);
        let best = (0..=STEPS).min_by(|&a, &b| error(grid(a)).total_cmp(&error(grid(b))))?;

        let golden = (5f64.sqrt() - 1.0) / 2.0;
        let (mut low, mut high) = (grid((best + 1).min(STEPS)), grid(best.saturating_sub(1)));
        let mut inner = [high - golden * (high - low), low + golden * (high - low)];
        let mut errors = inner.map(error);
        for _ in 0..SECTIONS {
            if errors[0] < errors[1] {
                high = inner[1];
                inner = [high - golden * (high - low), inner[0]];
                errors = [error(inner[0]), errors[0]];
            } else {
                low = inner[0];
                inner = [inner[1], low + golden * (high - low)];
                errors = [errors[1], error(inner[1])];
            }
        }
        // The section does not reach the ends of its bracket, and a floor of 0 is one.
        let found = [fit((low + high) / 2.0), fit(grid(best))].into_iter().flatten();
        found.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, law)| law)
    }

    /// The fit with a known or a fitted floor.
    pub fn fit_to(points: &[(f64, f64)], floor: LossFloor) -> Option<Self> {
        match floor {
            LossFloor::Known(floor) => Self::fit(points, floor),
            LossFloor::Fitted => Self::fit_with_floor(points),
        }
    }

    /// The loss after a training of C FLOPs.
    pub fn loss(&self, c: f64) -> f64 {
        self.floor + self.a * c.powf(-self.b)
    }

    /// The C with this loss: `(a / (loss - floor))^(1 / b)`. `None` for a loss that the law does not reach, and if the law does not fall.
    pub fn inverse(&self, loss: f64) -> Option<f64> {
        if self.b <= 0.0 || loss <= self.floor {
            return None;
        }
        let c = (self.a / (loss - self.floor)).powf(1.0 / self.b);
        (c > 0.0 && c.is_finite()).then_some(c)
    }

    /// The root mean square of `ln L - ln L(C)`: about the relative error of a loss.
    pub fn log_error(&self, points: &[(f64, f64)]) -> f64 {
        let squares = points.iter().map(|&(c, loss)| (loss.ln() - self.loss(c).ln()).powi(2));
        (squares.sum::<f64>() / points.len() as f64).sqrt()
    }
}

/// How many different C the points have.
fn distinct(points: &[(f64, f64)]) -> usize {
    let mut values: Vec<f64> = points.iter().map(|point| point.0).collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    values.len()
}

/// The FLOPs of a point `(C, L)` of another method, as a share of those that the baseline needs for the same loss: `C / C_baseline(L)`.
/// Below 1 the other method is the more efficient one. The Muon report's number for Muon against AdamW is 0.519 (arXiv 2502.16982).
///
/// The baseline is its fit and not its run of the same size: the two runs end at different losses, and only the fit has a C for the
/// loss of the other.
///
/// `None` where [`PowerLaw::inverse`] is.
pub fn flops_ratio(baseline: &PowerLaw, (c, loss): (f64, f64)) -> Option<f64> {
    baseline.inverse(loss).map(|needed| c / needed)
}

/// The runs of one method at one size.
#[derive(Debug, Clone, PartialEq)]
pub struct SizeRuns {
    /// FLOPs of the training.
    pub flops: f64,
    /// The final loss of each seed. A run that diverged is left out before, as a decision that the report states.
    pub losses: Vec<f64>,
}

/// One size of the other method, compared with the baseline's fit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SizeRatio {
    /// FLOPs of the training.
    pub flops: f64,
    /// The mean over seeds.
    pub loss: f64,
    /// See [`flops_ratio`].
    pub ratio: f64,
}

/// Two methods over several sizes: their power laws, and how many FLOPs the second needs compared to the first.
#[derive(Debug, Clone, PartialEq)]
pub struct FlopsComparison {
    /// The fit of the baseline to the mean losses.
    pub baseline: PowerLaw,
    /// The fit of the other method.
    pub other: PowerLaw,
    /// The other method's sizes, in the given order.
    pub sizes: Vec<SizeRatio>,
    /// The geometric mean of the ratios.
    pub ratio: f64,
}

impl FlopsComparison {
    /// Fits both methods to the mean loss of each size.
    ///
    /// `None` if a fit is (see [`PowerLaw::fit`]), a size has no runs, or a loss of the other method has no C on the baseline's fit.
    pub fn new(baseline: &[SizeRuns], other: &[SizeRuns], floor: LossFloor) -> Option<Self> {
        let points = |sizes: &[SizeRuns]| -> Vec<(f64, f64)> {
            // The mean of no losses is NaN, which has no fit.
            sizes.iter().map(|size| (size.flops, mean(&size.losses))).collect()
        };
        Self::of_means(&points(baseline), &points(other), floor)
    }

    fn of_means(baseline: &[(f64, f64)], other: &[(f64, f64)], floor: LossFloor) -> Option<Self> {
        let (law, other_law) = (PowerLaw::fit_to(baseline, floor)?, PowerLaw::fit_to(other, floor)?);
        let ratio = |&(flops, loss)| Some(SizeRatio { flops, loss, ratio: flops_ratio(&law, (flops, loss))? });
        let sizes = other.iter().map(ratio).collect::<Option<Vec<_>>>()?;
        let ratio = (sizes.iter().map(|size| size.ratio.ln()).sum::<f64>() / sizes.len() as f64).exp();
        ratio.is_finite().then_some(Self { baseline: law, other: other_law, sizes, ratio })
    }

    /// The ratio at C FLOPs of the other method, whose loss there is that of its fit. `None` if the baseline's fit does not reach it.
    pub fn extrapolate(&self, c: f64) -> Option<f64> {
        flops_ratio(&self.baseline, (c, self.other.loss(c)))
    }
}

/// The 95 % intervals of a [`FlopsComparison`].
#[derive(Debug, Clone, PartialEq)]
pub struct BootstrapIntervals {
    /// `a` of the baseline.
    pub baseline_a: Interval,
    /// `b` of the baseline.
    pub baseline_b: Interval,
    /// `a` of the other method.
    pub other_a: Interval,
    /// `b` of the other method.
    pub other_b: Interval,
    /// The ratio at each size of the other method; `None` where it has one seed, because its own noise is unknown.
    pub sizes: Vec<Option<Interval>>,
    /// The geometric mean of the ratios.
    pub ratio: Interval,
    /// The ratio at [`extrapolated_flops`](Self::extrapolated_flops).
    pub extrapolated: Interval,
    /// Where the ratio is extrapolated, FLOPs.
    pub extrapolated_flops: f64,
    /// FLOPs of the sizes at which a method has one seed, ascending. If there are any, all intervals are too narrow: their noise is
    /// not in them.
    pub one_seed: Vec<f64>,
    /// Resamples without a fit, which are not in the intervals.
    pub skipped: usize,
}

/// Why there are no intervals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BootstrapError {
    /// Each size has one seed.
    #[error("every size has one seed, so the noise between seeds is unknown")]
    OneSeed,
    /// The losses have no fit, or the fit has no ratio.
    #[error("the losses do not follow two power laws that can be compared")]
    NoFit,
    /// Many resamples have no fit.
    #[error("{skipped} of {resamples} resamples of the seeds do not follow two power laws that can be compared")]
    Unstable {
        /// Resamples without a fit.
        skipped: usize,
        /// All resamples.
        resamples: usize,
    },
}

/// Intervals of a comparison by the bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13): within each size
/// and method as many seeds as there are are drawn with replacement, 2,000 times, and both power laws are fitted again. The ends are
/// the 2.5 and 97.5 % quantiles. The same seed gives the same intervals.
///
/// They contain the noise between seeds and nothing else: neither how far the sizes are from a power law (see
/// [`leave_one_size_out`] for that), nor what another data set or another search for the learning rate would change. With n seeds per
/// size they are too narrow by about `sqrt((n - 1) / n)`, a fifth for three seeds, because a resample repeats some of its seeds.
///
/// # Errors
///
/// One seed in each size, losses without a fit, or more than 2.5 % of the resamples without a fit.
pub fn bootstrap(
    baseline: &[SizeRuns],
    other: &[SizeRuns],
    floor: LossFloor,
    extrapolated_flops: f64,
    seed: u64,
) -> Result<BootstrapIntervals, BootstrapError> {
    resample(baseline, other, floor, extrapolated_flops, seed, RESAMPLES)
}

fn resample(
    baseline: &[SizeRuns],
    other: &[SizeRuns],
    floor: LossFloor,
    extrapolated_flops: f64,
    seed: u64,
    resamples: usize,
) -> Result<BootstrapIntervals, BootstrapError> {
    // The numbers that get an interval, in a fixed order: the sizes are last, because there are as many as the other method has.
    let numbers = |comparison: &FlopsComparison| -> Option<Vec<f64>> {
        let FlopsComparison { baseline, other, sizes, ratio } = comparison;
        let extrapolated = comparison.extrapolate(extrapolated_flops)?;
        let first = [baseline.a, baseline.b, other.a, other.b, *ratio, extrapolated];
        Some(first.into_iter().chain(sizes.iter().map(|size| size.ratio)).collect())
    };
    let estimates =
        FlopsComparison::new(baseline, other, floor).as_ref().and_then(numbers).ok_or(BootstrapError::NoFit)?;
    let all = || baseline.iter().chain(other);
    if all().all(|size| size.losses.len() == 1) {
        return Err(BootstrapError::OneSeed);
    }

    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut draw = |sizes: &[SizeRuns]| -> Vec<(f64, f64)> {
        let one = |SizeRuns { flops, losses }: &SizeRuns| {
            let sum: f64 = losses.iter().map(|_| losses[random.random_range(0..losses.len())]).sum();
            (*flops, sum / losses.len() as f64)
        };
        sizes.iter().map(one).collect()
    };
    let mut samples = vec![Vec::with_capacity(resamples); estimates.len()];
    let mut skipped = 0;
    for _ in 0..resamples {
        let (baseline, other) = (draw(baseline), draw(other));
        match FlopsComparison::of_means(&baseline, &other, floor).as_ref().and_then(numbers) {
            Some(numbers) => samples.iter_mut().zip(numbers).for_each(|(sample, number)| sample.push(number)),
            None => skipped += 1,
        }
    }
    if skipped as f64 > MAX_SKIPPED * resamples as f64 {
        return Err(BootstrapError::Unstable { skipped, resamples });
    }

    let tail = (1.0 - CONFIDENCE) / 2.0;
    let mut intervals = estimates.iter().zip(&mut samples).map(|(&estimate, sample)| {
        sample.sort_by(f64::total_cmp);
        Interval { estimate, low: quantile(sample, tail), high: quantile(sample, 1.0 - tail) }
    });
    let mut next = || intervals.next().ok_or(BootstrapError::NoFit);
    let (baseline_a, baseline_b, other_a, other_b) = (next()?, next()?, next()?, next()?);
    let (ratio, extrapolated) = (next()?, next()?);
    let sizes =
        other.iter().zip(intervals).map(|(size, interval)| (size.losses.len() > 1).then_some(interval)).collect();
    let mut one_seed: Vec<f64> = all().filter(|size| size.losses.len() == 1).map(|size| size.flops).collect();
    one_seed.sort_by(f64::total_cmp);
    one_seed.dedup();
    Ok(BootstrapIntervals {
        baseline_a,
        baseline_b,
        other_a,
        other_b,
        sizes,
        ratio,
        extrapolated,
        extrapolated_flops,
        one_seed,
        skipped,
    })
}

/// The quantile of sorted values, interpolated between the two next to it (Hyndman and Fan, definition 7, which numpy uses).
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * position.fract()
}

/// The overall ratio of all sizes, with its lowest and highest value if one size is left out of both methods. It shows whether one
/// size alone makes the result, and is not a 95 % interval.
///
/// `baseline[i]` and `other[i]` are the same size. `None` if the numbers of sizes differ, or if a fit without one of them is `None`.
pub fn leave_one_size_out(baseline: &[SizeRuns], other: &[SizeRuns], floor: LossFloor) -> Option<Interval> {
    if baseline.len() != other.len() {
        return None;
    }
    let estimate = FlopsComparison::new(baseline, other, floor)?.ratio;
    let without = |sizes: &[SizeRuns], index: usize| [&sizes[..index], &sizes[index + 1..]].concat();
    let ratio = |index| FlopsComparison::new(&without(baseline, index), &without(other, index), floor);
    let ratios = (0..baseline.len()).map(|index| Some(ratio(index)?.ratio)).collect::<Option<Vec<_>>>()?;
    let (low, high) = ratios.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v)));
    Some(Interval { estimate, low, high })
}

/// The best learning rate (or another key that is tuned) between the values that were tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TuningMinimum {
    /// The rate with the least loss.
    pub rate: f64,
    /// The loss there.
    pub loss: f64,
}

impl TuningMinimum {
    /// The minimum of the parabola, in `log2(rate)`, through the lowest point `(rate, loss)` and its two neighbors. Losses of the same
    /// rate are averaged, and a non-finite one (a run that diverged) counts as infinite.
    ///
    /// `None` if the lowest point is the first or last, if a neighbor diverged, and if a rate is not positive: then more rates are needed.
    pub fn find(points: &[(f64, f64)]) -> Option<Self> {
        if points.iter().any(|&(rate, _)| !(rate > 0.0 && rate.is_finite())) {
            return None;
        }
        let mut sorted: Vec<(f64, f64)> = points
            .iter()
            .map(|&(rate, loss)| (rate.log2(), if loss.is_finite() { loss } else { f64::INFINITY }))
            .collect();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let averaged: Vec<(f64, f64)> = sorted
            .chunk_by(|a, b| a.0 == b.0)
            .map(|same| (same[0].0, same.iter().map(|point| point.1).sum::<f64>() / same.len() as f64))
            .collect();
        let lowest = (0..averaged.len()).min_by(|&a, &b| averaged[a].1.total_cmp(&averaged[b].1))?;
        let &[(x0, y0), (x1, y1), (x2, y2)] = averaged.get(lowest.checked_sub(1)?..lowest + 2)? else { return None };
        if !(y0.is_finite() && y2.is_finite()) {
            return None;
        }
        // Newton's form: y0 + slope (x - x0) + curvature (x - x0) (x - x1).
        let slope = (y1 - y0) / (x1 - x0);
        let curvature = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0);
        // Three equal losses have no curvature, and each rate is as good.
        let x = if curvature > 0.0 { (x0 + x1 - slope / curvature) / 2.0 } else { x1 };
        Some(Self { rate: x.exp2(), loss: y0 + slope * (x - x0) + curvature * (x - x0) * (x - x1) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Standard normal values (Box and Muller).
    fn normal(random: &mut ChaCha8Rng) -> f64 {
        let [u, v]: [f64; 2] = random.random();
        (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    fn near(value: f64, expected: f64, relative: f64) {
        assert!((value - expected).abs() <= relative * expected.abs(), "{value} instead of {expected}");
    }

    /// Sizes from 1e15 FLOPs on, each four times the one before.
    fn sizes(law: PowerLaw, count: i32, mut losses: impl FnMut(f64) -> Vec<f64>) -> Vec<SizeRuns> {
        let flops = (0..count).map(|size| 1e15 * 4f64.powi(size));
        flops.map(|flops| SizeRuns { flops, losses: losses(law.loss(flops)) }).collect()
    }

    /// A law that needs `share` of the FLOPs of the other for the same loss.
    fn faster(law: PowerLaw, share: f64) -> PowerLaw {
        PowerLaw { a: law.a * share.powf(law.b), ..law }
    }

    const ADAMW: PowerLaw = PowerLaw { a: 20.0, b: 0.05, floor: 0.0 };

    #[test]
    fn the_t_quantiles_are_those_of_the_tables() {
        for (freedom, expected) in [
            (1, 12.706),
            (2, 4.303),
            (3, 3.182),
            (4, 2.776),
            (5, 2.571),
            (9, 2.262),
            (10, 2.228),
            (30, 2.042),
            (100, 1.984),
            (100_000, 1.960),
        ] {
            let value = t_quantile(0.95, freedom);
            assert!((value - expected).abs() <= 0.0005, "{value} instead of {expected} for {freedom}");
        }
        assert!((t_quantile(0.99, 4) - 4.604).abs() <= 0.0005);
    }

    #[test]
    fn the_interval_of_a_mean_is_that_of_students_t() {
        let Interval { estimate, low, high } = mean_interval(&[1.0, 2.0, 3.0]).unwrap();
        near(estimate, 2.0, 1e-12);
        // s = 1, so the half width is 4.3027 / sqrt(3).
        near(high - estimate, 2.484_138, 1e-6);
        near(estimate - low, 2.484_138, 1e-6);
        assert_eq!(mean_interval(&[1.0]), None);
        assert_eq!(mean_interval(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn about_95_percent_of_the_intervals_contain_the_true_mean() {
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let mut inside = 0;
        for _ in 0..500 {
            let values: Vec<f64> = (0..4).map(|_| 3.0 + 0.1 * normal(&mut random)).collect();
            inside += u32::from(mean_interval(&values).unwrap().contains(3.0));
        }
        assert!((450..=495).contains(&inside), "{inside} of 500");
    }

    #[test]
    fn the_difference_of_pairs_does_not_contain_what_pairs_have_in_common() {
        let common = [0.0, 10.0, -20.0, 5.0];
        let noise = [0.01, -0.01, 0.02, 0.0];
        let first: Vec<f64> = common.iter().zip(noise).map(|(common, noise)| common + 1.0 + noise).collect();
        let difference = paired_difference(&first, &common).unwrap();
        near(difference.estimate, 1.005, 1e-9);
        near(difference.half_width(), mean_interval(&noise).unwrap().half_width(), 1e-9);
        assert_eq!(paired_difference(&first, &common[1..]), None);
    }

    #[test]
    fn an_interval_is_displayed_with_two_digits_of_its_half_width() {
        let around = |estimate: f64, half: f64| Interval { estimate, low: estimate - half, high: estimate + half };
        for (interval, expected) in [
            (around(2.28123, 0.0132), "2.281 ± 0.013"),
            (around(2.28123, 0.0996), "2.28 ± 0.10"),
            (around(-0.0004, 0.12), "0.00 ± 0.12"),
            (around(150.4, 12.3), "150 ± 12"),
            (around(4321.0, 123.0), "4321 ± 123"),
            (around(2.5, 0.0), "2.500 ± 0.000"),
            (around(1.234e18, 2e16), "(1.234 ± 0.020)e18"),
            (around(2e-7, 1e-8), "(2.00 ± 0.10)e-7"),
            (Interval { estimate: 1.31, low: 1.22, high: 1.43 }, "1.31 [1.22, 1.43]"),
            (Interval { estimate: 0.5194, low: 0.4871, high: 0.562 }, "0.519 [0.487, 0.562]"),
            (Interval { estimate: 2e18, low: 1e18, high: 5e18 }, "2.0e18 [1.0e18, 5.0e18]"),
        ] {
            assert_eq!(interval.to_string(), expected);
        }
        assert_eq!(format!("{:>15}", around(2.28123, 0.0132)), "  2.281 ± 0.013");
        for odd in [f64::NAN, f64::INFINITY, f64::MAX, 5e-324, 0.0] {
            assert!(!around(odd, odd).to_string().is_empty() && !around(odd, 1.0).to_string().is_empty());
        }
    }

    #[test]
    fn an_exact_power_law_is_found_and_inverted() {
        for floor in [0.0, 1.7] {
            let law = PowerLaw { floor, ..ADAMW };
            let points: Vec<(f64, f64)> = [1e15, 3e15, 2e16, 5e17].into_iter().map(|c| (c, law.loss(c))).collect();
            let found = PowerLaw::fit(&points, floor).unwrap();
            near(found.a, law.a, 1e-9);
            near(found.b, law.b, 1e-9);
            near(found.inverse(law.loss(7e16)).unwrap(), 7e16, 1e-9);
            assert!(found.log_error(&points) < 1e-12);
        }
    }

    #[test]
    fn a_floor_is_found_also_where_it_is_0_or_near_the_losses() {
        for floor in [0.0, 0.3, 1.7, 50.0] {
            let law = PowerLaw { a: 300.0, b: 0.15, floor };
            let points: Vec<(f64, f64)> = (0..6).map(|size| 1e15 * 4f64.powi(size)).map(|c| (c, law.loss(c))).collect();
            let found = PowerLaw::fit_with_floor(&points).unwrap();
            assert!((found.floor - floor).abs() <= 1e-3 * floor.max(1.0), "{found:?} instead of {floor}");
            near(found.a, law.a, 1e-3);
            near(found.b, law.b, 1e-3);
            assert_eq!(PowerLaw::fit_with_floor(&points[..3]), None, "three sizes do not determine a floor");
        }
    }

    #[test]
    fn what_is_no_power_law_has_no_fit() {
        assert_eq!(PowerLaw::fit(&[(1e15, 3.0)], 0.0), None);
        assert_eq!(PowerLaw::fit(&[(1e15, 3.0), (1e15, 2.9)], 0.0), None);
        assert_eq!(PowerLaw::fit(&[(1e15, 3.0), (0.0, 2.9)], 0.0), None);
        assert_eq!(PowerLaw::fit(&[(1e15, 3.0), (1e16, f64::NAN)], 0.0), None);
        assert_eq!(PowerLaw::fit(&[(1e15, 3.0), (1e16, 2.0)], 2.0), None, "a loss at the floor");
        assert_eq!(PowerLaw { floor: 2.0, ..ADAMW }.inverse(2.0), None);
        let rising = PowerLaw::fit(&[(1e15, 3.0), (1e16, 3.5)], 0.0).unwrap();
        assert_eq!(rising.inverse(3.2), None);
    }

    #[test]
    fn a_method_with_half_the_flops_has_a_ratio_of_one_half() {
        let other = faster(ADAMW, 0.519);
        near(flops_ratio(&ADAMW, (3e17, other.loss(3e17))).unwrap(), 0.519, 1e-9);
        let [baseline, other] = [ADAMW, other].map(|law| sizes(law, 5, |loss| vec![loss - 0.01, loss + 0.01]));
        let comparison = FlopsComparison::new(&baseline, &other, LossFloor::Known(0.0)).unwrap();
        near(comparison.ratio, 0.519, 1e-9);
        near(comparison.extrapolate(1e22).unwrap(), 0.519, 1e-9);
        assert!(comparison.sizes.iter().all(|size| (size.ratio - 0.519).abs() < 1e-9));
    }

    #[test]
    fn about_95_percent_of_the_bootstrap_intervals_contain_the_true_ratio() {
        let mut random = ChaCha8Rng::seed_from_u64(11);
        let mut inside = [0; 3];
        for set in 0..500 {
            // With 16 seeds the intervals are too narrow by 3 %.
            let mut noisy = |loss: f64| (0..16).map(|_| loss + 0.02 * normal(&mut random)).collect();
            let (baseline, other) = (sizes(ADAMW, 4, &mut noisy), sizes(faster(ADAMW, 0.6), 4, &mut noisy));
            let found = resample(&baseline, &other, LossFloor::Known(0.0), 1e20, set, 400).unwrap();
            let size = found.sizes[1].unwrap();
            let contained = [found.ratio.contains(0.6), found.extrapolated.contains(0.6), size.contains(0.6)];
            inside.iter_mut().zip(contained).for_each(|(count, contained)| *count += u32::from(contained));
            assert!(found.one_seed.is_empty() && found.skipped == 0);
        }
        assert!(inside.iter().all(|count| (450..=495).contains(count)), "{inside:?} of 500");
    }

    #[test]
    fn the_same_seed_gives_the_same_intervals() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut noisy = |loss: f64| (0..3).map(|_| loss + 0.01 * normal(&mut random)).collect();
        let (baseline, other) = (sizes(ADAMW, 4, &mut noisy), sizes(faster(ADAMW, 0.6), 4, &mut noisy));
        let intervals = |seed| bootstrap(&baseline, &other, LossFloor::Known(0.0), 1e20, seed).unwrap();
        assert_eq!(intervals(1), intervals(1));
        assert_ne!(intervals(1), intervals(2));
        let BootstrapIntervals { baseline_a, baseline_b, other_a, other_b, ratio, .. } = intervals(1);
        for interval in [baseline_a, baseline_b, other_a, other_b, ratio] {
            assert!(interval.low < interval.estimate && interval.estimate < interval.high, "{interval}");
        }
    }

    #[test]
    fn a_size_with_one_seed_is_listed_and_has_no_interval() {
        let [mut baseline, mut other] = [ADAMW, faster(ADAMW, 0.6)].map(|law| sizes(law, 4, |l| vec![l, l + 0.01]));
        baseline[3].losses.truncate(1);
        other[0].losses.truncate(1);
        other[3].losses.truncate(1);
        let found = bootstrap(&baseline, &other, LossFloor::Known(0.0), 1e20, 0).unwrap();
        assert_eq!(found.one_seed, [1e15, 6.4e16]);
        assert_eq!(found.sizes.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true, true, false]);
        baseline.iter_mut().chain(&mut other).for_each(|size| size.losses.truncate(1));
        let error = bootstrap(&baseline, &other, LossFloor::Known(0.0), 1e20, 0).unwrap_err();
        assert_eq!(error, BootstrapError::OneSeed);
    }

    #[test]
    fn resamples_without_a_fit_are_an_error() {
        let [baseline, other] = [ADAMW, faster(ADAMW, 0.6)].map(|law| sizes(law, 3, |loss| vec![loss, loss * 2.0]));
        let error = bootstrap(&baseline, &other, LossFloor::Known(0.0), 1e20, 0).unwrap_err();
        assert!(matches!(error, BootstrapError::Unstable { skipped: 51.., resamples: 2000 }), "{error:?}");
        let floor = LossFloor::Known(100.0);
        assert_eq!(bootstrap(&baseline, &other, floor, 1e20, 0), Err(BootstrapError::NoFit));
        assert_eq!(bootstrap(&[], &[], LossFloor::Fitted, 1e20, 0), Err(BootstrapError::NoFit));
    }

    #[test]
    fn a_fitted_floor_is_compared_too() {
        let law = PowerLaw { a: 3000.0, b: 0.2, floor: 1.5 };
        let [baseline, other] = [law, faster(law, 0.6)].map(|law| sizes(law, 6, |l| vec![l * 0.9999, l * 1.0001]));
        let found = bootstrap(&baseline, &other, LossFloor::Fitted, 1e19, 0).unwrap();
        near(found.ratio.estimate, 0.6, 1e-3);
        assert!(found.ratio.contains(0.6) && found.ratio.half_width() < 0.01, "{}", found.ratio);
    }

    #[test]
    fn leaving_out_a_size_shows_if_it_alone_makes_the_ratio() {
        let [baseline, mut other] = [ADAMW, faster(ADAMW, 0.6)].map(|law| sizes(law, 5, |loss| vec![loss]));
        let exact = leave_one_size_out(&baseline, &other, LossFloor::Known(0.0)).unwrap();
        near(exact.low, 0.6, 1e-9);
        near(exact.high, 0.6, 1e-9);
        other[2].losses[0] *= 0.97;
        let one = leave_one_size_out(&baseline, &other, LossFloor::Known(0.0)).unwrap();
        assert!(one.estimate < 0.55, "{one}");
        near(one.high, 0.6, 1e-9);
        assert_eq!(leave_one_size_out(&baseline, &other[1..], LossFloor::Known(0.0)), None);
        assert_eq!(leave_one_size_out(&baseline[..2], &other[..2], LossFloor::Known(0.0)), None);
    }

    #[test]
    fn the_minimum_of_a_tuning_curve_is_between_the_rates() {
        let loss = |rate: f64| 2.0 + 0.05 * (rate / 3e-4).log2().powi(2);
        let points: Vec<(f64, f64)> =
            [1e-3, 1e-4, 2e-4, 5e-4, 2e-3].into_iter().map(|rate| (rate, loss(rate))).collect();
        let found = TuningMinimum::find(&points).unwrap();
        near(found.rate, 3e-4, 1e-9);
        near(found.loss, 2.0, 1e-9);
        // Two seeds of each rate have the minimum of their means.
        let seeds: Vec<(f64, f64)> =
            points.iter().flat_map(|&(rate, loss)| [(rate, loss - 0.1), (rate, loss + 0.1)]).collect();
        near(TuningMinimum::find(&seeds).unwrap().rate, 3e-4, 1e-9);
        assert_eq!(
            TuningMinimum::find(&[(1.0, 2.0), (2.0, 2.0), (4.0, 2.0)]),
            None,
            "the first of equal losses is an edge"
        );
    }

    #[test]
    fn a_tuning_curve_has_no_minimum_at_its_edge() {
        assert_eq!(TuningMinimum::find(&[(1.0, 3.0), (2.0, 2.0), (4.0, 1.0)]), None);
        assert_eq!(TuningMinimum::find(&[(1.0, 1.0), (2.0, 2.0), (4.0, 3.0)]), None);
        assert_eq!(TuningMinimum::find(&[(1.0, 2.0), (2.0, 1.0), (4.0, f64::NAN)]), None, "the neighbor diverged");
        assert_eq!(TuningMinimum::find(&[(0.0, 2.0), (2.0, 1.0), (4.0, 2.0)]), None);
        assert_eq!(TuningMinimum::find(&[(1.0, 2.0)]), None);
        assert_eq!(TuningMinimum::find(&[]), None);
    }
}
