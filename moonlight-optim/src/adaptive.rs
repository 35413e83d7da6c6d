//! Second moments of the orthogonalized update: NorMuon and AdaMuon.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::WeightLayout;

/// Whether the orthogonalized update is divided by the square root of its second moment, and in which way.
///
/// Both variants restore the Frobenius norm of the update afterwards. With [`UpdateScale::UpdateNorm`] of 0.2 that is the
/// rescaling of both papers, `0.2 sqrt(A B) / ||O||`; with any other scale the update keeps the norm of Muon's, as in
/// microsoft/dion.
///
/// [`UpdateScale::UpdateNorm`]: crate::UpdateScale::UpdateNorm
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(rename = "Adaptive", transform = allow_names))]
#[serde(remote = "Self", rename_all = "snake_case", deny_unknown_fields)]
pub enum Adaptive {
    /// Muon without second moments.
    #[default]
    Off,
    /// "NorMuon" (arXiv 2510.05491), Algorithm 1: a second moment for each neuron, that is for each output of the layer:
    /// `v <- beta_2 v + (1 - beta_2) mean_in(O^2)`, `O <- O / (sqrt(v) + epsilon)`. The state grows by one value an output.
    NorMuon {
        /// The decay rate of the second moment. Default: 0.95, the paper's.
        #[serde(default = "beta_2")]
        beta_2: f64,
        /// Added to the square root of the second moment. Default: 1e-8.
        #[serde(default = "epsilon")]
        epsilon: f64,
    },
    /// "AdaMuon" (arXiv 2507.11005), Algorithm 1: a second moment for each element,
    /// `V <- beta_2 V + (1 - beta_2) O^2`, `O <- O / (sqrt(V) + epsilon)`. The state is twice Muon's.
    AdaMuon {
        /// The decay rate of the second moment. Default: 0.95. In the paper it equals the momentum.
        #[serde(default = "beta_2")]
        beta_2: f64,
        /// Added to the square root of the second moment. Default: 1e-8.
        #[serde(default = "epsilon")]
        epsilon: f64,
        /// Whether the signs of the momentum are orthogonalized, as in the paper's later versions, or the momentum itself.
        /// Default: `true`.
        #[serde(default = "sign")]
        sign: bool,
    },
}

crate::name_or_table::name_or_table!(Adaptive, "a variant of Muon");

fn beta_2() -> f64 {
    0.95
}

fn epsilon() -> f64 {
    1e-8
}

fn sign() -> bool {
    true
}

#[cfg(feature = "schema")]
fn allow_names(schema: &mut schemars::Schema) {
    crate::name_or_table::allow_names(schema, &["nor_muon", "ada_muon"]);
}

impl Adaptive {
    /// NorMuon with the paper's constants.
    pub fn nor_muon() -> Self {
        Adaptive::NorMuon { beta_2: beta_2(), epsilon: epsilon() }
    }

    /// AdaMuon with the paper's constants.
    pub fn ada_muon() -> Self {
        Adaptive::AdaMuon { beta_2: beta_2(), epsilon: epsilon(), sign: sign() }
    }

    /// The input of Newton-Schulz: the momentum or its signs.
    pub(crate) fn input(&self, momentum: Tensor<3>) -> Tensor<3> {
        match self {
            // The sign of NaN or infinity is finite. `0 * momentum` is NaN for these and 0 otherwise: with it they still show in
            // the update.
            Adaptive::AdaMuon { sign: true, .. } => momentum.clone().sign().add(momentum.mul_scalar(0.0)),
            _ => momentum,
        }
    }

    /// The update `[batch, rows, columns]` divided by its second moment, and the new second moment.
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
                (beta_2, epsilon, update.clone().square().mean_dim(inputs)) // [batch, 1, out] or [batch, out, 1]
            }
            Adaptive::AdaMuon { beta_2, epsilon, .. } => (beta_2, epsilon, update.clone().square()),
        };
        let new = squares.mul_scalar(1.0 - beta);
        let second = match second {
            Some(second) => second.mul_scalar(beta).add(new),
            None => new,
        };
        let adapted = update.clone().div(second.clone().sqrt().add_scalar(epsilon));
        let norm = |x: Tensor<3>| x.square().sum_dims(&[1, 2]).sqrt(); // [batch, 1, 1]
        let tiny = f64::from(f32::MIN_POSITIVE); // keeps an update of zeros from becoming 0 / 0
        let ratio = norm(update).div(norm(adapted.clone()).add_scalar(tiny));
        (adapted.mul(ratio), Some(second))
    }
}
