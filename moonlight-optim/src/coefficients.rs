//! The polynomials of the Newton-Schulz iteration, each table with its source.

use serde::{Deserialize, Serialize};

/// The quintic of Keller Jordan and of the report, the same in every step.
///
/// Source: <https://kellerjordan.github.io/posts/muon/>; "Muon is Scalable for LLM Training" (arXiv 2502.16982), 2.1.
pub const REPORT: [[f64; 3]; 1] = [[3.4445, -4.7750, 2.0315]];

/// Five different steps found by optimisation (You Jiacheng, `train_gpt_medium.py` of modded-nanogpt; also the
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

/// The safety factor of "The Polar Express", 3.4 and Algorithm 1: every polynomial but the last is read at
/// `x / 1.01`, so that rounding cannot push a singular value out of the interval that the polynomial was made for.
pub const POLAR_EXPRESS_SAFETY: f64 = 1.01;

/// Which odd polynomial `p(x) = a x + b x^3 + c x^5` each Newton-Schulz step applies to the singular values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Coefficients {
    /// [`REPORT`]: 3.4445, -4.7750, 2.0315 in every step. After five steps the singular values lie between about 0.7
    /// and 1.2, not at 1; the report found ten steps more exact and no better.
    #[default]
    Report,
    /// [`QUINTIC`]: five different steps, the last one repeated if more are asked for.
    Quintic,
    /// [`POLAR_EXPRESS`] with its safety factor: converges to 1, the last polynomial repeated.
    PolarExpress,
    /// One triple `[a, b, c]` a step, the last one repeated if there are more steps than triples. Empty means no
    /// step at all.
    Custom(Vec<[f64; 3]>),
}

impl Coefficients {
    /// `[a, b, c]` of step `index` (from 0), or `None` for an empty [`Coefficients::Custom`].
    pub fn step(&self, index: usize) -> Option<[f64; 3]> {
        let table: &[[f64; 3]] = match self {
            Coefficients::Report => &REPORT,
            Coefficients::Quintic => &QUINTIC,
            Coefficients::PolarExpress => &POLAR_EXPRESS,
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

    /// The triples of the first `steps` steps.
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
    fn the_safety_factor_scales_the_argument_of_all_but_the_last_polynomial() {
        // The figures of pytorch-image-models' table for the same safety (timm/optim/muon.py, "polar_express").
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
