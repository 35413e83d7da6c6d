//! Every projection of the decoder's layers in turn, whatever kind of layer it stands in.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::attention::Attention;
use crate::layer::{DecoderLayer, FeedForward};
use crate::lora::LowRank;
use crate::mlp::Mlp;
use crate::model::CausalLm;
use crate::projection::Projection;
use crate::quantization::{QuantBits, QuantizedWeight};

/// A weight with what may stand in its place and beside it.
pub(crate) struct WeightMut<'a, const D: usize> {
    pub(crate) weight: &'a mut Param<Tensor<D>>,
    pub(crate) quantized: &'a mut Option<QuantizedWeight>,
    pub(crate) lora: &'a mut Option<LowRank<D>>,
}

/// A matrix, or a stack of experts'.
pub(crate) enum ProjectionMut<'a> {
    Matrix(WeightMut<'a, 2>),
    Experts(WeightMut<'a, 3>),
}

impl<const D: usize> WeightMut<'_, D> {
    /// The shape of the weight, quantized or not.
    pub(crate) fn dims(&self) -> [usize; D] {
        match &*self.quantized {
            None => self.weight.lazy_shape().dims(),
            Some(quantized) => last(quantized.dims()),
        }
    }

    /// Adds the adapter, where there is one, to the weight.
    pub(crate) fn merge(self) {
        let Self { weight, quantized, lora } = self;
        if lora.is_none() {
            return;
        }
        dequantize(weight, quantized);
        let Some(lora) = lora.take() else { return };
        replace(weight, |old| lora.merged_into(old));
    }

    fn quantize(self, bits: QuantBits) {
        if self.quantized.is_some() {
            return;
        }
        let dims: [usize; D] = self.dims();
        let mut stack = [1; 3];
        stack[3 - D..].copy_from_slice(&dims);
        *self.quantized = Some(QuantizedWeight::new(self.weight.val().reshape(stack), bits));
        replace(self.weight, |old| Tensor::zeros([1; D], (&old.device(), old.dtype())));
        *self.weight = self.weight.clone().set_require_grad(false);
    }
}

fn last<const D: usize>(dims: [usize; 3]) -> [usize; D] {
    let mut own = [0; D];
    own.copy_from_slice(&dims[3 - D..]);
    own
}

fn dequantize<const D: usize>(weight: &mut Param<Tensor<D>>, quantized: &mut Option<QuantizedWeight>) {
    let Some(quantized) = quantized.take() else { return };
    let dims: [usize; D] = last(quantized.dims());
    replace(weight, |old| quantized.dequantized().reshape(dims).cast(old.dtype()));
}

/// A new value, which trains as the old one did.
fn replace<const D: usize>(param: &mut Param<Tensor<D>>, new: impl FnOnce(Tensor<D>) -> Tensor<D>) {
    *param = param.clone().map(|old| {
        let trained = old.is_require_grad();
        new(old).detach().set_require_grad(trained)
    });
}

impl DecoderLayer {
    /// The layer with every projection in few bits and frozen; norms and router stay as they are.
    pub fn quantized(mut self, bits: QuantBits) -> Self {
        let mut slots = Vec::new();
        push_layer(&mut slots, "", &mut self);
        for (_, slot) in slots {
            match slot {
                ProjectionMut::Matrix(place) => place.quantize(bits),
                ProjectionMut::Experts(place) => place.quantize(bits),
            }
        }
        self
    }
}

impl CausalLm {
    /// The model with every projection of its layers in few bits and frozen; embedding, head, norms and routers stay as they
    /// are.
    pub fn quantized(mut self, bits: QuantBits) -> Self {
        self.layers = self.layers.into_iter().map(|layer| layer.quantized(bits)).collect();
        self
    }

    /// The model with its weights in full again, as far as the bits have kept them.
    pub fn dequantized(mut self) -> Self {
        for (_, slot) in self.projections_mut() {
            match slot {
                ProjectionMut::Matrix(WeightMut { weight, quantized, .. }) => dequantize(weight, quantized),
                ProjectionMut::Experts(WeightMut { weight, quantized, .. }) => dequantize(weight, quantized),
            }
        }
        self
    }

    /// Whether any weight is in few bits.
    pub fn is_quantized(&self) -> bool {
        self.quantized_bytes() > 0
    }

    /// Bytes of all weights in few bits, with their scales.
    pub fn quantized_bytes(&self) -> usize {
        let mut model = self.clone();
        let slots = model.projections_mut();
        let of = |quantized: &Option<QuantizedWeight>| quantized.as_ref().map_or(0, QuantizedWeight::bytes);
        slots
            .iter()
            .map(|(_, slot)| match slot {
                ProjectionMut::Matrix(place) => of(place.quantized),
                ProjectionMut::Experts(place) => of(place.quantized),
            })
            .sum()
    }

    /// Every projection of the decoder's layers with its path. Embedding, head, routers and norms are none.
    pub(crate) fn projections_mut(&mut self) -> Vec<(String, ProjectionMut<'_>)> {
        let mut slots = Vec::new();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            push_layer(&mut slots, &format!("layers.{index}."), layer);
        }
        slots
    }
}

fn push_layer<'a>(slots: &mut Vec<(String, ProjectionMut<'a>)>, path: &str, layer: &'a mut DecoderLayer) {
    let mut matrix = |name: &str, projection| push(slots, format!("{path}self_attn.{name}"), projection);
    match &mut layer.self_attn {
        Attention::Mla(attention) => {
            for (name, projection) in [
                ("q_proj", &mut attention.q_proj),
                ("q_a_proj", &mut attention.q_a_proj),
                ("q_b_proj", &mut attention.q_b_proj),
            ] {
                if let Some(projection) = projection {
                    matrix(name, projection);
                }
            }
            matrix("kv_a_proj_with_mqa", &mut attention.kv_a_proj_with_mqa);
            matrix("kv_b_proj", &mut attention.kv_b_proj);
            matrix("o_proj", &mut attention.o_proj);
        }
        Attention::Gqa(attention) => {
            matrix("q_proj", &mut attention.q_proj);
            matrix("k_proj", &mut attention.k_proj);
            matrix("v_proj", &mut attention.v_proj);
            matrix("o_proj", &mut attention.o_proj);
        }
    }
    match &mut layer.mlp {
        FeedForward::Dense(mlp) => push_mlp(slots, &format!("{path}mlp"), mlp),
        FeedForward::Moe(moe) => {
            let experts = &mut moe.experts;
            for (name, weight, quantized, lora) in [
                ("gate_proj", &mut experts.gate_proj, &mut experts.gate_quantized, &mut experts.gate_lora),
                ("up_proj", &mut experts.up_proj, &mut experts.up_quantized, &mut experts.up_lora),
                ("down_proj", &mut experts.down_proj, &mut experts.down_quantized, &mut experts.down_lora),
            ] {
                slots.push((
                    format!("{path}mlp.experts.{name}"),
                    ProjectionMut::Experts(WeightMut { weight, quantized, lora }),
                ));
            }
            if let Some(shared) = &mut moe.shared_experts {
                push_mlp(slots, &format!("{path}mlp.shared_experts"), shared);
            }
        }
    }
}

fn push<'a>(slots: &mut Vec<(String, ProjectionMut<'a>)>, path: String, projection: &'a mut Projection) {
    let Projection { weight, quantized, lora, .. } = projection;
    slots.push((path, ProjectionMut::Matrix(WeightMut { weight, quantized, lora })));
}

fn push_mlp<'a>(slots: &mut Vec<(String, ProjectionMut<'a>)>, path: &str, mlp: &'a mut Mlp) {
    push(slots, format!("{path}.gate_proj"), &mut mlp.gate_proj);
    push(slots, format!("{path}.up_proj"), &mut mlp.up_proj);
    push(slots, format!("{path}.down_proj"), &mut mlp.down_proj);
}
