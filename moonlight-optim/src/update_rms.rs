//! How large the updates are, by group.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};

use crate::Assignment;

/// The RMS of each group's last update, before the learning rate and without weight decay:
/// `sqrt(mean(((before - after) / lr - weight_decay * before)^2))` over all elements of the group.
///
/// `before` and `after` are the module around one step taken with learning rate `lr`. With the report's scale Muon's
/// figure is about 0.2 (less where updates are not of full rank), and AdamW's is 0.2 to 0.4 in practice. Groups come
/// in the order in which they were declared; a group without parameters, or a learning rate of 0, gives no figure.
///
/// Keeping `before` (a clone of the module) over the step costs a copy of its parameters: do it on the steps that are
/// logged.
pub fn update_rms<M: Module>(before: &M, after: &M, assignment: &Assignment, lr: f64) -> Vec<(String, f64)> {
    if lr == 0.0 {
        return Vec::new();
    }
    let before = flat(before);
    let after = flat(after);
    let mut figures = Vec::new();
    for (name, optimizer) in assignment.groups() {
        let mut sum: Option<Tensor<1>> = None;
        let mut count = 0;
        for row in assignment.parameters_of(name) {
            let (Some(old), Some(new)) = (before.get(&row.path), after.get(&row.path)) else { continue };
            let change = old.clone().sub(new.clone()).div_scalar(lr);
            let update = change.sub(old.clone().mul_scalar(optimizer.weight_decay()));
            let squares = update.square().sum();
            count += row.elements();
            // Kept on the device: one number a group is read back, not one a parameter.
            sum = Some(match sum {
                Some(sum) => {
                    let device = sum.device();
                    sum.add(squares.to_device(&device))
                }
                None => squares,
            });
        }
        if let Some(sum) = sum {
            let sum = f64::from(sum.into_scalar::<f32>());
            figures.push((name.to_string(), (sum / count as f64).sqrt()));
        }
    }
    figures
}

/// The float tensors of a module by path, flat, in f32 and outside any graph.
fn flat<M: Module>(module: &M) -> HashMap<String, Tensor<1>> {
    let mut collector = Flat::default();
    module.visit(&mut collector);
    collector.tensors
}

#[derive(Default)]
struct Flat {
    path: Vec<String>,
    tensors: HashMap<String, Tensor<1>>,
}

impl ModuleVisitor for Flat {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.base().inner();
        let elements = tensor.shape().num_elements();
        let tensor = tensor.reshape([elements]).cast(DType::F32);
        self.tensors.insert(self.path.join("."), tensor);
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::GradientsParams;
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::{AdamWConfig, Coefficients, MuonConfig, ParameterRules};

    #[test]
    fn the_figures_are_those_of_the_update_rules() {
        let device = Device::default().autodiff();
        let layer: Linear = LinearConfig::new(24, 16).init(&device);
        let muon = MuonConfig::new().with_coefficients(Coefficients::PolarExpress).with_steps(12);
        let rules = ParameterRules::muon_except(Vec::<String>::new(), muon, AdamWConfig::new());
        let assignment = rules.assign(&layer).unwrap();
        let x = Tensor::<2>::random([200, 24], Distribution::Normal(0.0, 1.0), &device);
        let target = Tensor::<2>::random([200, 16], Distribution::Normal(0.0, 1.0), &device);
        let loss = layer.forward(x).sub(target).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        let before = layer.clone();
        let lr = 0.01;
        let after = assignment.optimizer().step(lr, layer, grads);

        let figures = update_rms(&before, &after, &assignment, lr);
        assert_eq!(figures.len(), 2);
        // 0.2 at full rank with singular values of 1; the first step of Adam has all elements of length 1.
        assert!(figures[0].0 == "muon" && (figures[0].1 - 0.2).abs() < 1e-3, "{figures:?}");
        assert!(figures[1].0 == "adamw" && (figures[1].1 - 1.0).abs() < 1e-3, "{figures:?}");
        assert!(update_rms(&before, &after, &assignment, 0.0).is_empty());
    }
}
