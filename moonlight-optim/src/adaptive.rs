//! Second moments of orthogonalised updates: NorMuon and AdaMuon.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::WeightLayout;

/// Whether, and how, the orthogonalised update is divided by the root of its second moment.
///
/// Both methods bring the Frobenius norm of the update back afterwards. With [`Scale::UpdateNorm`](crate::Scale::UpdateNorm)
/// of 0.2 that is the rescaling of both papers, `0.2 sqrt(A B) / ||O||`; with any other scale the update keeps the length
/// that Muon's has, as in microsoft/dion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Adaptive {
    /// Muon as it is.
    #[default]
    Off,
    /// "NorMuon" (arXiv 2510.05491), Algorithm 1: one second moment for each neuron, that is for each output of the layer:
    /// `v <- beta_2 v + (1 - beta_2) mean_in(O^2)`, `O <- O / (sqrt(v) + epsilon)`. The state grows by one number an output.
    NorMuon {
        /// 0.95 in the paper.
        beta_2: f64,
        /// 1e-8.
        epsilon: f64,
    },
    /// "AdaMuon" (arXiv 2507.11005), Algorithm 1: a second moment for each element,
    /// `V <- beta_2 V + (1 - beta_2) O^2`, `O <- O / (sqrt(V) + epsilon)`. The state is twice Muon's.
    AdaMuon {
        /// 0.95 in the paper, where it is also the momentum.
        beta_2: f64,
        /// 1e-8.
        epsilon: f64,
        /// Whether the signs of the momentum are orthogonalised, as the paper's later versions have it, or the momentum.
        sign: bool,
    },
}

impl Adaptive {
    /// NorMuon with the paper's constants.
    pub fn nor_muon() -> Self {
        Adaptive::NorMuon { beta_2: 0.95, epsilon: 1e-8 }
    }

    /// AdaMuon with the paper's constants.
    pub fn ada_muon() -> Self {
        Adaptive::AdaMuon { beta_2: 0.95, epsilon: 1e-8, sign: true }
    }

    /// What is orthogonalised.
    pub(crate) fn input(&self, momentum: Tensor<3>) -> Tensor<3> {
        match self {
            // The second term is 0, or NaN where the momentum is not finite, which a sign would hide.
            Adaptive::AdaMuon { sign: true, .. } => momentum.clone().sign().add(momentum.mul_scalar(0.0)),
            _ => momentum,
        }
    }

    /// The adapted update `[batch, rows, columns]` and the second moment after it.
    pub(crate) fn apply(
        &self,
        update: Tensor<3>,
        second: Option<Tensor<3>>,
        layout: WeightLayout,
    ) -> (Tensor<3>, Option<Tensor<3>>) {
        let (beta, epsilon, squares) = match *self {
            Adaptive::Off => return (update, None),
            Adaptive::NorMuon { beta_2, epsilon } => {
                let inputs = match layout {
                    WeightLayout::InOut => 1,
                    WeightLayout::OutIn => 2,
                };
                (beta_2, epsilon, update.clone().square().mean_dim(inputs))
            }
            Adaptive::AdaMuon { beta_2, epsilon, .. } => (beta_2, epsilon, update.clone().square()),
        };
        let fresh = squares.mul_scalar(1.0 - beta);
        let second = match second {
            Some(second) => second.mul_scalar(beta).add(fresh),
            None => fresh,
        };
        let adapted = update.clone().div(second.clone().sqrt().add_scalar(epsilon));
        let norm = |x: Tensor<3>| x.square().sum_dims(&[1, 2]).sqrt(); // [batch, 1, 1]
        let tiny = f64::from(f32::MIN_POSITIVE); // an update of zeros stays one
        let length = norm(update).div(norm(adapted.clone()).add_scalar(tiny));
        (adapted.mul(length), Some(second))
    }
}
