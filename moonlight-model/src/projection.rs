//! [`Projection`], a linear layer of the decoder that may be quantized or have a LoRA adapter, and the search for projections in
//! a module.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::kernels::project;
use crate::lora::low_rank::LowRank;
use crate::parameter::ProjectionRole;
use crate::quantization::QuantizedWeight;

/// A linear layer: `x W + bias`, plus `s x A B` if it has an adapter.
///
/// The layers make their projections; `CausalLm::quantized` and `CausalLm::with_lora` change them.
#[derive(Module, Debug)]
pub struct Projection {
    /// `[in, out]`; a `[1, 1]` zero if the weight is quantized, so that its path and dtype are kept.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// The adapter, which is trained instead of the weight.
    pub lora: Option<LowRank<2>>,
    /// The weight in 8 or 4 bits, used instead of `weight`.
    pub quantized: Option<QuantizedWeight>,
    #[module(skip)]
    pub(crate) role: ProjectionRole,
}

impl Projection {
    /// Applies the projection, its bias and its adapter.
    ///
    /// # Shapes
    ///
    /// - x: `[rows, in]`
    /// - output: `[rows, out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.lora {
            None => self.base(x),
            Some(lora) => self.base(x.clone()) + lora.forward(x),
        }
    }

    /// Which projection of its layer it is.
    pub fn role(&self) -> ProjectionRole {
        self.role
    }

    /// The projection as the kernel that decodes few tokens reads it; `None` if it cannot, or with an adapter.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self) -> Option<few_tokens::Matrix> {
        if self.lora.is_some() {
            return None;
        }
        let matrix = match &self.quantized {
            None => few_tokens::Matrix::new(self.weight.val()),
            Some(quantized) => quantized.few_tokens(),
        };
        matrix?.with_bias(self.bias.as_ref().map(Param::val))
    }

    /// `x W + bias`, without the adapter.
    fn base(&self, x: Tensor<2>) -> Tensor<2> {
        let product = match &self.quantized {
            None => project(x, self.weight.val()),
            Some(quantized) => quantized.product(x),
        };
        match &self.bias {
            None => product,
            Some(bias) => product + bias.val().unsqueeze(),
        }
    }

    /// The weight with its adapter merged, dequantized: `[in, out]`, in the dtype of `weight`.
    pub fn effective_weight(&self) -> Tensor<2> {
        let weight = match &self.quantized {
            None => self.weight.val(),
            Some(quantized) => quantized.dequantized().squeeze_dim(0).cast(self.weight.val().dtype()),
        };
        match &self.lora {
            None => weight,
            Some(lora) => lora.merged_into(weight),
        }
    }
}

/// Shared access to the quantized form and the adapter of a weight.
pub(crate) struct WeightRef<'a, const D: usize> {
    /// The outer option is `None` for a weight that is never quantized (a router's).
    pub(crate) quantized: Option<&'a Option<QuantizedWeight>>,
    pub(crate) lora: &'a Option<LowRank<D>>,
}

/// Mutable access to a weight, its quantized form and its adapter.
pub(crate) struct WeightMut<'a, const D: usize> {
    pub(crate) weight: &'a mut Param<Tensor<D>>,
    /// The outer option is `None` for a weight that is never quantized (a router's).
    pub(crate) quantized: Option<&'a mut Option<QuantizedWeight>>,
    pub(crate) lora: &'a mut Option<LowRank<D>>,
}

/// A projection of any rank: a matrix, or the stack of all experts' matrices.
pub(crate) enum ProjectionRef<'a> {
    Matrix(WeightRef<'a, 2>),
    Experts(WeightRef<'a, 3>),
}

/// See [`ProjectionRef`].
pub(crate) enum ProjectionMut<'a> {
    Matrix(WeightMut<'a, 2>),
    Experts(WeightMut<'a, 3>),
}

/// A projection with its path within a decoder layer.
pub(crate) struct LayerProjection<P> {
    /// The names of the fields from the decoder layer down, e.g. `["self_attn", "q_proj"]`.
    pub(crate) fields: Vec<&'static str>,
    pub(crate) role: ProjectionRole,
    pub(crate) projection: P,
}

/// Lists every projection of a module in the order of its fields. [`projections_of_fields`] implements it.
pub(crate) trait Projections {
    /// Appends the projections to `list`; `path` has the names of the fields from the decoder layer to this module.
    fn projections<'a>(&'a self, path: &mut Vec<&'static str>, list: &mut Vec<LayerProjection<ProjectionRef<'a>>>);

    /// See [`Projections::projections`].
    fn projections_mut<'a>(
        &'a mut self,
        path: &mut Vec<&'static str>,
        list: &mut Vec<LayerProjection<ProjectionMut<'a>>>,
    );
}

impl Projections for Projection {
    fn projections<'a>(&'a self, path: &mut Vec<&'static str>, list: &mut Vec<LayerProjection<ProjectionRef<'a>>>) {
        let Self { quantized, lora, role, .. } = self;
        let projection = ProjectionRef::Matrix(WeightRef { quantized: Some(quantized), lora });
        list.push(LayerProjection { fields: path.clone(), role: *role, projection });
    }

    fn projections_mut<'a>(
        &'a mut self,
        path: &mut Vec<&'static str>,
        list: &mut Vec<LayerProjection<ProjectionMut<'a>>>,
    ) {
        let Self { weight, quantized, lora, role, .. } = self;
        let projection = ProjectionMut::Matrix(WeightMut { weight, quantized: Some(quantized), lora });
        list.push(LayerProjection { fields: path.clone(), role: *role, projection });
    }
}

impl<T: Projections> Projections for Option<T> {
    fn projections<'a>(&'a self, path: &mut Vec<&'static str>, list: &mut Vec<LayerProjection<ProjectionRef<'a>>>) {
        if let Some(module) = self {
            module.projections(path, list);
        }
    }

    fn projections_mut<'a>(
        &'a mut self,
        path: &mut Vec<&'static str>,
        list: &mut Vec<LayerProjection<ProjectionMut<'a>>>,
    ) {
        if let Some(module) = self {
            module.projections_mut(path, list);
        }
    }
}

/// Implements [`Projections`] for a struct, given the fields that are or contain projections.
macro_rules! projections_of_fields {
    ($module:ident { $($field:ident),+ }) => {
        impl $crate::projection::Projections for $module {
            fn projections<'a>(
                &'a self,
                path: &mut Vec<&'static str>,
                list: &mut Vec<$crate::projection::LayerProjection<$crate::projection::ProjectionRef<'a>>>,
            ) {
                $(
                    path.push(stringify!($field));
                    $crate::projection::Projections::projections(&self.$field, path, list);
                    path.pop();
                )+
            }

            fn projections_mut<'a>(
                &'a mut self,
                path: &mut Vec<&'static str>,
                list: &mut Vec<$crate::projection::LayerProjection<$crate::projection::ProjectionMut<'a>>>,
            ) {
                $(
                    path.push(stringify!($field));
                    $crate::projection::Projections::projections_mut(&mut self.$field, path, list);
                    path.pop();
                )+
            }
        }
    };
}

/// Implements [`Projections`] for an enum of modules, given its variants.
macro_rules! projections_of_variants {
    ($module:ident { $($variant:ident),+ }) => {
        impl $crate::projection::Projections for $module {
            fn projections<'a>(
                &'a self,
                path: &mut Vec<&'static str>,
                list: &mut Vec<$crate::projection::LayerProjection<$crate::projection::ProjectionRef<'a>>>,
            ) {
                match self { $(Self::$variant(module) => module.projections(path, list)),+ }
            }

            fn projections_mut<'a>(
                &'a mut self,
                path: &mut Vec<&'static str>,
                list: &mut Vec<$crate::projection::LayerProjection<$crate::projection::ProjectionMut<'a>>>,
            ) {
                match self { $(Self::$variant(module) => module.projections_mut(path, list)),+ }
            }
        }
    };
}

pub(crate) use {projections_of_fields, projections_of_variants};
