//! Weight decay: what it is coupled to, how it goes over time, and where it holds back.

use serde::{Deserialize, Serialize};

/// How decay is applied; the rate is [`MuonConfig::weight_decay`](crate::MuonConfig::weight_decay). The default is the
/// report's: constant, times the learning rate, on every weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Decay {
    /// How the rate goes over the steps.
    pub schedule: DecaySchedule,
    /// `W <- W - rate W` instead of `W <- W - lr rate W`: decay does not follow the learning rate (the "independent"
    /// decay of NVIDIA's Emerging-Optimizers and of "Small-scale proxies", arXiv 2309.14322). Rates are then about `lr`
    /// times smaller.
    pub independent: bool,
    /// Only where update and weight agree in sign, so that decay never works against the update: "Cautious Weight
    /// Decay" (arXiv 2510.12402).
    pub cautious: bool,
}

/// The rate of decay at a step, as a share of the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DecaySchedule {
    /// 1.
    #[default]
    Constant,
    /// Half a cosine from 1 to `last` over `steps`, `last` from then on.
    Cosine {
        /// Where the cosine ends.
        steps: usize,
        /// The share that is left there.
        last: f64,
    },
    /// 1 for `hold` steps, then `(hold / step)^2`.
    InverseSquare {
        /// Steps at the full rate.
        hold: usize,
    },
}

impl DecaySchedule {
    /// The share of the rate at step `step` (from 0).
    pub fn share(&self, step: usize) -> f64 {
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
    /// The share of a weight that a step takes off.
    pub fn fraction(&self, rate: f64, lr: f64, step: usize) -> f64 {
        rate * self.schedule.share(step) * if self.independent { 1.0 } else { lr }
    }
}

/// `rate (base_width / width)^2`: the decay for a width from that of another, as nanochat scales its models
/// (`nanochat/optim.py`: decay goes with the inverse square of the width).
pub fn decay_for_width(rate: f64, base_width: usize, width: usize) -> f64 {
    rate * (base_width as f64 / width as f64).powi(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_at_one_and_end_where_they_say() {
        let cosine = DecaySchedule::Cosine { steps: 10, last: 0.2 };
        assert_eq!(cosine.share(0), 1.0);
        assert!((cosine.share(5) - 0.6).abs() < 1e-12);
        assert!((cosine.share(10) - 0.2).abs() < 1e-12 && cosine.share(99) == cosine.share(10));
        let square = DecaySchedule::InverseSquare { hold: 4 };
        assert_eq!([square.share(0), square.share(4), square.share(8)], [1.0, 1.0, 0.25]);
        assert_eq!(DecaySchedule::Constant.share(1000), 1.0);
        assert_eq!(decay_for_width(0.2, 512, 1024), 0.05);
    }

    #[test]
    fn independent_decay_does_not_see_the_learning_rate() {
        let independent = Decay { independent: true, ..Decay::default() };
        assert_eq!(independent.fraction(0.1, 0.01, 3), 0.1);
        assert_eq!(Decay::default().fraction(0.1, 0.01, 3), 0.001);
    }
}
