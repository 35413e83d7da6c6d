//! `[optimizer]`.

use std::str::FromStr;

use moonlight_optim::{AdamWConfig, MomentumPrecision, MuonConfig, ParameterRules, Precision, QkClip, Rounding, Scale};
use serde::Serialize;

use super::section::Section;

/// Which optimizer takes the matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Muon for matrices, AdamW for embeddings, head, norms and biases.
    Muon,
    /// AdamW for everything.
    AdamW,
}

impl FromStr for OptimizerName {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "muon" => Ok(Self::Muon),
            "adamw" => Ok(Self::AdamW),
            _ => Err(()),
        }
    }
}

/// What the length of Muon's updates is taken from; [`moonlight_optim::Scale`] in a recipe's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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

impl ScaleName {
    const NAMES: [&str; 6] = ["report", "update_norm", "hidden_size", "keller_jordan", "spectral", "unit"];
}

impl FromStr for ScaleName {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "report" => Ok(Self::Report),
            "update_norm" => Ok(Self::UpdateNorm),
            "hidden_size" => Ok(Self::HiddenSize),
            "keller_jordan" => Ok(Self::KellerJordan),
            "spectral" => Ok(Self::Spectral),
            "unit" => Ok(Self::Unit),
            _ => Err(()),
        }
    }
}

/// How parameters in half precision take an update; [`moonlight_optim::Rounding`] in a recipe's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RoundingName {
    /// To the nearest: updates below half a step are lost.
    Nearest,
    /// Up or down by chance, exact in the mean.
    Stochastic,
    /// An f32 copy takes the update.
    Master,
}

impl FromStr for RoundingName {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "nearest" => Ok(Self::Nearest),
            "stochastic" => Ok(Self::Stochastic),
            "master" => Ok(Self::Master),
            _ => Err(()),
        }
    }
}

/// A dtype of the optimizer's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HalfOrFull {
    /// f32.
    F32,
    /// bf16.
    Bf16,
}

impl FromStr for HalfOrFull {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(()),
        }
    }
}

/// `[optimizer]`: Muon or AdamW, and its constants. Defaults are those of "Muon is Scalable for LLM Training".
#[derive(Debug, Clone, PartialEq, Serialize)]
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
            .with_betas(self.betas[0] as f32, self.betas[1] as f32)
            .with_epsilon(self.epsilon as f32)
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

    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let name = section.choice("name", &["muon", "adamw"]).unwrap_or(OptimizerName::Muon);
        if !section.has("learning_rate") {
            section.missing("learning_rate", "Muon at the report's scale takes AdamW's rates: from 2e-4 to 2e-3");
        }
        let learning_rate = section.number("learning_rate").unwrap_or(1e-3);
        section.require("learning_rate", learning_rate >= 0.0, || {
            format!("is {learning_rate}; a rate must not be negative")
        });
        let weight_decay = section.number("weight_decay").unwrap_or(0.1);
        section.require("weight_decay", weight_decay >= 0.0, || format!("is {weight_decay}; it must not be negative"));
        let momentum = section.number("momentum").unwrap_or(0.95);
        section.require("momentum", (0.0..1.0).contains(&momentum), || {
            format!("is {momentum}; it must be from 0 to below 1")
        });
        let nesterov = section.boolean("nesterov").unwrap_or(true);
        let newton_schulz_steps = section.whole("newton_schulz_steps").unwrap_or(5) as usize;
        section.require("newton_schulz_steps", (1..=100).contains(&newton_schulz_steps), || {
            format!("is {newton_schulz_steps}; it must be from 1 to 100")
        });
        let scale = section.choice("scale", &ScaleName::NAMES).unwrap_or(ScaleName::Report);
        let update_rms = section.number("update_rms").unwrap_or(0.2);
        section.require("update_rms", update_rms > 0.0, || format!("is {update_rms}; it must be above 0"));
        let betas = section.pair("betas").unwrap_or([0.9, 0.95]);
        section.require("betas", betas.iter().all(|beta| (0.0..1.0).contains(beta)), || {
            format!("is {betas:?}; each must be from 0 to below 1")
        });
        let epsilon = section.number("epsilon").unwrap_or(1e-8);
        section.require("epsilon", epsilon > 0.0, || format!("is {epsilon}; it must be above 0"));
        let rounding = section.choice("rounding", &["nearest", "stochastic", "master"]).unwrap_or(RoundingName::Master);
        let dtypes = ["f32", "bf16"];
        let momentum_dtype = section.choice("momentum_dtype", &dtypes).unwrap_or(HalfOrFull::F32);
        let newton_schulz_dtype = section.choice("newton_schulz_dtype", &dtypes).unwrap_or(HalfOrFull::F32);
        let qk_clip = section.number("qk_clip").unwrap_or(0.0);
        section.require("qk_clip", qk_clip >= 0.0, || format!("is {qk_clip}; it must not be negative"));
        Self {
            name,
            learning_rate,
            weight_decay,
            momentum,
            nesterov,
            newton_schulz_steps,
            scale,
            update_rms,
            betas,
            epsilon,
            rounding,
            momentum_dtype,
            newton_schulz_dtype,
            qk_clip,
        }
    }
}
