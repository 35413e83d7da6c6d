//! `[optimizer]`.

use moonlight_optim::{AdamWConfig, MomentumPrecision, MuonConfig, ParameterRules, Precision, QkClip, Rounding, Scale};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::Check;

/// Which optimizer takes the matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Muon for matrices, AdamW for embeddings, head, norms and biases.
    Muon,
    /// AdamW for everything.
    AdamW,
}

/// What the length of Muon's updates is taken from; [`moonlight_optim::Scale`] in a recipe's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleName {
    /// `update_rms sqrt(max(A, B))`, the report's "Adjusted LR" (equation 4).
    Report,
    /// `update_rms / RMS(O)`, the report's "Update Norm" (equation 6).
    UpdateNorm,
    /// `update_rms sqrt(hidden_size)`, the report's "Baseline" (equation 5).
    HiddenSize,
    /// `sqrt(max(1, out / in))`, Keller Jordan's; `update_rms` is not read.
    KellerJordan,
    /// `sqrt(out / in)`; `update_rms` is not read.
    Spectral,
    /// 1; `update_rms` is not read.
    Unit,
}

/// How parameters in half precision take an update; [`moonlight_optim::Rounding`] in a recipe's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RoundingName {
    /// To the nearest: updates below half a step are lost.
    Nearest,
    /// Up or down by chance, exact in the mean.
    Stochastic,
    /// An f32 copy takes the update.
    Master,
}

/// A dtype of the optimizer's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HalfOrFull {
    /// f32.
    F32,
    /// bf16.
    Bf16,
}

/// `[optimizer]`: Muon or AdamW, and its constants. Defaults are those of "Muon is Scalable for LLM Training".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerRecipe {
    /// `name`: `muon` or `adamw`. Default: `muon`.
    pub name: OptimizerName,
    /// `learning_rate`: the peak, for Muon and AdamW alike. Required.
    pub learning_rate: f64,
    /// `weight_decay`: decoupled, on every parameter, norms included. Default: 0.1.
    pub weight_decay: f64,
    /// `momentum`: Muon's. Default: 0.95.
    pub momentum: f64,
    /// `nesterov`: whether Muon looks ahead. Default: true.
    pub nesterov: bool,
    /// `newton_schulz_steps`: iterations of the orthogonalisation. Default: 5.
    pub newton_schulz_steps: usize,
    /// `scale`: what the length of Muon's updates is taken from: `report`, `update_norm`, `hidden_size`,
    /// `keller_jordan`, `spectral` or `unit`. Default: `report`.
    pub scale: ScaleName,
    /// `update_rms`: the factor of the first three scales, `0.2` in `0.2 sqrt(max(A, B))`. Default: 0.2.
    pub update_rms: f64,
    /// `betas`: AdamW's. Default: [0.9, 0.95].
    pub betas: [f64; 2],
    /// `epsilon`: AdamW's. Default: 1e-8.
    pub epsilon: f64,
    /// `rounding`: how parameters in half precision take an update: `nearest`, `stochastic`, or `master`, which keeps an
    /// f32 copy of each. Nothing to f32 parameters. Default: `master`, since updates are often smaller than half a step
    /// of bf16.
    pub rounding: RoundingName,
    /// `momentum_dtype`: `f32` or `bf16`, which halves what Muon keeps. Default: `f32`.
    pub momentum_dtype: HalfOrFull,
    /// `newton_schulz_dtype`: of the products of Newton-Schulz, `f32` or `bf16`, as in the report's training. Default:
    /// `f32`.
    pub newton_schulz_dtype: HalfOrFull,
    /// `qk_clip`: the largest attention logit that is let be; heads above it are scaled down after the step (MuonClip,
    /// Kimi K2, where it is 100). Costs the logits of every step once more. Default: 0, off.
    pub qk_clip: f64,
}

impl OptimizerRecipe {
    /// QK-clip, if it is asked for.
    pub(crate) fn qk_clip(&self) -> Option<QkClip> {
        (self.qk_clip > 0.0).then_some(QkClip { threshold: self.qk_clip })
    }

    /// Which optimizer takes which parameters of a model with this hidden size, and its settings.
    pub(crate) fn rules(&self, hidden: usize) -> ParameterRules {
        let rounding = match self.rounding {
            RoundingName::Nearest => Rounding::Nearest,
            RoundingName::Stochastic => Rounding::Stochastic,
            RoundingName::Master => Rounding::MasterWeights,
        };
        let adamw = AdamWConfig::new()
            .with_betas(self.betas[0], self.betas[1])
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
            .with_rounding(rounding);
        let factor = self.update_rms;
        let scale = match self.scale {
            ScaleName::Report => Scale::Report { factor },
            ScaleName::UpdateNorm => Scale::UpdateNorm { factor },
            ScaleName::HiddenSize => Scale::HiddenSize { factor, hidden },
            ScaleName::KellerJordan => Scale::KellerJordan,
            ScaleName::Spectral => Scale::Spectral,
            ScaleName::Unit => Scale::Unit,
        };
        match self.name {
            OptimizerName::AdamW => ParameterRules::adamw(adamw),
            OptimizerName::Muon => {
                let muon = MuonConfig::new()
                    .with_momentum(self.momentum)
                    .with_nesterov(self.nesterov)
                    .with_weight_decay(self.weight_decay)
                    .with_scale(scale)
                    .with_steps(self.newton_schulz_steps)
                    .with_rounding(rounding)
                    .with_momentum_precision(match self.momentum_dtype {
                        HalfOrFull::F32 => MomentumPrecision::F32,
                        HalfOrFull::Bf16 => MomentumPrecision::Bf16,
                    })
                    .with_precision(match self.newton_schulz_dtype {
                        HalfOrFull::F32 => Precision::F32,
                        HalfOrFull::Bf16 => Precision::Bf16,
                    });
                ParameterRules::moonlight(muon, adamw)
            }
        }
    }

    pub(super) fn check(&self, check: &mut Check<'_>) {
        if !check.has("optimizer.learning_rate") {
            check.missing(
                "optimizer.learning_rate",
                "Muon at the report's scale takes AdamW's rates: from 2e-4 to 2e-3",
            );
        }
        let Self {
            learning_rate,
            weight_decay,
            momentum,
            newton_schulz_steps,
            update_rms,
            betas,
            epsilon,
            qk_clip,
            ..
        } = *self;
        check.require("optimizer.learning_rate", learning_rate >= 0.0, || {
            format!("is {learning_rate}; a rate must not be negative")
        });
        check.require("optimizer.weight_decay", weight_decay >= 0.0, || {
            format!("is {weight_decay}; it must not be negative")
        });
        check.require("optimizer.momentum", (0.0..1.0).contains(&momentum), || {
            format!("is {momentum}; it must be from 0 to below 1")
        });
        check.require("optimizer.newton_schulz_steps", (1..=100).contains(&newton_schulz_steps), || {
            format!("is {newton_schulz_steps}; it must be from 1 to 100")
        });
        check.require("optimizer.update_rms", update_rms > 0.0, || format!("is {update_rms}; it must be above 0"));
        check.require("optimizer.betas", betas.iter().all(|beta| (0.0..1.0).contains(beta)), || {
            format!("is {betas:?}; each must be from 0 to below 1")
        });
        check.require("optimizer.epsilon", epsilon > 0.0, || format!("is {epsilon}; it must be above 0"));
        check.require("optimizer.qk_clip", qk_clip >= 0.0, || format!("is {qk_clip}; it must not be negative"));
    }
}

impl Default for OptimizerRecipe {
    fn default() -> Self {
        Self {
            name: OptimizerName::Muon,
            learning_rate: 1e-3,
            weight_decay: 0.1,
            momentum: 0.95,
            nesterov: true,
            newton_schulz_steps: 5,
            scale: ScaleName::Report,
            update_rms: 0.2,
            betas: [0.9, 0.95],
            epsilon: 1e-8,
            rounding: RoundingName::Master,
            momentum_dtype: HalfOrFull::F32,
            newton_schulz_dtype: HalfOrFull::F32,
            qk_clip: 0.0,
        }
    }
}
