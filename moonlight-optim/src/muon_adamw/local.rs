//! A step of one rank, which holds everything.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Shape, Tensor};

use super::partition::By;
use super::whole_matrix::Matrices;
use super::{MuonAdamW, scaled};
use crate::distributed::sum_of_squares;
use crate::memory::step_batches;
use crate::module_values::{AutodiffSettings, Replacer};

impl MuonAdamW {
    /// Keeps the gradients as they are, in their own type and layout.
    pub(super) fn offer_local<M: Module>(&mut self, module: &M, mut gradients: GradientsParams) {
        if self.offered.is_empty() {
            self.offered = gradients;
            return;
        }
        module.visit(&mut Merge { from: &mut gradients, into: &mut self.offered });
    }

    /// In the order of the module.
    pub(super) fn squares_local<M: Module>(&self, module: &M) -> f64 {
        let mut squares = Squares { path: Vec::new(), optimizer: self, sum: 0.0 };
        module.visit(&mut squares);
        squares.sum
    }

    /// Muon's batches one after the other, then AdamW's parameters in the order of the module.
    pub(super) fn apply_local<M: Module>(&mut self, lr: f64, scale: f64, mut module: M) -> M {
        let mut gradients = std::mem::take(&mut self.offered);
        let mut listing = Listing {
            path: Vec::new(),
            optimizer: self,
            gradients: &gradients,
            matrices: Vec::new(),
            others: HashMap::new(),
        };
        module.visit(&mut listing);
        let Listing { matrices, others, .. } = listing;
        for batch in
            step_batches(matrices, |one| one.matrices.elements(), |one, other| one.matrices.equals(&other.matrices))
        {
            let mut lifter = Lifter { wanted: &batch, gradients: &mut gradients, scale, lifted: HashMap::new() };
            module = module.map(&mut lifter);
            let mut lifted = lifter.lifted;
            let (owners, batch): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .filter_map(|Listed { id, shape, matrices }| {
                    let (value, gradient) = lifted.remove(&id)?;
                    Some(((id, shape), (matrices, value, gradient)))
                })
                .unzip();
            let updated = self.step_matrices(lr, batch);
            let values = owners.into_iter().zip(updated).map(|((id, shape), values)| (id, (shape, values)));
            module = module.map(&mut Replacer(values.collect()));
        }
        if !others.is_empty() {
            module = module.map(&mut AdamWStep { optimizer: self, gradients: &mut gradients, others, lr, scale });
        }
        if !gradients.is_empty() {
            module.visit(&mut Unassigned { path: Vec::new(), gradients: &gradients });
        }
        module
    }
}

/// Adds gradients to others.
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

/// Sums the squares of the offered gradients.
struct Squares<'a> {
    path: Vec<String>,
    optimizer: &'a MuonAdamW,
    sum: f64,
}

impl ModuleVisitor for Squares<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.optimizer.offered.get::<D>(param.id)
            && self.optimizer.by_path.contains_key(&self.path.join("."))
        {
            self.sum += sum_of_squares(gradient);
        }
    }
}

/// A parameter of Muon's with a gradient.
struct Listed {
    id: ParamId,
    shape: Shape,
    matrices: Matrices,
}

/// Lists the parameters that have a gradient.
struct Listing<'a> {
    path: Vec<String>,
    optimizer: &'a MuonAdamW,
    gradients: &'a GradientsParams,
    matrices: Vec<Listed>,
    /// AdamW's: target and optimizer.
    others: HashMap<ParamId, (usize, usize)>,
}

impl ModuleVisitor for Listing<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.get::<D>(param.id) else { return };
        // A tensor's second name is not among the targets.
        let Some(&target) = self.optimizer.by_path.get(&self.path.join(".")) else { return };
        match self.optimizer.targets[target].by {
            By::Muon { optimizer, .. } => {
                let (shape, stored, device) = (gradient.shape(), param.val().dtype(), gradient.device());
                let view = self.optimizer.muon[optimizer].optimizer.config().view;
                let stack = view.stack(shape.as_slice());
                let matrices = Matrices { key: (target, 0), optimizer, stack, stored, device };
                self.matrices.push(Listed { id: param.id, shape, matrices });
            }
            By::AdamW { optimizer } => {
                self.others.insert(param.id, (target, optimizer));
            }
            By::Other => {}
        }
    }
}

/// Takes the parameters of a batch out of the module, and their gradients, so that nothing else holds them and the step
/// can reuse their memory.
struct Lifter<'a> {
    wanted: &'a [Listed],
    gradients: &'a mut GradientsParams,
    scale: f64,
    lifted: HashMap<ParamId, (Tensor<3>, Tensor<3>)>,
}

impl ModuleMapper for Lifter<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(Listed { id, matrices, .. }) = self.wanted.iter().find(|wanted| wanted.id == param.id) else {
            return param;
        };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return param };
        let Self { lifted, scale, .. } = self;
        param.map(|old| {
            let empty = Tensor::<D>::empty([0; D], (&matrices.device, matrices.stored));
            let empty = AutodiffSettings::of(&old).apply(empty);
            let value = old.inner().to_device(&matrices.device);
            let gradient = scaled(gradient, *scale).reshape(matrices.stack);
            lifted.insert(*id, (value.reshape(matrices.stack), gradient));
            empty
        })
    }
}

/// Steps AdamW's parameters.
struct AdamWStep<'a> {
    optimizer: &'a mut MuonAdamW,
    gradients: &'a mut GradientsParams,
    others: HashMap<ParamId, (usize, usize)>,
    lr: f64,
    scale: f64,
}

impl ModuleMapper for AdamWStep<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(&(target, optimizer)) = self.others.get(&param.id) else { return param };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return param };
        let Self { optimizer: all, lr, scale, .. } = self;
        param.map(|old| {
            let settings = AutodiffSettings::of(&old);
            let value = old.inner().to_device(&gradient.device());
            settings.apply(all.step_adamw((target, 0), optimizer, *lr, value, scaled(gradient, *scale)))
        })
    }
}

/// Finds a parameter that has a gradient and no optimizer.
struct Unassigned<'a> {
    path: Vec<String>,
    gradients: &'a GradientsParams,
}

impl ModuleVisitor for Unassigned<'_> {
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
