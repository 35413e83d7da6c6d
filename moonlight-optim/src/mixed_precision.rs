//! Mixed precision: updates in f32 of parameters that are stored in bf16 or f16.

use burn::optim::{LearningRate, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};

use crate::newton_schulz::full_precision;

/// How the updates of parameters stored in bf16 or f16 are rounded. It has no effect on f32 and f64 parameters.
///
/// bf16 has 8 significant bits: rounding to nearest loses every change of less than 1/512 of a weight. Most updates at the end
/// of a learning rate schedule are that small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// Rounds to nearest. Small updates are lost.
    #[default]
    Nearest,
    /// Rounds to one of the two neighbors at random, to the nearer one with the higher probability, so that the mean over
    /// steps is exact. Takes no memory. It draws from the device's random generator, so a resumed run is the same bit for bit
    /// only if that is seeded at each step.
    Stochastic,
    /// The optimizer keeps an f32 copy of the parameter: 4 bytes an element. Elements that other code changed between two
    /// steps, as QK-clip does, continue from the changed value.
    #[serde(rename = "master", alias = "master_weights")]
    MasterWeights,
}

/// Runs any Burn optimizer in f32 on parameters that are stored in bf16 or f16. Gradient and parameter are widened, the
/// parameter is rounded once at the end, and the state stays in f32. f32 and f64 parameters are stepped as without it.
///
/// An f32 state also survives a save: Burn loads the state of its own optimizers in the device's default float type, which is
/// f32 unless it was changed.
#[derive(Clone, Debug)]
pub struct MixedPrecision<O> {
    /// The optimizer that runs in f32.
    pub optimizer: O,
    /// How the updated parameter is rounded to its dtype.
    pub rounding: Rounding,
}

/// The state of a [`MixedPrecision`] optimizer.
#[derive(Clone, Debug)]
pub struct MixedPrecisionState<S, const D: usize> {
    /// The state of the inner optimizer.
    pub inner: Option<S>,
    /// The parameter in f32, with [`Rounding::MasterWeights`].
    pub master: Option<Tensor<D>>,
}

impl<S: RecordState, const D: usize> RecordState for MixedPrecisionState<S, D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        if let Some(inner) = &self.inner {
            inner.state_flatten(prefix, out);
        }
        if let Some(master) = &self.master {
            out.push_tensor(prefix, "master", master.clone().into_data());
        }
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        let master = src.take_tensor(prefix, "master").map(|data| {
            let dtype = data.dtype();
            Tensor::from_data(data, (device, dtype))
        });
        let inner = S::state_unflatten(prefix, src, device);
        (inner.is_some() || master.is_some()).then_some(Self { inner, master })
    }
}

impl<O: Optimizer> Optimizer for MixedPrecision<O> {
    type State<const D: usize> = MixedPrecisionState<O::State<D>, D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let stored = tensor.dtype();
        let wide = full_precision(stored);
        let (inner, master) = match state {
            Some(state) => (state.inner, state.master),
            None => (None, None),
        };
        let start = self.rounding.start(tensor, master);
        let (exact, inner) = self.optimizer.step(lr, start, grad.cast(wide), inner);
        let (tensor, master) = self.rounding.finish(exact, stored);
        let state = (inner.is_some() || master.is_some()).then_some(MixedPrecisionState { inner, master });
        (tensor, state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        MixedPrecisionState {
            inner: state.inner.map(|inner| O::to_device(inner, device)),
            master: state.master.map(|master| master.to_device(device)),
        }
    }
}

impl Rounding {
    /// The values that an update starts from, in full precision. An element starts from its master weight if that rounds to the
    /// parameter; if it does not, other code has changed the parameter since the last step, and its value counts.
    pub(crate) fn start<const D: usize>(self, tensor: Tensor<D>, master: Option<Tensor<D>>) -> Tensor<D> {
        let stored = tensor.dtype();
        let wide = full_precision(stored);
        match master.filter(|_| self == Rounding::MasterWeights && stored != wide) {
            Some(master) => {
                let untouched = master.clone().cast(stored).equal(tensor.clone());
                tensor.cast(wide).mask_where(untouched, master)
            }
            None => tensor.cast(wide),
        }
    }

    /// The updated parameter in the dtype `stored`, and its master weights if the rounding keeps them.
    pub(crate) fn finish<const D: usize>(self, exact: Tensor<D>, stored: DType) -> (Tensor<D>, Option<Tensor<D>>) {
        if stored == exact.dtype() {
            return (exact, None);
        }
        match self {
            Rounding::Nearest => (exact.cast(stored), None),
            Rounding::Stochastic => (round_stochastically(exact, stored), None),
            Rounding::MasterWeights => (exact.clone().cast(stored), Some(exact)),
        }
    }
}

/// `x` (f32) in `dtype` (bf16 or f16), rounded to either neighbor with the probability that makes the mean exact. Made of
/// tensor operations, since Burn has no stochastic cast.
pub(crate) fn round_stochastically<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    let wide = x.dtype();
    let nearest = x.clone().cast(dtype).cast(wide);
    let error = x.clone().sub(nearest.clone());
    // Find the other neighbor: move from the nearest value towards `x` by a little more than half a spacing and round again.
    // A spacing is at most 2^(1-bits) of the value and at least half of that, so the move reaches the neighbor on either side
    // of a power of two.
    let bits = if dtype == DType::BF16 { 8 } else { 11 };
    let half_spacing = nearest.clone().abs().mul_scalar(1.01 / f64::from(1 << bits)).mul(error.clone().sign());
    let other = nearest.clone().add(half_spacing).cast(dtype).cast(wide);
    let distance = other.clone().sub(nearest.clone());
    // NaN for an exact value (0 / 0) and for a non-finite one. No draw is below NaN, so neither is moved.
    let chance = error.div(distance);
    let draw = Tensor::<D>::random(x.shape(), Distribution::Uniform(0.0, 1.0), &x.device()).cast(wide);
    let moves = draw.lower(chance);
    nearest.mask_where(moves, other).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdamWConfig, MuonConfig};

    fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    /// The mean of a bf16 matrix of ones after 200 steps, each a small part of bf16's spacing at 1.
    fn mean_after(rounding: Rounding, adamw: bool) -> f64 {
        let device = Device::default();
        let lr = 1e-4;
        let mut weight = Tensor::<2>::ones([32, 32], &device).cast(DType::BF16);
        let grad = Tensor::<2>::eye(32, &device).add_scalar(0.5).cast(DType::BF16);
        if adamw {
            let optimizer = AdamWConfig::new().with_weight_decay(0.0).with_rounding(rounding).build();
            let mut state = None;
            for _ in 0..200 {
                (weight, state) = optimizer.step(lr, weight, grad.clone(), state);
            }
        } else {
            // Without a gradient, only decay moves the weight, and it moves all elements alike.
            let config = MuonConfig::new().with_weight_decay(1.0).with_rounding(rounding);
            let optimizer = MixedPrecision { optimizer: config.build(), rounding };
            let mut state = None;
            for _ in 0..200 {
                (weight, state) = optimizer.step(lr, weight, grad.clone().zeros_like(), state);
            }
        }
        let values = floats(weight);
        values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64
    }

    #[test]
    fn tiny_updates_are_lost_to_nearest_and_kept_by_the_other_two() {
        for adamw in [false, true] {
            // AdamW's steps and those of decay alone have a length of lr: 200 of 1e-4.
            let expected = 0.98;
            assert_eq!(mean_after(Rounding::Nearest, adamw), 1.0);
            let master = mean_after(Rounding::MasterWeights, adamw);
            assert!((master - expected).abs() < 0.003, "{adamw}: {master}");
            let stochastic = mean_after(Rounding::Stochastic, adamw);
            assert!((stochastic - expected).abs() < 0.003, "{adamw}: {stochastic}");
        }
    }

    #[test]
    fn stochastic_rounding_gives_neighbors_and_is_exact_in_the_mean() {
        let device = Device::default();
        for (dtype, bits) in [(DType::BF16, 7), (DType::F16, 10)] {
            // Just above and below powers of two, of either sign.
            for value in [1.001_f32, 0.9991, -1.9999, 2.0004, -0.12503, 3.3, 1e-3] {
                let count = 20_000;
                let x = Tensor::<1>::full([count], value, &device);
                let rounded = floats(round_stochastically(x, dtype));
                let spacing = 2_f32.powi(value.abs().log2().floor() as i32 - bits);
                assert!(rounded.iter().all(|result| (result - value).abs() < spacing), "{value}");
                let mean = rounded.iter().map(|result| f64::from(*result)).sum::<f64>() / count as f64;
                let deviation = f64::from(spacing) / (count as f64).sqrt();
                assert!((mean - f64::from(value)).abs() < 3.0 * deviation, "{value} in {dtype:?}: {mean}");
            }
            // Exact and non-finite values pass through unchanged.
            let x = Tensor::<1>::from_data([0.0_f32, 1.0, -0.5, f32::INFINITY], &device);
            assert_eq!(floats(round_stochastically(x, dtype)), [0.0, 1.0, -0.5, f32::INFINITY]);
            let nan = Tensor::<1>::from_data([f32::NAN], &device);
            assert!(floats(round_stochastically(nan, dtype))[0].is_nan());
        }
    }

    #[test]
    fn master_weights_follow_changes_of_the_parameter_between_steps() {
        let device = Device::default();
        let optimizer = MixedPrecision {
            optimizer: MuonConfig::new().with_weight_decay(0.0).build(),
            rounding: Rounding::MasterWeights,
        };
        let weight = Tensor::<2>::ones([2, 2], &device).cast(DType::BF16);
        let zero = weight.zeros_like();
        let (weight, state) = optimizer.step(0.1, weight, zero.clone(), None);
        let clipped = weight.mul_scalar(0.5); // as QK-clip does
        let (after, state) = optimizer.step(0.1, clipped, zero, state);
        assert_eq!(floats(after), [0.5; 4]);
        assert_eq!(floats(state.unwrap().master.unwrap()), [0.5; 4]);
    }

    #[test]
    fn f32_parameters_have_no_master_weights() {
        let weight = Tensor::<2>::ones([2, 2], &Device::default());
        let optimizer = MixedPrecision { optimizer: MuonConfig::new().build(), rounding: Rounding::MasterWeights };
        let (_, state) = optimizer.step(0.1, weight.clone(), weight, None);
        assert!(state.unwrap().master.is_none());
    }
}
