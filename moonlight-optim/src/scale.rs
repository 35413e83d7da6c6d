//! The factor on the orthogonalized update: the scales of the report and of other implementations.

use serde::{Deserialize, Serialize};

/// Which dimension of a stored weight matrix is the input of its layer.
///
/// Only [`UpdateScale::KellerJordan`], [`UpdateScale::Spectral`] and [`Adaptive::NorMuon`](crate::Adaptive::NorMuon) depend on
/// it; the report's scale is symmetric.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WeightLayout {
    /// `[in, out]`: Burn's `Linear`.
    #[default]
    InOut,
    /// `[out, in]`: PyTorch's `Linear`.
    OutIn,
}

/// The factor on the orthogonalized update `O` of an `[A, B]` matrix: `W <- W - lr (factor * O + weight_decay * W)`.
///
/// A full-rank `O` has an RMS of `1 / sqrt(max(A, B))` ("Muon is Scalable for LLM Training", arXiv 2502.16982, Lemma 1). So the
/// report's scale gives updates of every shape the same RMS, about that of AdamW's updates: a learning rate and a weight decay
/// found for AdamW can be kept.
///
/// ```
/// use moonlight_optim::{UpdateScale, WeightLayout};
///
/// let scale = UpdateScale::default(); // `report`, 0.2 sqrt(max(A, B))
/// assert_eq!(scale.factor(100, 25, WeightLayout::InOut), Some(2.0));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(rename = "UpdateScale", transform = allow_names))]
#[serde(remote = "Self", rename_all = "snake_case", deny_unknown_fields)]
pub enum UpdateScale {
    /// `factor * sqrt(max(A, B))`: the report's equation 4, "Adjusted LR", with 0.2. PyTorch's `match_rms_adamw`.
    Report {
        /// The RMS of a full-rank update. Default: 0.2, the report's.
        #[serde(default = "update_rms")]
        factor: f64,
    },
    /// `factor / RMS(O)`: the report's equation 6, "Update Norm". The update's RMS is `factor` for any rank of `O`.
    UpdateNorm {
        /// The RMS of the update. Default: 0.2, the report's.
        #[serde(default = "update_rms")]
        factor: f64,
    },
    /// `factor * sqrt(hidden)`: the report's equation 5, its "Baseline" in Table 1.
    HiddenSize {
        /// The RMS of a full-rank update of a `[hidden, hidden]` matrix. Default: 0.2, the report's.
        #[serde(default = "update_rms")]
        factor: f64,
        /// The hidden size of the model. Default: 0, which stands for unset: [`UpdateScale::with_hidden_size`] sets it, and
        /// assigning parameters without it is an error.
        #[serde(default)]
        hidden: usize,
    },
    /// `sqrt(max(1, out / in))`: Keller Jordan's Muon. `in` and `out` are those of the layer, for either [`WeightLayout`].
    KellerJordan,
    /// `sqrt(out / in)`: the spectral condition of "A Spectral Condition for Feature Learning" (arXiv 2310.17813);
    /// the default of microsoft/dion.
    Spectral,
    /// 1: no scale, the report's equations 1 and 3.
    Unit,
}

crate::name_or_table::name_or_table!(UpdateScale, "a scale");

fn update_rms() -> f64 {
    0.2
}

#[cfg(feature = "schema")]
fn allow_names(schema: &mut schemars::Schema) {
    crate::name_or_table::allow_names(schema, &["report", "update_norm", "hidden_size"]);
}

impl Default for UpdateScale {
    fn default() -> Self {
        UpdateScale::Report { factor: update_rms() }
    }
}

impl UpdateScale {
    /// Sets `factor`, the RMS of updates, of a scale that has one. Other scales are unchanged.
    pub fn with_update_rms(mut self, rms: f64) -> Self {
        if let UpdateScale::Report { factor }
        | UpdateScale::UpdateNorm { factor }
        | UpdateScale::HiddenSize { factor, .. } = &mut self
        {
            *factor = rms;
        }
        self
    }

    /// Sets the hidden size of [`UpdateScale::HiddenSize`] if it is unset. Other scales are unchanged.
    pub fn with_hidden_size(mut self, size: usize) -> Self {
        if let UpdateScale::HiddenSize { hidden, .. } = &mut self
            && *hidden == 0
        {
            *hidden = size;
        }
        self
    }

    /// The factor for a matrix that is stored as `[rows, columns]`; `None` where it depends on the update itself
    /// ([`UpdateScale::UpdateNorm`]).
    pub fn factor(&self, rows: usize, columns: usize, layout: WeightLayout) -> Option<f64> {
        let (inputs, outputs) = match layout {
            WeightLayout::InOut => (rows as f64, columns as f64),
            WeightLayout::OutIn => (columns as f64, rows as f64),
        };
        match *self {
            UpdateScale::Report { factor } => Some(factor * inputs.max(outputs).sqrt()),
            UpdateScale::UpdateNorm { .. } => None,
            UpdateScale::HiddenSize { factor, hidden } => Some(factor * (hidden as f64).sqrt()),
            UpdateScale::KellerJordan => Some((outputs / inputs).max(1.0).sqrt()),
            UpdateScale::Spectral => Some((outputs / inputs).sqrt()),
            UpdateScale::Unit => Some(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_scale_is_symmetric() {
        let scale = UpdateScale::default();
        assert_eq!(scale.factor(100, 25, WeightLayout::InOut), Some(2.0));
        assert_eq!(scale.factor(25, 100, WeightLayout::InOut), Some(2.0));
        assert_eq!(scale.factor(25, 100, WeightLayout::OutIn), Some(2.0));
    }

    #[test]
    fn keller_jordans_scale_grows_with_outputs_in_either_layout() {
        let scale = UpdateScale::KellerJordan;
        // A layer from 16 to 64 features.
        assert_eq!(scale.factor(16, 64, WeightLayout::InOut), Some(2.0));
        assert_eq!(scale.factor(64, 16, WeightLayout::OutIn), Some(2.0));
        // A layer from 64 to 16 features.
        assert_eq!(scale.factor(64, 16, WeightLayout::InOut), Some(1.0));
        assert_eq!(UpdateScale::Spectral.factor(64, 16, WeightLayout::InOut), Some(0.5));
    }
}
