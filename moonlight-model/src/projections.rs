//! Operations on every projection of a model: quantize, dequantize, merge adapters.

use std::collections::HashMap;

use burn::module::Param;
use burn::tensor::Tensor;

use crate::layer::DecoderLayer;
use crate::model::CausalLm;
use crate::parameter::ProjectionRole;
use crate::projection::{LayerProjection, ProjectionMut, ProjectionRef, Projections, WeightMut};
use crate::quantization::{QuantBits, QuantizedWeight};

/// A projection with its path in the model.
pub(crate) struct ModelProjection<P> {
    layer: usize,
    fields: Vec<&'static str>,
    pub(crate) role: ProjectionRole,
    pub(crate) projection: P,
}

impl<P> ModelProjection<P> {
    fn new(layer: usize, found: LayerProjection<P>) -> Self {
        let LayerProjection { fields, role, projection } = found;
        Self { layer, fields, role, projection }
    }

    /// The path, e.g. `layers.3.self_attn.q_proj`.
    pub(crate) fn path(&self) -> String {
        format!("layers.{}.{}", self.layer, self.fields.join("."))
    }

    /// The last component of the path, e.g. `q_proj`.
    pub(crate) fn name(&self) -> &'static str {
        self.fields.last().copied().unwrap_or_default()
    }
}

impl<const D: usize> WeightMut<'_, D> {
    /// The shape of the weight, even if it is quantized and `weight` is a placeholder.
    pub(crate) fn dims(&self) -> [usize; D] {
        match self.quantized.as_deref().and_then(Option::as_ref) {
            None => self.weight.lazy_shape().dims(),
            Some(quantized) => trailing_dims(quantized.dims()),
        }
    }

    /// Adds the adapter, if there is one, to the weight.
    fn merge(self) {
        let Self { weight, quantized, lora } = self;
        if lora.is_none() {
            return;
        }
        if let Some(quantized) = quantized {
            dequantize(weight, quantized);
        }
        let Some(lora) = lora.take() else { return };
        replace_value(weight, |old| lora.merged_into(old));
    }

    fn set_quantized(self, new: QuantizedWeight, path: &str) {
        let Self { weight, quantized, .. } = self;
        *quantized.unwrap_or_else(|| panic!("`{path}` is never quantized")) = Some(new);
        *weight = weight.clone().set_require_grad(false);
    }

    fn quantize(self, bits: QuantBits) {
        let dims: [usize; D] = self.dims();
        // Skips routers, which have no quantized form, and weights that are quantized already.
        let Some(quantized) = self.quantized.filter(|quantized| quantized.is_none()) else { return };
        let mut stack = [1; 3];
        stack[3 - D..].copy_from_slice(&dims); // [in, out] -> [1, in, out]
        *quantized = Some(QuantizedWeight::new(self.weight.val().reshape(stack), bits));
        // A placeholder with the dtype of the weight, which dequantizing restores; frozen, so that no optimizer updates it.
        replace_value(self.weight, |old| Tensor::zeros([1; D], (&old.device(), old.dtype())));
        *self.weight = self.weight.clone().set_require_grad(false);
    }
}

/// The last `D` dimensions: `[experts, in, out]`, or `[in, out]` of a single matrix.
fn trailing_dims<const D: usize>(dims: [usize; 3]) -> [usize; D] {
    let mut trailing = [0; D];
    trailing.copy_from_slice(&dims[3 - D..]);
    trailing
}

fn dequantize<const D: usize>(weight: &mut Param<Tensor<D>>, quantized: &mut Option<QuantizedWeight>) {
    let Some(quantized) = quantized.take() else { return };
    let dims: [usize; D] = trailing_dims(quantized.dims());
    replace_value(weight, |old| quantized.dequantized().reshape(dims).cast(old.dtype()));
}

/// Replaces the value of a parameter, and keeps its id and whether it requires a gradient.
fn replace_value<const D: usize>(param: &mut Param<Tensor<D>>, new: impl FnOnce(Tensor<D>) -> Tensor<D>) {
    *param = param.clone().map(|old| {
        let trained = old.is_require_grad();
        new(old).detach().set_require_grad(trained)
    });
}

impl DecoderLayer {
    /// Quantizes and freezes every projection; norms and router do not change.
    pub fn quantized(mut self, bits: QuantBits) -> Self {
        let mut list = Vec::new();
        self.projections_mut(&mut Vec::new(), &mut list);
        for found in list {
            match found.projection {
                ProjectionMut::Matrix(weight) => weight.quantize(bits),
                ProjectionMut::Experts(weight) => weight.quantize(bits),
            }
        }
        self
    }
}

impl CausalLm {
    /// Quantizes and freezes every projection of the layers, one layer at a time, and the head ([`quantize_head`]); embedding, norms
    /// and routers do not change.
    ///
    /// [`quantize_head`]: CausalLm::quantize_head
    pub fn quantized(mut self, bits: QuantBits) -> Self {
        self.layers = self.layers.into_iter().map(|layer| layer.quantized(bits)).collect();
        self.quantize_head()
    }

    /// Gives projections of the layers, by path (`layers.3.self_attn.q_proj`), weights that are quantized already, and freezes
    /// them. For loaders: `weight` of such a projection may be any placeholder of the model's dtype.
    ///
    /// # Panics
    ///
    /// If the model has no such projection, or it is never quantized (a router).
    pub fn with_quantized(mut self, weights: impl IntoIterator<Item = (String, QuantizedWeight)>) -> Self {
        let mut weights: HashMap<String, QuantizedWeight> = weights.into_iter().collect();
        for entry in self.projections_mut() {
            let path = entry.path();
            let Some(new) = weights.remove(&path) else { continue };
            match entry.projection {
                ProjectionMut::Matrix(weight) => weight.set_quantized(new, &path),
                ProjectionMut::Experts(weight) => weight.set_quantized(new, &path),
            }
        }
        assert!(weights.is_empty(), "the model has no projection {:?}", weights.keys());
        self
    }

    /// Quantizes and freezes the head, to 8 bits: errors of the logits are not averaged by later layers, and the head is a small part
    /// of a model. Of a tied head the embedding stays as it is, for reading tokens.
    pub fn quantize_head(mut self) -> Self {
        if self.head_quantized.is_some() {
            return self;
        }
        let weight = match &self.lm_head {
            Some(head) => head.weight.val(),
            None => self.embed_tokens.weight.val().transpose(),
        };
        self.head_quantized = Some(QuantizedWeight::new(weight.unsqueeze(), QuantBits::Eight));
        if let Some(head) = &mut self.lm_head {
            replace_value(&mut head.weight, |old| Tensor::zeros([1, 1], (&old.device(), old.dtype())));
            head.weight = head.weight.clone().set_require_grad(false);
        }
        self
    }

    /// Replaces quantized weights by their dequantized values, in the dtype that they had before quantization.
    pub fn dequantized(mut self) -> Self {
        for entry in self.projections_mut() {
            match entry.projection {
                ProjectionMut::Matrix(WeightMut { weight, quantized: Some(quantized), .. }) => {
                    dequantize(weight, quantized);
                }
                ProjectionMut::Experts(WeightMut { weight, quantized: Some(quantized), .. }) => {
                    dequantize(weight, quantized);
                }
                ProjectionMut::Matrix(_) | ProjectionMut::Experts(_) => {}
            }
        }
        match &mut self.lm_head {
            Some(head) => dequantize(&mut head.weight, &mut self.head_quantized),
            None => self.head_quantized = None,
        }
        self
    }

    /// Adds each adapter to its weight and removes it. A frozen weight stays frozen; a quantized weight that has an adapter is
    /// dequantized first.
    pub fn merge(mut self) -> Self {
        for entry in self.projections_mut() {
            match entry.projection {
                ProjectionMut::Matrix(weight) => weight.merge(),
                ProjectionMut::Experts(weight) => weight.merge(),
            }
        }
        self
    }

    /// Whether any weight is quantized.
    pub fn is_quantized(&self) -> bool {
        self.quantized_bytes() > 0
    }

    /// Bytes of all quantized weights, scales and the head included.
    pub fn quantized_bytes(&self) -> usize {
        let quantized = self.projections().into_iter().filter_map(|entry| match entry.projection {
            ProjectionRef::Matrix(weight) => weight.quantized.and_then(Option::as_ref),
            ProjectionRef::Experts(weight) => weight.quantized.and_then(Option::as_ref),
        });
        quantized.chain(&self.head_quantized).map(QuantizedWeight::bytes).sum()
    }

    /// Every projection of the decoder layers, routers included; not embedding, head and norms.
    pub(crate) fn projections(&self) -> Vec<ModelProjection<ProjectionRef<'_>>> {
        let of_layer = |(layer, module): (usize, _)| {
            let mut list = Vec::new();
            DecoderLayer::projections(module, &mut Vec::new(), &mut list);
            list.into_iter().map(move |found| ModelProjection::new(layer, found))
        };
        self.layers.iter().enumerate().flat_map(of_layer).collect()
    }

    /// See [`projections`](CausalLm::projections).
    pub(crate) fn projections_mut(&mut self) -> Vec<ModelProjection<ProjectionMut<'_>>> {
        let of_layer = |(layer, module): (usize, _)| {
            let mut list = Vec::new();
            DecoderLayer::projections_mut(module, &mut Vec::new(), &mut list);
            list.into_iter().map(move |found| ModelProjection::new(layer, found))
        };
        self.layers.iter_mut().enumerate().flat_map(of_layer).collect()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use crate::config::{ModelConfig, PRESETS};

    /// A projection missing from a module's `projections_of_fields!` would be neither quantized nor adapted.
    #[test]
    fn the_projections_are_those_of_the_list_of_parameters() {
        for preset in PRESETS {
            let config = ModelConfig::preset(preset).unwrap();
            let listed: Vec<_> = config
                .parameter_shapes()
                .into_iter()
                .filter(|parameter| parameter.kind.is_projection())
                .map(|parameter| (parameter.path.trim_end_matches(".weight").to_owned(), parameter.role.unwrap()))
                .collect();
            let mut model = config.init(&Device::default());
            let found: Vec<_> = model.projections().iter().map(|entry| (entry.path(), entry.role)).collect();
            assert_eq!(found, listed, "{preset}");
            let found: Vec<_> = model.projections_mut().iter().map(|entry| (entry.path(), entry.role)).collect();
            assert_eq!(found, listed, "{preset}");
        }
    }
}
