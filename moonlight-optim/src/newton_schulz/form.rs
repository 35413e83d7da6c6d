//! The direct and the Gram form of Newton-Schulz, and the cost of each.
//!
//! Let `n` be the shorter side of a matrix and `m` the longer one. A step of the direct form computes the Gram matrix, its
//! square, and the product of `X` with a polynomial in the Gram matrix. The Gram form ("Gram Newton-Schulz",
//! <https://github.com/Dao-AILab/gram-newton-schulz>) iterates on the `n` by `n` Gram matrix alone and multiplies `X` once, at
//! the end. The larger `m / n` is, the more it saves. The price is precision: the Gram matrix squares the singular values, and
//! its rounding errors grow with every step. A restart recomputes it from `X` before they matter.

use std::ops::Range;

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

/// How the iteration is computed. The forms give the same result up to rounding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NewtonSchulzForm {
    /// The cheaper one for each shape. The Gram form restarts as often as the precision of the products requires; in half
    /// precision that is at every step, so it is always the direct form there.
    #[default]
    Auto,
    /// Every step multiplies `X`: the smallest rounding error.
    Direct,
    /// Steps on the Gram matrix, which is recomputed from `X` at the steps named.
    Gram {
        /// Steps (from 0) before which the Gram matrix is recomputed. The authors use `[2]` for five steps in f16.
        restarts: Vec<usize>,
    },
}

/// How far rounding errors in the Gram matrix may grow, relative to its norm, before the Gram form restarts.
///
/// Chosen by measurement: five steps in f32 against f64 on 300 matrices of [12, 18]. The largest errors were, with the
/// coefficients of the report, the quintic and Polar Express:
///
/// | | report | quintic | Polar Express |
/// |---|---|---|---|
/// | direct form | 1e-6 | 7e-7 | 5e-6 |
/// | this limit: a restart at least before every second step | 2.5e-6 | 3e-6 | 1e-5 |
/// | one restart in five steps | 1.6e-5 | 9e-5 | 1.3e-4 |
///
/// Without restarts the error is up to 2e-3, and ten steps overflow.
const LARGEST_GROWTH: f64 = 1.2e-6;

/// The unit roundoff of a dtype.
fn roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2_f64.powi(-53),
        DType::BF16 => 2_f64.powi(-8),
        DType::F16 => 2_f64.powi(-11),
        _ => 2_f64.powi(-24),
    }
}

/// Groups the steps between restarts of the Gram form: each group is as long as the rounding error allows. A step takes a small
/// eigenvalue `r` of the Gram matrix to about `a^2 r`, and its error grows by the same factor.
fn segments(schedule: &[[f64; 3]], dtype: DType) -> Vec<Range<usize>> {
    let mut segments = Vec::new();
    let mut start = 0;
    let mut growth = roundoff(dtype);
    for (index, [a, _, _]) in schedule.iter().enumerate() {
        // The Gram matrix that this step would leave for the next one has an error of `growth`.
        growth *= a * a;
        if growth > LARGEST_GROWTH || index + 1 == schedule.len() {
            segments.push(start..index + 1);
            start = index + 1;
            growth = roundoff(dtype);
        }
    }
    segments
}

/// One segment per step, which is the direct form.
fn direct(steps: usize) -> Vec<Range<usize>> {
    (0..steps).map(|step| step..step + 1).collect()
}

/// Groups the steps into segments that share a Gram matrix. A segment of one step is a step of the direct form.
pub(crate) fn plan(
    form: &NewtonSchulzForm,
    schedule: &[[f64; 3]],
    dtype: DType,
    rows: usize,
    columns: usize,
    symmetric: bool,
) -> Vec<Range<usize>> {
    let steps = schedule.len();
    match form {
        NewtonSchulzForm::Direct => direct(steps),
        NewtonSchulzForm::Gram { restarts } => {
            let mut bounds: Vec<usize> = restarts.iter().copied().filter(|step| (1..steps).contains(step)).collect();
            bounds.extend([0, steps]);
            bounds.sort_unstable();
            bounds.dedup();
            bounds.windows(2).map(|pair| pair[0]..pair[1]).collect()
        }
        NewtonSchulzForm::Auto => {
            let gram = segments(schedule, dtype);
            let direct = direct(steps);
            let cost = |plan: &[Range<usize>]| plan_flops(plan, rows, columns, symmetric);
            if cost(&gram) < MARGIN * cost(&direct) { gram } else { direct }
        }
    }
}

/// `Auto` takes the Gram form if its FLOPs are below this share of the direct form's. Its products are smaller and run at a
/// lower rate, so that equal FLOPs take longer.
const MARGIN: f64 = 0.95;

/// The FLOPs of a plan for one matrix.
///
/// A segment of `k` steps computes a Gram matrix, `k` squares, `k - 1` products to accumulate the polynomial, `2 (k - 1)` to
/// update the Gram matrix, and one product with `X`. All except the last have a symmetric result. A kernel that computes only
/// half of such a result (`symmetric`) needs half of the operations.
pub(crate) fn plan_flops(plan: &[Range<usize>], rows: usize, columns: usize, symmetric: bool) -> f64 {
    let (n, m) = (rows.min(columns) as f64, rows.max(columns) as f64);
    let factor = if symmetric { 1.0 } else { 2.0 };
    let segment = |steps: f64| {
        let square_products = steps + 3.0 * (steps - 1.0);
        factor * n * n * m + factor * square_products * n * n * n + 2.0 * n * n * m
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
    fn steeper_polynomials_restart_more_often() {
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
        let plan = |rows, columns| lengths(&plan(&NewtonSchulzForm::Auto, &schedule, DType::F32, rows, columns, true));
        assert_eq!(plan(512, 512), [1; 5]);
        assert_eq!(plan(1408, 1536), [1; 5]);
        assert_eq!(plan(2048, 1408), [2, 2, 1]);
        assert_eq!(plan(512, 4096), [2, 2, 1]);
        assert_eq!(plan(4096, 512), [2, 2, 1]);
    }

    #[test]
    fn flops_follow_the_formula() {
        let schedule = Coefficients::Report.schedule(5);
        let (n, m) = (100.0_f64, 400.0_f64);
        let whole = |form: NewtonSchulzForm, symmetric| {
            plan_flops(&plan(&form, &schedule, DType::F32, 100, 400, symmetric), 100, 400, symmetric)
        };
        // PyTorch's products: 2 n^2 m + 2 n^3 + 2 n^2 m a step.
        assert_eq!(whole(NewtonSchulzForm::Direct, false), 5.0 * (4.0 * n * n * m + 2.0 * n.powi(3)));
        assert_eq!(whole(NewtonSchulzForm::Direct, true), 5.0 * (3.0 * n * n * m + n.powi(3)));
        assert_eq!(whole(NewtonSchulzForm::Gram { restarts: vec![] }, true), 3.0 * n * n * m + 17.0 * n.powi(3));
        assert_eq!(whole(NewtonSchulzForm::Gram { restarts: vec![3] }, true), 6.0 * n * n * m + 14.0 * n.powi(3));
    }

    #[test]
    fn restarts_out_of_range_or_order_are_ignored_or_sorted() {
        let schedule = Coefficients::Report.schedule(5);
        let plan = plan(&NewtonSchulzForm::Gram { restarts: vec![4, 0, 2, 9, 2] }, &schedule, DType::F32, 3, 9, true);
        assert_eq!(plan, vec![0..2, 2..4, 4..5]);
    }
}
