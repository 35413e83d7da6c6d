//! Every projection of the decoder's layers in turn, whatever kind of layer it stands in.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::attention::Attention;
use crate::kernels::QuantBits as Bits;
use crate::layer::{DecoderLayer, FeedForward};
use crate::lora::LowRank;
use crate::mlp::Mlp;
use crate::model::CausalLm;
use crate::packed::Packed;
use crate::projection::Projection;

/// A weight with what may stand in its place and beside it.
pub(crate) struct Place<'a, const D: usize> {
    pub(crate) weight: &'a mut Param<Tensor<D>>,
    pub(crate) packed: &'a mut Option<Packed>,
    pub(crate) lora: &'a mut Option<LowRank<D>>,
}

/// A matrix, or a stack of experts'.
pub(crate) enum Slot<'a> {
    Matrix(Place<'a, 2>),
    Experts(Place<'a, 3>),
}

impl<const D: usize> Place<'_, D> {
    /// The shape of the weight, packed or not.
    pub(crate) fn dims(&self) -> [usize; D] {
        match &*self.packed {
            None => self.weight.lazy_shape().dims(),
            Some(packed) => last(packed.dims()),
        }
    }

    /// Adds the adapter, where there is one, to the weight.
    pub(crate) fn merge(self) {
        let Self { weight, packed, lora } = self;
        if lora.is_none() {
            return;
        }
        unpack(weight, packed);
        let Some(lora) = lora.take() else { return };
        replace(weight, |old| lora.merged_into(old));
    }

    fn pack(self, bits: Bits) {
        if self.packed.is_some() {
            return;
        }
        let dims: [usize; D] = self.dims();
        let mut stack = [1; 3];
        stack[3 - D..].copy_from_slice(&dims);
        *self.packed = Some(Packed::new(self.weight.val().reshape(stack), bits));
        replace(self.weight, |old| Tensor::zeros([1; D], (&old.device(), old.dtype())));
        *self.weight = self.weight.clone().set_require_grad(false);
    }
}

fn last<const D: usize>(dims: [usize; 3]) -> [usize; D] {
    let mut own = [0; D];
    own.copy_from_slice(&dims[3 - D..]);
    own
}

fn unpack<const D: usize>(weight: &mut Param<Tensor<D>>, packed: &mut Option<Packed>) {
    let Some(packed) = packed.take() else { return };
    let dims: [usize; D] = last(packed.dims());
    replace(weight, |old| packed.unpacked().reshape(dims).cast(old.dtype()));
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
    pub fn packed(mut self, bits: Bits) -> Self {
        let mut slots = Vec::new();
        push_layer(&mut slots, "", &mut self);
        for (_, slot) in slots {
            match slot {
                Slot::Matrix(place) => place.pack(bits),
                Slot::Experts(place) => place.pack(bits),
            }
        }
        self
    }
}

impl CausalLm {
    /// The model with every projection of its layers in few bits and frozen; embedding, head, norms and routers stay as they
    /// are.
    pub fn packed(mut self, bits: Bits) -> Self {
        self.layers = self.layers.into_iter().map(|layer| layer.packed(bits)).collect();
        self
    }

    /// The model with its weights in full again, as far as the bits have kept them.
    pub fn unpacked(mut self) -> Self {
        for (_, slot) in self.slots() {
            match slot {
                Slot::Matrix(Place { weight, packed, .. }) => unpack(weight, packed),
                Slot::Experts(Place { weight, packed, .. }) => unpack(weight, packed),
            }
        }
        self
    }

    /// Whether any weight is in few bits.
    pub fn is_packed(&self) -> bool {
        self.packed_bytes() > 0
    }

    /// Bytes of all weights in few bits, with their scales.
    pub fn packed_bytes(&self) -> usize {
        let mut model = self.clone();
        let slots = model.slots();
        let of = |packed: &Option<Packed>| packed.as_ref().map_or(0, Packed::bytes);
        slots
            .iter()
            .map(|(_, slot)| match slot {
                Slot::Matrix(place) => of(place.packed),
                Slot::Experts(place) => of(place.packed),
            })
            .sum()
    }

    /// Every projection of the decoder's layers with its path. Embedding, head, routers and norms are none.
    pub(crate) fn slots(&mut self) -> Vec<(String, Slot<'_>)> {
        let mut slots = Vec::new();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            push_layer(&mut slots, &format!("layers.{index}."), layer);
        }
        slots
    }
}

fn push_layer<'a>(slots: &mut Vec<(String, Slot<'a>)>, path: &str, layer: &'a mut DecoderLayer) {
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
            for (name, weight, packed, lora) in [
                ("gate_proj", &mut experts.gate_proj, &mut experts.gate_packed, &mut experts.gate_lora),
                ("up_proj", &mut experts.up_proj, &mut experts.up_packed, &mut experts.up_lora),
                ("down_proj", &mut experts.down_proj, &mut experts.down_packed, &mut experts.down_lora),
            ] {
                slots.push((format!("{path}mlp.experts.{name}"), Slot::Experts(Place { weight, packed, lora })));
            }
            if let Some(shared) = &mut moe.shared_experts {
                push_mlp(slots, &format!("{path}mlp.shared_experts"), shared);
            }
        }
    }
}

fn push<'a>(slots: &mut Vec<(String, Slot<'a>)>, path: String, projection: &'a mut Projection) {
    let Projection { weight, packed, lora, .. } = projection;
    slots.push((path, Slot::Matrix(Place { weight, packed, lora })));
}

fn push_mlp<'a>(slots: &mut Vec<(String, Slot<'a>)>, path: &str, mlp: &'a mut Mlp) {
    push(slots, format!("{path}.gate_proj"), &mut mlp.gate_proj);
    push(slots, format!("{path}.up_proj"), &mut mlp.up_proj);
    push(slots, format!("{path}.down_proj"), &mut mlp.down_proj);
}
