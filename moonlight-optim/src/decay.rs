//! Weight decay: its schedule, its coupling to the learning rate, and cautious decay.

use serde::{Deserialize, Serialize};

/// How weight decay is applied. Its rate is [`MuonConfig::weight_decay`](crate::MuonConfig::weight_decay). The default is that
/// of the report: constant, times the learning rate, on every weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Decay {
    /// The rate over the steps, relative to the first. Default: `constant`.
    pub schedule: DecaySchedule,
    /// `W <- W - rate W` instead of `W <- W - lr rate W`: decay that does not depend on the learning rate ("independent" decay
    /// in NVIDIA's Emerging-Optimizers and in "Small-scale proxies", arXiv 2309.14322). A suitable rate is then smaller by
    /// about the factor `lr`. Default: `false`.
    pub independent: bool,
    /// Decay only the elements whose update and weight agree in sign, so that decay never opposes the update: "Cautious Weight
    /// Decay" (arXiv 2510.12402). Default: `false`.
    pub cautious: bool,
}

/// The rate of decay at a step, relative to the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DecaySchedule {
    /// 1 at every step.
    #[default]
    Constant,
    /// Half a cosine from 1 to `last` over `steps` steps, then `last`.
    Cosine {
        /// The length of the cosine in steps.
        steps: usize,
        /// The rate after the cosine, relative to the first.
        last: f64,
    },
    /// 1 for `hold` steps, then `(hold / step)^2`.
    InverseSquare {
        /// The number of steps at the full rate.
        hold: usize,
    },
}

impl DecaySchedule {
    /// The factor on the rate at step `step` (from 0).
    pub fn factor(&self, step: usize) -> f64 {
        match *self {
            DecaySchedule::Constant => 1.0,
            DecaySchedule::Cosine { steps, last } => {
                let done = if steps == 0 { 1.0 } else { (step as f64 / steps as f64).min(1.0) };
                last + (1.0 - last) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
            DecaySchedule::InverseSquare { hold } if step > hold => (hold as f64 / step as f64).powi(2),
            DecaySchedule::InverseSquare { .. } => 1.0,
        }
    }
}

impl Decay {
    /// The fraction of a weight that decay removes at step `step` (from 0) with learning rate `lr`.
    pub fn fraction(&self, rate: f64, lr: f64, step: usize) -> f64 {
        rate * self.schedule.factor(step) * if self.independent { 1.0 } else { lr }
    }
}

/// The decay rate for a model's width, from one that suits `base_width`: `rate (base_width / width)^2`, as nanochat scales its
/// models (`nanochat/optim.py`).
pub fn decay_for_width(rate: f64, base_width: usize, width: usize) -> f64 {
    rate * (base_width as f64 / width as f64).powi(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_at_one_and_end_at_their_last_value() {
        let cosine = DecaySchedule::Cosine { steps: 10, last: 0.2 };
        assert_eq!(cosine.factor(0), 1.0);
        assert!((cosine.factor(5) - 0.6).abs() < 1e-12);
        assert!((cosine.factor(10) - 0.2).abs() < 1e-12 && cosine.factor(99) == cosine.factor(10));
        let square = DecaySchedule::InverseSquare { hold: 4 };
        assert_eq!([square.factor(0), square.factor(4), square.factor(8)], [1.0, 1.0, 0.25]);
        assert_eq!(DecaySchedule::Constant.factor(1000), 1.0);
        assert_eq!(decay_for_width(0.2, 512, 1024), 0.05);
    }

    #[test]
    fn independent_decay_does_not_depend_on_the_learning_rate() {
        let independent = Decay { independent: true, ..Decay::default() };
        assert_eq!(independent.fraction(0.1, 0.01, 3), 0.1);
        assert_eq!(Decay::default().fraction(0.1, 0.01, 3), 0.001);
    }
}
