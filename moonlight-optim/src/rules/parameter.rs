//! The parameters of a module, as rules see them.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};

/// A parameter or buffer of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// The names from the root of the module, separated by dots: `layers.0.up.weight`.
    pub path: String,
    /// The shape as stored.
    pub shape: Vec<usize>,
    /// The type of the module that holds it, such as `Linear`.
    pub module: String,
    /// Whether it gets gradients. Otherwise it is a buffer, to which rules do not apply.
    pub trainable: bool,
    /// Burn's id of the parameter. The same id at two paths means one shared tensor.
    pub id: ParamId,
}

impl Parameter {
    /// All parameters and buffers of a module, in the module's order.
    pub fn of<M: Module>(module: &M) -> Vec<Parameter> {
        let mut collector = Collector::default();
        module.visit(&mut collector);
        if collector.parameters.iter().any(|parameter| parameter.trainable) {
            return collector.parameters;
        }
        // A module on a device without autodiff requires no gradients. `train` marks the parameters that would require them.
        let mut collector = Collector::default();
        module.clone().train().visit(&mut collector);
        collector.parameters
    }
}

#[derive(Default)]
struct Collector {
    path: Vec<String>,
    /// The types of the modules entered, innermost last; empty for containers such as `Vec`.
    modules: Vec<String>,
    parameters: Vec<Parameter>,
}

impl Collector {
    fn push(&mut self, id: ParamId, shape: &[usize], trainable: bool) {
        let module = self.modules.iter().rev().find(|name| !name.is_empty()).cloned().unwrap_or_default();
        self.parameters.push(Parameter { path: self.path.join("."), shape: shape.to_vec(), module, trainable, id });
    }
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push(name.to_string());
        // Burn writes `Struct:Linear` or `Enum:Attention` for modules and `Vec` and the like for containers.
        let module = container_type.split_once(':').map(|(_, module)| module).unwrap_or_default();
        self.modules.push(module.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
        self.modules.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.base();
        self.push(param.id, tensor.shape().as_slice(), tensor.is_require_grad());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.push(param.id, param.base().shape().as_slice(), false);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.push(param.id, param.base().shape().as_slice(), false);
    }
}
