//! The polynomials of the Newton-Schulz iteration: tables of coefficients, each with its source.

use serde::{Deserialize, Serialize};

/// The quintic polynomial of Keller Jordan and of the report, the same in every step.
///
/// Source: <https://kellerjordan.github.io/posts/muon/>; "Muon is Scalable for LLM Training" (arXiv 2502.16982), 2.1.
pub const REPORT: [[f64; 3]; 1] = [[3.4445, -4.7750, 2.0315]];

/// Five different steps, found by optimization (You Jiacheng, `train_gpt_medium.py` of modded-nanogpt; also the
/// default of microsoft/dion and the set "quintic" of NVIDIA's Emerging-Optimizers).
///
/// Source: <https://leloykun.github.io/ponder/muon-opt-coeffs/>.
pub const QUINTIC: [[f64; 3]; 5] = [
    [4.0848, -6.8946, 2.9270],
    [3.9505, -6.3029, 2.6377],
    [3.7418, -5.5913, 2.3037],
    [2.8769, -3.1427, 1.2046],
    [2.8366, -3.0525, 1.2012],
];

/// The minimax polynomials of "The Polar Express" (arXiv 2505.16932), Algorithm 1, as printed there: before the
/// paper's safety factor, which [`Coefficients::step`] applies.
pub const POLAR_EXPRESS: [[f64; 3]; 8] = [
    [8.28721201814563, -23.595886519098837, 17.300387312530933],
    [4.107059111542203, -2.9478499167379106, 0.5448431082926601],
    [3.9486908534822946, -2.908902115962949, 0.5518191394370137],
    [3.3184196573706015, -2.488488024314874, 0.51004894012372],
    [2.300652019954817, -1.6689039845747493, 0.4188073119525673],
    [1.891301407787398, -1.2679958271945868, 0.37680408948524835],
    [1.8750014808534479, -1.2500016453999487, 0.3750001645474248],
    [1.875, -1.25, 0.375],
];

/// The safety factor of "The Polar Express", 3.4 and Algorithm 1: every polynomial except the last is evaluated at `x / 1.01`, so
/// that rounding cannot push a singular value out of the interval that the polynomial was made for.
pub const POLAR_EXPRESS_SAFETY: f64 = 1.01;

/// The composition of "Accelerating Newton-Schulz Iteration for Orthogonalization via Chebyshev-type Polynomials" (CANS,
/// arXiv 2506.10935): Remez polynomials on intervals that adapt to the step before.
///
/// Source: the set "cans" of NVIDIA's Emerging-Optimizers (`muon_utils.py`), made with the paper's `polynomials.py`. It has no
/// safety factor and is steepest at 1, the singular value of a normalized matrix of rank one. Such a matrix has an error of
/// 4e-3 to 1e-2 in f32, here and in PyTorch: the slope there, 4.9e4, times the rounding of the norm.
pub const CANS: [[f64; 3]; 5] = [
    [8.4703, -25.1081, 18.6293],
    [4.1828, -3.1087, 0.5806],
    [3.9619, -2.9541, 0.5630],
    [3.2866, -2.4647, 0.5074],
    [2.2737, -1.6447, 0.4162],
];

/// Four steps for a matrix that is preconditioned as in "Turbo-Muon" (arXiv 2512.04632), by the rescaling of "Almost-Orthogonal
/// Layers" (arXiv 2208.03160): see [`Preconditioning::Aol`].
///
/// Source: <https://github.com/thib-s/flash-newton-schulz>, as in `newton_schulz_triton_fast` of microsoft/dion. The older
/// table of the same name in NVIDIA's Emerging-Optimizers begins with 4.0098, -7.0585, 2.4635, which takes a singular
/// value of 1 to -0.585. AOL brings the singular value of a rank-one matrix to exactly 1, so that its update would point uphill.
/// This table is positive on all of (0, 1].
pub const AOL: [[f64; 3]; 4] =
    [[4.6051, -9.6552, 5.6769], [4.7505, -6.0861, 2.1790], [2.7763, -2.3190, 0.5523], [2.4231, -2.2861, 0.8193]];

/// The ten steps of DeepSeek-V4: eight of Jordan's quintic, which raise small singular values fast, then two of
/// `2 x - 1.5 x^3 + 0.5 x^5`, which converge to 1.
///
/// Source: the DeepSeek-V4 report (`DeepSeek_V4.pdf` of deepseek-ai/DeepSeek-V4-Pro), by the set "deepseekv4" of NVIDIA's
/// Emerging-Optimizers (`muon_utils.py`).
pub const DEEPSEEK_V4: [[f64; 3]; 10] = [
    REPORT[0],
    REPORT[0],
    REPORT[0],
    REPORT[0],
    REPORT[0],
    REPORT[0],
    REPORT[0],
    REPORT[0],
    [2.0, -1.5, 0.5],
    [2.0, -1.5, 0.5],
];

/// The scaling of a matrix before the first step. It makes the largest singular value at most 1, where the polynomials converge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Preconditioning {
    /// `X <- X / ||X||`, by the Frobenius norm.
    #[default]
    Frobenius,
    /// `X <- S X` with `S = diag(1 / sqrt(sum_j |X X^T|_ij))`, on the shorter side: the rescaling of "Almost-Orthogonal Layers".
    /// `S X` is closer to orthogonal than `X / ||X||`, which saves a step, but its singular vectors differ a little from those
    /// of `X`: the result is near the orthogonal factor of `S X`.
    Aol,
}

/// Which odd polynomial `p(x) = a x + b x^3 + c x^5` each Newton-Schulz step applies to the singular values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Coefficients {
    /// [`REPORT`]: 3.4445, -4.7750, 2.0315 in every step. After five steps the singular values are between about 0.7
    /// and 1.2, not 1; the report found ten steps more exact and no better.
    #[default]
    Report,
    /// [`QUINTIC`]: five different steps; further steps repeat the last one.
    Quintic,
    /// [`POLAR_EXPRESS`] with its safety factor: converges to 1; further steps repeat the last polynomial.
    PolarExpress,
    /// [`CANS`]: five steps to within 12 % of 1, for singular values from 1e-3 up; further steps repeat the last one.
    Cans,
    /// [`AOL`] after [`Preconditioning::Aol`]: four steps to within 6 % of 1; further steps repeat the last one.
    Aol,
    /// [`DEEPSEEK_V4`]: ten steps; further steps repeat the last one.
    DeepseekV4,
    /// A triple `[a, b, c]` for each step; further steps repeat the last one. Empty means no steps.
    Custom(Vec<[f64; 3]>),
}

impl Coefficients {
    /// `[a, b, c]` of step `index` (from 0), or `None` for an empty [`Coefficients::Custom`].
    pub fn step(&self, index: usize) -> Option<[f64; 3]> {
        let table: &[[f64; 3]] = match self {
            Coefficients::Report => &REPORT,
            Coefficients::Quintic => &QUINTIC,
            Coefficients::PolarExpress => &POLAR_EXPRESS,
            Coefficients::Cans => &CANS,
            Coefficients::Aol => &AOL,
            Coefficients::DeepseekV4 => &DEEPSEEK_V4,
            Coefficients::Custom(table) => table,
        };
        let last = table.len().checked_sub(1)?;
        let [a, b, c] = table[index.min(last)];
        if matches!(self, Coefficients::PolarExpress) && index < last {
            let safety = POLAR_EXPRESS_SAFETY;
            return Some([a / safety, b / safety.powi(3), c / safety.powi(5)]);
        }
        Some([a, b, c])
    }

    /// The number of steps in the source: 4 for AOL, 10 for DeepSeek-V4, one for each triple of custom ones, 5 otherwise.
    pub fn default_steps(&self) -> usize {
        match self {
            Coefficients::Report | Coefficients::Quintic | Coefficients::PolarExpress | Coefficients::Cans => 5,
            Coefficients::Aol => AOL.len(),
            Coefficients::DeepseekV4 => DEEPSEEK_V4.len(),
            Coefficients::Custom(table) => table.len(),
        }
    }

    /// The scaling that the polynomials need before the first step.
    pub fn preconditioning(&self) -> Preconditioning {
        match self {
            Coefficients::Aol => Preconditioning::Aol,
            _ => Preconditioning::Frobenius,
        }
    }

    /// The triples `[a, b, c]` of the first `steps` steps.
    pub fn schedule(&self, steps: usize) -> Vec<[f64; 3]> {
        (0..steps).map_while(|index| self.step(index)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(coefficients: &Coefficients, steps: usize, mut x: f64) -> f64 {
        for [a, b, c] in coefficients.schedule(steps) {
            x = a * x + b * x.powi(3) + c * x.powi(5);
        }
        x
    }

    #[test]
    fn five_report_steps_bring_singular_values_near_one() {
        for hundredth in 2..=100 {
            let x = after(&Coefficients::Report, 5, f64::from(hundredth) / 100.0);
            assert!((0.67..1.21).contains(&x), "{hundredth}: {x}");
        }
    }

    #[test]
    fn polar_express_converges_where_the_report_oscillates() {
        for thousandth in [1, 10, 100, 500, 1000] {
            let x = after(&Coefficients::PolarExpress, 10, f64::from(thousandth) / 1000.0);
            assert!((x - 1.0).abs() < 1e-9, "{thousandth}: {x}");
        }
    }

    #[test]
    fn every_table_brings_singular_values_as_near_to_one_as_documented() {
        let range = |coefficients: &Coefficients, lowest: f64| {
            (0..=1000).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), thousandth| {
                let start = lowest + (1.0 - lowest) * f64::from(thousandth) / 1000.0;
                let x = after(coefficients, coefficients.default_steps(), start);
                (low.min(x), high.max(x))
            })
        };
        let cases = [
            (Coefficients::Cans, 1e-3, 0.88, 1.12),
            // AOL leaves singular values several times larger than division by the Frobenius norm does.
            (Coefficients::Aol, 1e-2, 0.94, 1.06),
            (Coefficients::DeepseekV4, 1e-3, 0.9, 1.05),
            (Coefficients::Quintic, 5e-3, 0.7, 1.25),
        ];
        for (coefficients, lowest, low, high) in cases {
            let (lowest, highest) = range(&coefficients, lowest);
            assert!(lowest > low && highest < high, "{coefficients:?}: {lowest} to {highest}");
        }
    }

    #[test]
    fn only_aol_has_its_own_preconditioning() {
        assert_eq!(Coefficients::Aol.preconditioning(), Preconditioning::Aol);
        assert_eq!(Coefficients::DeepseekV4.preconditioning(), Preconditioning::Frobenius);
        assert_eq!(
            Coefficients::DeepseekV4.schedule(12)[7..],
            [REPORT[0], [2.0, -1.5, 0.5], [2.0, -1.5, 0.5], [2.0, -1.5, 0.5], [2.0, -1.5, 0.5]]
        );
    }

    #[test]
    fn the_safety_factor_scales_the_argument_of_all_polynomials_except_the_last() {
        // The values of pytorch-image-models' table for the same safety factor (timm/optim/muon.py, "polar_express").
        let [a, b, c] = Coefficients::PolarExpress.step(0).unwrap();
        assert!((a - 8.28721201814563 / 1.01).abs() < 1e-15);
        assert!((b + 23.595886519098837 / 1.030301).abs() < 1e-12);
        assert!((c - 17.300387312530933 / 1.0510100501).abs() < 1e-12);
        assert_eq!(Coefficients::PolarExpress.step(7), Some([1.875, -1.25, 0.375]));
        assert_eq!(Coefficients::PolarExpress.step(20), Some([1.875, -1.25, 0.375]));
    }

    #[test]
    fn the_last_triple_repeats_and_an_empty_table_has_none() {
        let custom = Coefficients::Custom(vec![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        assert_eq!(custom.schedule(3), vec![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [4.0, 5.0, 6.0]]);
        assert!(Coefficients::Custom(Vec::new()).schedule(5).is_empty());
    }
}
