//! What is done to every projection of the decoder's layers, whatever kind of layer it is in: quantizing, dequantizing,
//! merging.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::layer::DecoderLayer;
use crate::model::CausalLm;
use crate::parameter::ProjectionRole;
use crate::projection::{LayerProjection, ProjectionMut, ProjectionRef, Projections, WeightMut};
use crate::quantization::{QuantBits, QuantizedWeight};

/// A projection of a model.
pub(crate) struct ModelProjection<P> {
    layer: usize,
    fields: Vec<&'static str>,
    pub(crate) role: ProjectionRole,
    pub(crate) projection: P,
}

impl<P> ModelProjection<P> {
    fn new(layer: usize, placed: LayerProjection<P>) -> Self {
        let LayerProjection { fields, role, projection } = placed;
        Self { layer, fields, role, projection }
    }

    /// The path, e.g. `layers.3.self_attn.q_proj`.
    pub(crate) fn path(&self) -> String {
        format!("layers.{}.{}", self.layer, self.fields.join("."))
    }

    /// The last name of the path.
    pub(crate) fn name(&self) -> &'static str {
        self.fields.last().copied().unwrap_or_default()
    }
}

impl<const D: usize> WeightMut<'_, D> {
    /// The shape of the weight, quantized or not.
    pub(crate) fn dims(&self) -> [usize; D] {
        match self.quantized.as_deref().and_then(Option::as_ref) {
            None => self.weight.lazy_shape().dims(),
            Some(quantized) => trailing_dims(quantized.dims()),
        }
    }

    /// Adds the adapter, where there is one, to the weight.
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

    fn quantize(self, bits: QuantBits) {
        let dims: [usize; D] = self.dims();
        let Some(quantized) = self.quantized.filter(|quantized| quantized.is_none()) else { return };
        let mut stack = [1; 3];
        stack[3 - D..].copy_from_slice(&dims);
        *quantized = Some(QuantizedWeight::new(self.weight.val().reshape(stack), bits));
        replace_value(self.weight, |old| Tensor::zeros([1; D], (&old.device(), old.dtype())));
        *self.weight = self.weight.clone().set_require_grad(false);
    }
}

fn trailing_dims<const D: usize>(dims: [usize; 3]) -> [usize; D] {
    let mut own = [0; D];
    own.copy_from_slice(&dims[3 - D..]);
    own
}

fn dequantize<const D: usize>(weight: &mut Param<Tensor<D>>, quantized: &mut Option<QuantizedWeight>) {
    let Some(quantized) = quantized.take() else { return };
    let dims: [usize; D] = trailing_dims(quantized.dims());
    replace_value(weight, |old| quantized.dequantized().reshape(dims).cast(old.dtype()));
}

/// A new value, which trains as the old one did.
fn replace_value<const D: usize>(param: &mut Param<Tensor<D>>, new: impl FnOnce(Tensor<D>) -> Tensor<D>) {
    *param = param.clone().map(|old| {
        let trained = old.is_require_grad();
        new(old).detach().set_require_grad(trained)
    });
}

impl DecoderLayer {
    /// The layer with every projection in few bits and frozen; norms and router stay as they are.
    pub fn quantized(mut self, bits: QuantBits) -> Self {
        let mut list = Vec::new();
        self.projections_mut(&mut Vec::new(), &mut list);
        for placed in list {
            match placed.projection {
                ProjectionMut::Matrix(weight) => weight.quantize(bits),
                ProjectionMut::Experts(weight) => weight.quantize(bits),
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
        for each in self.projections_mut() {
            match each.projection {
                ProjectionMut::Matrix(WeightMut { weight, quantized: Some(quantized), .. }) => {
                    dequantize(weight, quantized);
                }
                ProjectionMut::Experts(WeightMut { weight, quantized: Some(quantized), .. }) => {
                    dequantize(weight, quantized);
                }
                ProjectionMut::Matrix(_) | ProjectionMut::Experts(_) => {}
            }
        }
        self
    }

    /// The model with its adapters added to its weights; gradients reach the weights as they did before. A weight in few
    /// bits that has an adapter is dequantized for it.
    pub fn merge(mut self) -> Self {
        for each in self.projections_mut() {
            match each.projection {
                ProjectionMut::Matrix(weight) => weight.merge(),
                ProjectionMut::Experts(weight) => weight.merge(),
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
        let quantized = self.projections().into_iter().filter_map(|each| match each.projection {
            ProjectionRef::Matrix(weight) => weight.quantized.and_then(Option::as_ref),
            ProjectionRef::Experts(weight) => weight.quantized.and_then(Option::as_ref),
        });
        quantized.map(QuantizedWeight::bytes).sum()
    }

    /// Every projection of the decoder's layers, routers included. Embedding, head and norms are none.
    pub(crate) fn projections(&self) -> Vec<ModelProjection<ProjectionRef<'_>>> {
        let of_layer = |(layer, module): (usize, _)| {
            let mut list = Vec::new();
            DecoderLayer::projections(module, &mut Vec::new(), &mut list);
            list.into_iter().map(move |placed| ModelProjection::new(layer, placed))
        };
        self.layers.iter().enumerate().flat_map(of_layer).collect()
    }

    /// [`projections`](CausalLm::projections), to change them.
    pub(crate) fn projections_mut(&mut self) -> Vec<ModelProjection<ProjectionMut<'_>>> {
        let of_layer = |(layer, module): (usize, _)| {
            let mut list = Vec::new();
            DecoderLayer::projections_mut(module, &mut Vec::new(), &mut list);
            list.into_iter().map(move |placed| ModelProjection::new(layer, placed))
        };
        self.layers.iter_mut().enumerate().flat_map(of_layer).collect()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use crate::config::{ModelConfig, PRESETS};

    /// A projection that a module forgets to name in `projections_of_fields!` would be neither quantized nor adapted.
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
            let found: Vec<_> = model.projections().iter().map(|each| (each.path(), each.role)).collect();
            assert_eq!(found, listed, "{preset}");
            let found: Vec<_> = model.projections_mut().iter().map(|each| (each.path(), each.role)).collect();
            assert_eq!(found, listed, "{preset}");
        }
    }
}
