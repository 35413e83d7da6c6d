//! Initialization of parameters: normal with the configured standard deviation, biases zero, drawn when first read.
//!
//! Every parameter of the crate is made here. The call names the kind and role of the parameter, so both are stated once, in the
//! module that has the parameter; [`ModelConfig::parameter_shapes`] reads them from here.
//!
//! [`ModelConfig::parameter_shapes`]: crate::ModelConfig::parameter_shapes

use std::cell::RefCell;
use std::collections::HashMap;

use burn::module::{Initializer, Param, ParamId};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};

use crate::parameter::{MlpRole, ParameterKind, ProjectionRole};
use crate::projection::Projection;

/// Kind and role of each parameter, by its id.
pub(crate) type ParameterKinds = RefCell<HashMap<ParamId, (ParameterKind, Option<ProjectionRole>)>>;

/// Makes parameters on a device, and records their kinds and roles if a map is given.
#[derive(Clone, Copy)]
pub(crate) struct Init<'a> {
    pub(crate) device: &'a Device,
    kinds: Option<&'a ParameterKinds>,
}

impl<'a> Init<'a> {
    pub(crate) fn new(device: &'a Device) -> Self {
        Self { device, kinds: None }
    }

    /// Records kind and role of each parameter in `kinds`.
    pub(crate) fn recording(device: &'a Device, kinds: &'a ParameterKinds) -> Self {
        Self { device, kinds: Some(kinds) }
    }

    /// A projection, `[input, output]`.
    pub(crate) fn projection(
        self,
        role: ProjectionRole,
        [input, output]: [usize; 2],
        bias: bool,
        deviation: f64,
    ) -> Projection {
        let weight = self.normal(ParameterKind::Matrix, Some(role), [input, output], deviation);
        let bias =
            bias.then(|| self.record(Initializer::Zeros.init([output], self.device), ParameterKind::Bias, Some(role)));
        Projection { weight, bias, lora: None, quantized: None, role }
    }

    /// One projection of all routed experts, `[experts, input, output]`.
    pub(crate) fn experts(self, role: MlpRole, shape: [usize; 3], deviation: f64) -> Param<Tensor<3>> {
        self.normal(ParameterKind::Experts, Some(ProjectionRole::Experts(role)), shape, deviation)
    }

    /// A router's matrix, `[hidden, experts]`.
    pub(crate) fn router(self, shape: [usize; 2], deviation: f64) -> Param<Tensor<2>> {
        self.normal(ParameterKind::Router, Some(ProjectionRole::Router), shape, deviation)
    }

    /// A router's correction bias, `[experts]`: a buffer that is updated by a rule and has no gradient.
    pub(crate) fn correction_bias(self, experts: usize) -> Param<Tensor<1>> {
        let bias = Initializer::Zeros.init([experts], self.device).set_require_grad(false);
        self.record(bias, ParameterKind::CorrectionBias, None)
    }

    /// The gain of a norm, `[width]`.
    pub(crate) fn gain(self, width: usize) -> Param<Tensor<1>> {
        self.record(Initializer::Ones.init([width], self.device), ParameterKind::Norm, None)
    }

    /// The output head, `[input, output]`.
    pub(crate) fn head(self, [input, output]: [usize; 2], deviation: f64) -> Linear {
        let config = LinearConfig::new(input, output).with_bias(false).with_initializer(normal(deviation));
        let mut head = config.init(self.device);
        head.weight = self.record(head.weight, ParameterKind::Head, None);
        head
    }

    /// The token embedding, `[rows, width]`.
    pub(crate) fn embedding(self, [rows, width]: [usize; 2], deviation: f64) -> Embedding {
        let mut embedding = EmbeddingConfig::new(rows, width).with_initializer(normal(deviation)).init(self.device);
        embedding.weight = self.record(embedding.weight, ParameterKind::Embedding, None);
        embedding
    }

    fn normal<const D: usize>(
        self,
        kind: ParameterKind,
        role: Option<ProjectionRole>,
        shape: [usize; D],
        deviation: f64,
    ) -> Param<Tensor<D>> {
        self.record(normal(deviation).init(shape, self.device), kind, role)
    }

    fn record<const D: usize>(
        self,
        param: Param<Tensor<D>>,
        kind: ParameterKind,
        role: Option<ProjectionRole>,
    ) -> Param<Tensor<D>> {
        if let Some(kinds) = self.kinds {
            kinds.borrow_mut().insert(param.id, (kind, role));
        }
        param
    }
}

fn normal(deviation: f64) -> Initializer {
    Initializer::Normal { mean: 0.0, std: deviation }
}
