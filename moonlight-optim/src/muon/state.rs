//! Muon's state.

use burn::optim::{RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor};
use burn_pack::Scalar;

/// Muon's state of one parameter: one tensor of the parameter's shape, half of what AdamW keeps.
#[derive(Clone, Debug)]
pub struct MuonState<const D: usize> {
    /// `M`, in f32 (f64 for f64 parameters) or bf16.
    pub momentum: Tensor<D>,
    /// The second moment of [`Adaptive`](crate::Adaptive). AdaMuon: `[batch, A, B]`. NorMuon: `[batch, 1, out]` for weights
    /// stored `[in, out]`, `[batch, out, 1]` for `[out, in]`. If [`Blocks`](crate::Blocks) split the input side, NorMuon has
    /// an entry for each block in place of the 1.
    pub second_moment: Option<Tensor<3>>,
    /// Steps taken so far.
    pub step: usize,
}

impl<const D: usize> RecordState for MuonState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_tensor(prefix, "momentum", self.momentum.clone().into_data());
        if let Some(second_moment) = &self.second_moment {
            out.push_tensor(prefix, "second_moment", second_moment.clone().into_data());
        }
        out.push_scalar(prefix, "step", Scalar::from(self.step));
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        // In the file's dtype, not the device's default: a state must load bit for bit.
        let data = src.take_tensor(prefix, "momentum")?;
        let dtype = data.dtype();
        let momentum = Tensor::from_data(data, (device, dtype));
        let second_moment = src.take_tensor(prefix, "second_moment").map(|data| {
            let dtype = data.dtype();
            Tensor::from_data(data, (device, dtype))
        });
        // Earlier versions saved no step. Only a momentum warm-up and decay schedules depend on it.
        let step = src.take_scalar(prefix, "step").and_then(|step| usize::try_from(step).ok()).unwrap_or(0);
        Some(Self { momentum, second_moment, step })
    }
}
