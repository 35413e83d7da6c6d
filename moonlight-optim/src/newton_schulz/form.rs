//! Which form Newton-Schulz takes for a shape, and what each costs.
//!
//! With `n` the shorter side of a matrix and `m` the longer one, a step of the direct form takes a Gram matrix, its
//! square, and the product of a polynomial of it with `X`. The Gram form ("Gram Newton-Schulz",
//! <https://github.com/Dao-AILab/gram-newton-schulz>) iterates on the `n` by `n` Gram matrix alone and multiplies `X` once,
//! at the end: cheaper for every matrix that is not square, the more so the longer it is. What it pays with is precision:
//! the Gram matrix has the squares of the singular values, and rounding in it grows with every step. So it restarts from
//! a fresh Gram matrix before that matters.

use std::ops::Range;

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

/// How the iteration is carried out; the result is the same but for rounding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Form {
    /// The Gram form where it costs less, restarted as often as the type of the products demands, else the direct one. In
    /// half precision that is always the direct form: the Gram form would have to restart after every step, which is the
    /// direct form.
    #[default]
    Auto,
    /// Every step multiplies `X`.
    Direct,
    /// Steps on the Gram matrix, with a fresh start before each step of this index (from 0).
    Gram {
        /// Indices of steps, ascending; `[2]` is what the method's authors take for five steps in f16.
        restarts: Vec<usize>,
    },
}

/// How far rounding in the Gram matrix may grow, relative to its norm, before the Gram form restarts.
///
/// Chosen by measurement, for five steps in f32 against f64 on 300 matrices of [12, 18]. The largest error of the direct form
/// is 1e-6 with the report's coefficients, 7e-7 with the quintic, 5e-6 with Polar Express. Restarts by this limit, before
/// every second step or sooner, make it 2.5e-6, 3e-6 and 1e-5. One restart for five steps would make it 1.6e-5, 9e-5 and
/// 1.3e-4, none up to 2e-3, and ten steps without restart overflow.
const LARGEST_GROWTH: f64 = 1.2e-6;

/// The unit roundoff of a type.
fn roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2_f64.powi(-53),
        DType::BF16 => 2_f64.powi(-8),
        DType::F16 => 2_f64.powi(-11),
        _ => 2_f64.powi(-24),
    }
}

/// The steps of the Gram form between restarts: as long as rounding allows. A small eigenvalue `r` of the Gram matrix
/// becomes `a^2 r` in a step, and what is wrong with it grows alike.
fn segments(schedule: &[[f64; 3]], dtype: DType) -> Vec<Range<usize>> {
    let mut segments = Vec::new();
    let mut start = 0;
    let mut growth = roundoff(dtype);
    for (index, [a, _, _]) in schedule.iter().enumerate() {
        // Whether the step after this one may still use the Gram matrix that this one leaves.
        growth *= a * a;
        if growth > LARGEST_GROWTH || index + 1 == schedule.len() {
            segments.push(start..index + 1);
            start = index + 1;
            growth = roundoff(dtype);
        }
    }
    segments
}

fn direct(steps: usize) -> Vec<Range<usize>> {
    (0..steps).map(|step| step..step + 1).collect()
}

/// The steps that share a Gram matrix. A segment of one step is a step of the direct form.
pub(crate) fn plan(
    form: &Form,
    schedule: &[[f64; 3]],
    dtype: DType,
    rows: usize,
    columns: usize,
    symmetric: bool,
) -> Vec<Range<usize>> {
    let steps = schedule.len();
    match form {
        Form::Direct => direct(steps),
        Form::Gram { restarts } => {
            let mut bounds: Vec<usize> = restarts.iter().copied().filter(|step| (1..steps).contains(step)).collect();
            bounds.extend([0, steps]);
            bounds.sort_unstable();
            bounds.dedup();
            bounds.windows(2).map(|pair| pair[0]..pair[1]).collect()
        }
        Form::Auto => {
            let gram = segments(schedule, dtype);
            let direct = direct(steps);
            let cost = |plan: &[Range<usize>]| plan_flops(plan, rows, columns, symmetric);
            if cost(&gram) < MARGIN * cost(&direct) { gram } else { direct }
        }
    }
}

/// The Gram form is more, smaller products: it must save this much before it is quicker, too.
const MARGIN: f64 = 0.95;

/// Floating point operations of a plan for one matrix.
///
/// A segment of `k` steps takes a Gram matrix, `k` squares, `k - 1` products to gather the polynomial, `2 (k - 1)` to
/// carry the Gram matrix on, and one product with `X`. All but the last are symmetric, and a kernel that computes half of
/// a symmetric result (`symmetric`) does them in half of the operations.
pub(crate) fn plan_flops(plan: &[Range<usize>], rows: usize, columns: usize, symmetric: bool) -> f64 {
    let (n, m) = (rows.min(columns) as f64, rows.max(columns) as f64);
    let share = if symmetric { 1.0 } else { 2.0 };
    let segment = |steps: f64| {
        let squares = steps + 3.0 * (steps - 1.0);
        share * n * n * m + share * squares * n * n * n + 2.0 * n * n * m
    };
    plan.iter().map(|steps| segment(steps.len() as f64)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Coefficients;

    fn lengths(plan: &[Range<usize>]) -> Vec<usize> {
        plan.iter().map(Range::len).collect()
    }

    #[test]
    fn steeper_polynomials_restart_sooner() {
        let cases: [(Coefficients, &[usize]); 5] = [
            (Coefficients::Report, &[2, 2, 1]),
            (Coefficients::Quintic, &[2, 2, 1]),
            (Coefficients::PolarExpress, &[1, 2, 2]),
            (Coefficients::Cans, &[1, 2, 2]),
            (Coefficients::DeepseekV4, &[2, 2, 2, 2, 2]),
        ];
        for (coefficients, expected) in cases {
            let schedule = coefficients.schedule(coefficients.default_steps());
            assert_eq!(lengths(&segments(&schedule, DType::F32)), expected, "{coefficients:?}");
        }
        assert_eq!(lengths(&segments(&Coefficients::Report.schedule(5), DType::F64)), [5]);
        assert!(segments(&[], DType::F32).is_empty());
    }

    #[test]
    fn half_precision_would_restart_after_every_step() {
        for dtype in [DType::BF16, DType::F16] {
            assert_eq!(segments(&Coefficients::Report.schedule(5), dtype), direct(5));
        }
    }

    #[test]
    fn the_form_is_the_cheaper_one() {
        let schedule = Coefficients::Report.schedule(5);
        let plan = |rows, columns| lengths(&plan(&Form::Auto, &schedule, DType::F32, rows, columns, true));
        assert_eq!(plan(512, 512), [1; 5]);
        assert_eq!(plan(1408, 1536), [1; 5]);
        assert_eq!(plan(2048, 1408), [2, 2, 1]);
        assert_eq!(plan(512, 4096), [2, 2, 1]);
        assert_eq!(plan(4096, 512), [2, 2, 1]);
    }

    #[test]
    fn operations_are_those_of_the_formula() {
        let schedule = Coefficients::Report.schedule(5);
        let (n, m) = (100.0_f64, 400.0_f64);
        let whole = |form: Form, symmetric| {
            plan_flops(&plan(&form, &schedule, DType::F32, 100, 400, symmetric), 100, 400, symmetric)
        };
        // 2 n^2 m + 2 n^3 + 2 n^2 m a step, as PyTorch computes it.
        assert_eq!(whole(Form::Direct, false), 5.0 * (4.0 * n * n * m + 2.0 * n.powi(3)));
        assert_eq!(whole(Form::Direct, true), 5.0 * (3.0 * n * n * m + n.powi(3)));
        assert_eq!(whole(Form::Gram { restarts: vec![] }, true), 3.0 * n * n * m + 17.0 * n.powi(3));
        assert_eq!(whole(Form::Gram { restarts: vec![3] }, true), 6.0 * n * n * m + 14.0 * n.powi(3));
    }

    #[test]
    fn restarts_out_of_range_or_out_of_order_do_no_harm() {
        let schedule = Coefficients::Report.schedule(5);
        let plan = plan(&Form::Gram { restarts: vec![4, 0, 2, 9, 2] }, &schedule, DType::F32, 3, 9, true);
        assert_eq!(plan, vec![0..2, 2..4, 4..5]);
    }
}
