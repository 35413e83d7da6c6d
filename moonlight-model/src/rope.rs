//! Rotary position embedding (arXiv 2104.09864), with linear, Llama 3.1 and YaRN scaling for longer contexts.

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::rope::{Llama3Config, RopeConfig, RopeScaling, YarnConfig, yarn_mscale};
use crate::kernels::{RotationSpec, rotate};

/// The frequencies of a rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryEmbedding {
    /// Angle per position of each pair, in radians, `[dim / 2]`.
    inverse_frequencies: Vec<f32>,
    /// Factor on cos and sin: 1, or YaRN's attention factor.
    scale: f32,
    interleave: bool,
}

/// Cos and sin of the angles at some positions, f32 `[positions, dim / 2]`.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor<2>,
    sin: Tensor<2>,
    interleave: bool,
}

impl RotaryEmbedding {
    /// The frequencies `theta^(-2i / dim)` for `i` in `0..dim / 2`, scaled by `config.scaling`. `dim` is the number of rotated
    /// dimensions of a head.
    pub fn new(config: &RopeConfig, dim: usize) -> Self {
        let plain = (0..dim / 2).map(|i| config.theta.powf(-2.0 * i as f64 / dim as f64));
        let (frequencies, scale): (Vec<f64>, f64) = match &config.scaling {
            // Dynamic scaling acts only beyond `max_position_embeddings`, and no sequence is that long here.
            None | Some(RopeScaling::Dynamic { .. }) => (plain.collect(), 1.0),
            Some(RopeScaling::Linear { factor }) => (plain.map(|f| f / factor).collect(), 1.0),
            Some(RopeScaling::Llama3(llama)) => (plain.map(|f| llama3_frequency(llama, f)).collect(), 1.0),
            Some(RopeScaling::Yarn(yarn)) => {
                let ramp = yarn_ramp(yarn, config.theta, dim);
                let mixed = plain.zip(ramp).map(|(f, ramp)| f / yarn.factor * ramp + f * (1.0 - ramp)).collect();
                (mixed, yarn_attention_factor(yarn))
            }
        };
        Self {
            inverse_frequencies: frequencies.into_iter().map(|f| f as f32).collect(),
            scale: scale as f32,
            interleave: config.interleave,
        }
    }

    /// Cos and sin at each of `positions`.
    ///
    /// The angle is the f32 product of position and frequency, as in transformers, so that logits agree at long contexts.
    pub fn at(&self, positions: &[u32], device: &Device) -> Rotation {
        let shape = [positions.len(), self.inverse_frequencies.len()];
        let (cos, sin) = self.cos_sin(positions);
        Rotation {
            cos: Tensor::from_data(TensorData::new(cos, shape), device),
            sin: Tensor::from_data(TensorData::new(sin, shape), device),
            interleave: self.interleave,
        }
    }

    /// The values of [`at`](Self::at).
    pub(crate) fn cos_sin(&self, positions: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let angles = || {
            positions.iter().flat_map(|&position| self.inverse_frequencies.iter().map(move |&f| position as f32 * f))
        };
        (
            angles().map(|angle| angle.cos() * self.scale).collect(),
            angles().map(|angle| angle.sin() * self.scale).collect(),
        )
    }

    /// Whether the dimensions of a pair are adjacent.
    #[cfg(feature = "cpu")]
    pub(crate) fn interleaves(&self) -> bool {
        self.interleave
    }
}

impl Rotation {
    /// The rotation on the inner device, without gradients.
    pub(crate) fn inner(self) -> Self {
        Self { cos: self.cos.inner(), sin: self.sin.inner(), interleave: self.interleave }
    }

    /// Rotates dimensions `start..` of each head.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, sequence, heads, width]`, with one position for each token
    ///
    /// # Panics
    ///
    /// If there are not `batch * sequence` positions, or `width - start` is not `dim`.
    pub fn apply(&self, x: Tensor<4>, start: usize) -> Tensor<4> {
        rotate(x, self.cos.clone(), self.sin.clone(), RotationSpec { start, interleave: self.interleave })
    }
}

/// How far each frequency is interpolated (YaRN, arXiv 2309.00071, section 3.2): 0 for frequencies with many rotations over the
/// original context, 1 for those with few, and a linear ramp between.
fn yarn_ramp(yarn: &YarnConfig, theta: f64, dim: usize) -> impl Iterator<Item = f64> {
    let context = yarn.original_max_position_embeddings as f64;
    // The dimension whose frequency makes `rotations` rotations over the original context.
    let dimension =
        |rotations: f64| dim as f64 * (context / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001; // Kimi-K2 has beta_fast = beta_slow: the ramp becomes a step instead of 0 / 0, as in transformers
    }
    (0..dim / 2).map(move |i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0))
}

/// The scaling of Llama 3.1 for one frequency.
fn llama3_frequency(llama: &Llama3Config, frequency: f64) -> f64 {
    // Rotations over the original context.
    let rotations = llama.original_max_position_embeddings as f64 * frequency / (2.0 * std::f64::consts::PI);
    // 0 for a frequency that is divided by `factor`, 1 for one that is kept.
    let kept = ((rotations - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor)).clamp(0.0, 1.0);
    (1.0 - kept) * frequency / llama.factor + kept * frequency
}

/// The factor on cos and sin, by the precedence of transformers.
fn yarn_attention_factor(yarn: &YarnConfig) -> f64 {
    match (yarn.attention_factor, yarn.mscale, yarn.mscale_all_dim) {
        (Some(factor), _, _) => factor,
        (None, Some(mscale), Some(all_dim)) if mscale != 0.0 && all_dim != 0.0 => {
            yarn_mscale(yarn.factor, mscale) / yarn_mscale(yarn.factor, all_dim)
        }
        _ => yarn_mscale(yarn.factor, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;

    #[test]
    fn moonlight_has_32_frequencies_from_one_to_theta() {
        let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        let rope = RotaryEmbedding::new(&config.rope, config.rope_dim());
        assert_eq!(rope.inverse_frequencies.len(), 32);
        assert_eq!(rope.inverse_frequencies[0], 1.0);
        assert!((f64::from(rope.inverse_frequencies[31]) - 50_000f64.powf(-62.0 / 64.0)).abs() < 1e-10);
    }

    #[test]
    fn yarn_keeps_fast_frequencies_and_divides_slow_ones() {
        let config = ModelConfig::preset("deepseek-v3").unwrap();
        let yarn = RotaryEmbedding::new(&config.rope, 64);
        let plain = RotaryEmbedding::new(&RopeConfig { scaling: None, ..config.rope.clone() }, 64);
        assert_eq!(yarn.inverse_frequencies[0], plain.inverse_frequencies[0]);
        let ratio = plain.inverse_frequencies[31] / yarn.inverse_frequencies[31];
        assert!((ratio - 40.0).abs() < 1e-4, "{ratio}");
        // mscale equals mscale_all_dim, so the scale of cos and sin cancels.
        assert_eq!(yarn.scale, 1.0);
    }

    #[test]
    fn equal_betas_give_finite_frequencies() {
        let mut config = ModelConfig::preset("deepseek-v3").unwrap();
        let Some(RopeScaling::Yarn(yarn)) = &mut config.rope.scaling else { panic!("DeepSeek-V3 has YaRN") };
        yarn.beta_fast = 1.0;
        let yarn = RotaryEmbedding::new(&config.rope, 64);
        assert!(yarn.inverse_frequencies.iter().all(|f| f.is_finite()));
    }
}
