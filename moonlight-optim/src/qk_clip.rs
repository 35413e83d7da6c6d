//! QK-clip: limits attention logits by scaling the query and key projections.

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::WeightLayout;

/// QK-clip of MuonClip ("Kimi K2", arXiv 2507.20534, section 2.1 and Algorithm 1).
///
/// After a step, the query and key weights of each head whose largest attention logit `s` was above `threshold` are scaled by
/// `gamma = threshold / s` together, so that the same input would give a logit of `threshold`. Other heads are unchanged.
///
/// In multi-head latent attention a logit is `q_c . k_c + q_r . k_r`, and all heads share the rotated key `k_r`. So `q_c` and
/// `k_c` take `sqrt(gamma)` each, `q_r` takes `gamma`, and `k_r` is unchanged.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use moonlight_optim::{HeadLayout, QkClip};
///
/// let heads = HeadLayout::moonlight(2); // heads of 128 + 64, values of 128
/// let device = Device::default();
/// let query = Tensor::<2>::ones([8, 2 * 192], &device);
/// let key_value = Tensor::<2>::ones([8, 2 * 256], &device);
/// // The largest logit of each head in this step, as the model measures them.
/// let clip = QkClip::default().factors(&[30.0, 400.0]);
/// assert_eq!(clip, [1.0, 0.25]);
/// let query = heads.clip_query(query, &clip);
/// let key_value = heads.clip_key_value(key_value, &clip);
/// # let _ = (query, key_value);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct QkClip {
    /// The largest attention logit that a head may have before its weights are scaled down. Default: 100, as in the paper.
    pub threshold: f64,
}

impl Default for QkClip {
    fn default() -> Self {
        Self { threshold: 100.0 }
    }
}

impl QkClip {
    /// The factor `gamma = min(1, threshold / s)` of each head, from its largest logit over all sequences of the step.
    ///
    /// A logit that is zero, negative or non-finite gives 1: there is nothing to limit, or no factor would help.
    pub fn factors(&self, largest_logits: &[f64]) -> Vec<f64> {
        let factor = |logit: f64| {
            if logit.is_finite() && logit > self.threshold { self.threshold / logit } else { 1.0 }
        };
        largest_logits.iter().map(|&logit| factor(logit)).collect()
    }
}

/// How the heads are laid out in the projections of an attention layer, in the terms of DeepSeek-V3's `config.json`.
///
/// For plain multi-head attention, `nope` is the head size and `rope` and `value` are 0, for the query and the key projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadLayout {
    /// The number of heads (`num_attention_heads`).
    pub heads: usize,
    /// The features of a head's query and key that are not rotated, `q_c` and `k_c` (`qk_nope_head_dim`).
    pub nope: usize,
    /// The features of a head's query that are rotated, `q_r` (`qk_rope_head_dim`). They follow those that are not.
    pub rope: usize,
    /// The features of a head's value (`v_head_dim`). They follow the key in the joint projection.
    pub value: usize,
    /// How the projections are stored. Heads are along the output side.
    pub layout: WeightLayout,
}

impl HeadLayout {
    /// The layout of Moonlight and DeepSeek-V3: 128 features without rotation, 64 with rotation, values of 128, stored as Burn
    /// does.
    pub fn moonlight(heads: usize) -> Self {
        Self { heads, nope: 128, rope: 64, value: 128, layout: WeightLayout::InOut }
    }

    /// Scales the heads of a query projection: `q_c` by `sqrt(gamma)`, `q_r` by `gamma`. `factors` has `gamma` of each head.
    ///
    /// # Shapes
    ///
    /// - weight: `[in, heads * (nope + rope)]`, transposed with [`WeightLayout::OutIn`]
    ///
    /// # Panics
    ///
    /// If the matrix does not have this number of outputs, or there is not one factor for each head.
    pub fn clip_query(&self, weight: Tensor<2>, factors: &[f64]) -> Tensor<2> {
        self.scale(weight, factors, self.nope, f64::sqrt, self.rope, |gamma| gamma)
    }

    /// Scales the heads of a joint key and value projection: `k_c` by `sqrt(gamma)`; values are unchanged.
    ///
    /// # Shapes
    ///
    /// - weight: `[rank, heads * (nope + value)]`, transposed with [`WeightLayout::OutIn`]
    ///
    /// # Panics
    ///
    /// As [`HeadLayout::clip_query`].
    pub fn clip_key_value(&self, weight: Tensor<2>, factors: &[f64]) -> Tensor<2> {
        self.scale(weight, factors, self.nope, f64::sqrt, self.value, |_| 1.0)
    }

    fn scale(
        &self,
        weight: Tensor<2>,
        factors: &[f64],
        first: usize,
        of_first: impl Fn(f64) -> f64,
        second: usize,
        of_second: impl Fn(f64) -> f64,
    ) -> Tensor<2> {
        assert_eq!(factors.len(), self.heads, "there is one factor for each head");
        let outputs = self.heads * (first + second);
        let [rows, columns] = weight.dims();
        let (found, shape) = match self.layout {
            WeightLayout::InOut => (columns, [1, outputs]),
            WeightLayout::OutIn => (rows, [outputs, 1]),
        };
        assert_eq!(found, outputs, "the projection has the outputs of {} heads", self.heads);
        if factors.iter().all(|&gamma| gamma == 1.0) {
            return weight;
        }
        let mut scales = Vec::with_capacity(outputs);
        for &gamma in factors {
            scales.extend(std::iter::repeat_n(of_first(gamma) as f32, first));
            scales.extend(std::iter::repeat_n(of_second(gamma) as f32, second));
        }
        let device: Device = weight.device();
        let dtype = weight.dtype();
        let scales = Tensor::<2>::from_data(TensorData::new(scales, shape), &device);
        // Half-precision weights are scaled in full precision and rounded once.
        let wide = crate::newton_schulz::full_precision(dtype);
        weight.cast(wide).mul(scales.cast(wide)).cast(dtype)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;

    fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    #[test]
    fn only_large_finite_logits_clip() {
        let factors = QkClip::default().factors(&[
            0.0,
            -5.0,
            -500.0,
            99.0,
            100.0,
            200.0,
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
        ]);
        assert_eq!(factors, [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0]);
    }

    /// The logits of one token pair for each head, `[heads]`, of a layer with these projections.
    fn logits(query: &Tensor<2>, key_value: &Tensor<2>, shared_key: &[f64], heads: HeadLayout) -> Vec<f64> {
        let HeadLayout { heads: count, nope, rope, value, .. } = heads;
        let x = Tensor::<2>::ones([1, query.dims()[0]], &query.device());
        let latent = Tensor::<2>::ones([1, key_value.dims()[0]], &query.device());
        let q = floats(x.matmul(query.clone()));
        let kv = floats(latent.matmul(key_value.clone()));
        (0..count)
            .map(|head| {
                let q = &q[head * (nope + rope)..][..nope + rope];
                let k = &kv[head * (nope + value)..][..nope];
                let still: f64 = q[..nope].iter().zip(k).map(|(q, k)| q * k).sum();
                let rotated: f64 = q[nope..].iter().zip(shared_key).map(|(q, k)| q * k).sum();
                still + rotated
            })
            .collect()
    }

    #[test]
    fn clipped_heads_give_the_threshold_and_other_heads_are_unchanged() {
        let device = Device::default();
        let heads = HeadLayout { heads: 3, nope: 4, rope: 2, value: 3, layout: WeightLayout::InOut };
        let query = Tensor::<2>::random([5, 18], Distribution::Uniform(0.5, 1.5), &device);
        let key_value = Tensor::<2>::random([6, 21], Distribution::Uniform(0.5, 1.5), &device);
        let shared_key = [3.0, 4.0];
        let before = logits(&query, &key_value, &shared_key, heads);
        let clip = QkClip { threshold: before[1] * 0.999 };
        let factors = clip.factors(&before);
        let after = logits(
            &heads.clip_query(query.clone(), &factors),
            &heads.clip_key_value(key_value.clone(), &factors),
            &shared_key,
            heads,
        );
        for ((after, before), factor) in after.iter().zip(&before).zip(&factors) {
            let expected = if *factor < 1.0 { clip.threshold } else { *before };
            assert!((after / expected - 1.0).abs() < 1e-5, "{after}, not {expected}");
        }
        assert!(factors[1] < 1.0);

        // Values are unchanged for any factor.
        let values = |weight: Tensor<2>| floats(weight.narrow(1, 4, 3));
        assert_eq!(values(heads.clip_key_value(key_value.clone(), &[0.25; 3])), values(key_value));
    }

    #[test]
    fn a_torch_layout_is_scaled_on_its_rows() {
        let device = Device::default();
        let heads = HeadLayout { heads: 2, nope: 1, rope: 1, value: 1, layout: WeightLayout::OutIn };
        let weight = Tensor::<2>::ones([4, 3], &device);
        let clipped = floats(heads.clip_query(weight, &[1.0, 0.25]));
        assert_eq!(clipped, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]);
    }

    #[test]
    #[should_panic(expected = "the projection has the outputs of 2 heads")]
    fn a_projection_of_another_size_is_refused() {
        HeadLayout::moonlight(2).clip_query(Tensor::<2>::ones([4, 100], &Device::default()), &[1.0, 1.0]);
    }
}
