//! The step of a single rank, which holds all state.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Shape, Tensor};

use super::partition::OptimizerKind;
use super::whole_matrix::Matrices;
use super::{MuonAdamW, scaled};
use crate::distributed::SumsOfSquares;
use crate::memory::step_batches;
use crate::module_values::{AutodiffSettings, Replacer};

impl MuonAdamW {
    /// Keeps the gradients in their own dtype and layout, without a cast or a copy.
    pub(super) fn add_gradients_local<M: Module>(&mut self, module: &M, mut gradients: GradientsParams) {
        if self.gradients.is_empty() {
            self.gradients = gradients;
            return;
        }
        module.visit(&mut Merge { from: &mut gradients, into: &mut self.gradients });
    }

    /// Summed in the module's order, so that the result does not depend on when each gradient was added.
    pub(super) fn sum_of_squares_local<M: Module>(&self, module: &M) -> f64 {
        let mut visitor = SumSquares { path: Vec::new(), optimizer: self, sums: SumsOfSquares::default() };
        module.visit(&mut visitor);
        visitor.sums.total()
    }

    /// Muon's batches one after the other, then AdamW's parameters in the module's order.
    pub(super) fn apply_local<M: Module>(&mut self, lr: f64, scale: f64, mut module: M) -> M {
        let mut gradients = std::mem::take(&mut self.gradients);
        let mut listing = ListParameters {
            path: Vec::new(),
            optimizer: self,
            gradients: &gradients,
            matrices: Vec::new(),
            adamw: HashMap::new(),
        };
        module.visit(&mut listing);
        let ListParameters { matrices, adamw, .. } = listing;
        for batch in
            step_batches(matrices, |one| one.matrices.elements(), |one, other| one.matrices.equals(&other.matrices))
        {
            let mut take = TakeBatch { batch: &batch, gradients: &mut gradients, scale, taken: HashMap::new() };
            module = module.map(&mut take);
            let mut taken = take.taken;
            let (owners, batch): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .filter_map(|MuonParameter { id, shape, matrices }| {
                    let (value, gradient) = taken.remove(&id)?;
                    Some(((id, shape), (matrices, value, gradient)))
                })
                .unzip();
            let updated = self.step_matrices(lr, batch);
            // Put back before the next batch is taken, so that only one batch at a time exists twice.
            let values = owners.into_iter().zip(updated).map(|((id, shape), values)| (id, (shape, values)));
            module = module.map(&mut Replacer(values.collect()));
        }
        if !adamw.is_empty() {
            module = module.map(&mut StepAdamW { optimizer: self, gradients: &mut gradients, adamw, lr, scale });
        }
        // The optimizers have taken the gradients of their parameters. What is left belongs to no optimizer.
        if !gradients.is_empty() {
            module.visit(&mut RefuseUnassigned { path: Vec::new(), gradients: &gradients });
        }
        module
    }
}

/// Moves gradients from one container to another.
struct Merge<'a> {
    from: &'a mut GradientsParams,
    into: &'a mut GradientsParams,
}

impl ModuleVisitor for Merge<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.from.remove::<D>(param.id) {
            self.into.register(param.id, gradient);
        }
    }
}

/// Sums the squares of the gradients.
struct SumSquares<'a> {
    path: Vec<String>,
    optimizer: &'a MuonAdamW,
    sums: SumsOfSquares,
}

impl ModuleVisitor for SumSquares<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.optimizer.gradients.get::<D>(param.id)
            // The second name of a shared tensor is not in `by_path`; its gradient counts once.
            && self.optimizer.by_path.contains_key(&self.path.join("."))
        {
            self.sums.add(gradient);
        }
    }
}

/// A parameter that has a gradient and belongs to Muon.
struct MuonParameter {
    id: ParamId,
    shape: Shape,
    matrices: Matrices,
}

/// Lists the parameters that have a gradient, by optimizer.
struct ListParameters<'a> {
    path: Vec<String>,
    optimizer: &'a MuonAdamW,
    gradients: &'a GradientsParams,
    matrices: Vec<MuonParameter>,
    /// Index of the parameter, and of its AdamW.
    adamw: HashMap<ParamId, (usize, usize)>,
}

impl ModuleVisitor for ListParameters<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.get::<D>(param.id) else { return };
        // The second name of a shared tensor is not in `by_path`.
        let Some(&parameter) = self.optimizer.by_path.get(&self.path.join(".")) else { return };
        match self.optimizer.parameters[parameter].kind {
            OptimizerKind::Muon { optimizer, .. } => {
                let (shape, stored, device) = (gradient.shape(), param.val().dtype(), gradient.device());
                let view = self.optimizer.muon[optimizer].optimizer.config().view;
                let stack = view.stack(shape.as_slice());
                let matrices = Matrices { key: (parameter, 0), optimizer, stack, stored, device };
                self.matrices.push(MuonParameter { id: param.id, shape, matrices });
            }
            OptimizerKind::AdamW { optimizer } => {
                self.adamw.insert(param.id, (parameter, optimizer));
            }
            OptimizerKind::Other => {}
        }
    }
}

/// Takes the parameters of a batch out of the module, with their gradients, and leaves empty tensors in their place. The step
/// then has the only handle on them and updates them in place; with a second handle it would have to copy each one.
struct TakeBatch<'a> {
    batch: &'a [MuonParameter],
    gradients: &'a mut GradientsParams,
    scale: f64,
    taken: HashMap<ParamId, (Tensor<3>, Tensor<3>)>,
}

impl ModuleMapper for TakeBatch<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(MuonParameter { id, matrices, .. }) = self.batch.iter().find(|member| member.id == param.id) else {
            return param;
        };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return param };
        let Self { taken, scale, .. } = self;
        param.map(|old| {
            let empty = Tensor::<D>::empty([0; D], (&matrices.device, matrices.stored));
            let empty = AutodiffSettings::of(&old).apply(empty);
            let value = old.inner().to_device(&matrices.device);
            let gradient = scaled(gradient, *scale).reshape(matrices.stack);
            taken.insert(*id, (value.reshape(matrices.stack), gradient));
            empty
        })
    }
}

/// Steps AdamW's parameters.
struct StepAdamW<'a> {
    optimizer: &'a mut MuonAdamW,
    gradients: &'a mut GradientsParams,
    adamw: HashMap<ParamId, (usize, usize)>,
    lr: f64,
    scale: f64,
}

impl ModuleMapper for StepAdamW<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(&(parameter, optimizer)) = self.adamw.get(&param.id) else { return param };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return param };
        let Self { optimizer: all, lr, scale, .. } = self;
        param.map(|old| {
            let settings = AutodiffSettings::of(&old);
            let value = old.inner().to_device(&gradient.device());
            settings.apply(all.step_adamw((parameter, 0), optimizer, *lr, value, scaled(gradient, *scale)))
        })
    }
}

/// Panics for a parameter that has a gradient but no optimizer.
struct RefuseUnassigned<'a> {
    path: Vec<String>,
    gradients: &'a GradientsParams,
}

impl ModuleVisitor for RefuseUnassigned<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        assert!(
            self.gradients.get::<D>(param.id).is_none(),
            "`{}` has a gradient but no optimizer: this module is not the one that the parameter rules were assigned to",
            self.path.join(".")
        );
    }
}
