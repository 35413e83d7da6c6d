//! Muon for a whole module, with equal matrices of different parameters in one Newton-Schulz.
//!
//! Burn's `ModuleOptimizer` hands an optimizer one parameter at a time and keeps the states to itself, so that it can batch
//! within a stack only. This one takes what Muon steps out of its hands and leaves it the rest.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};
use burn_pack::{Reader, Scalar, Tensor as Stored, Writer};

use crate::newton_schulz::full_precision;
use crate::state::{RANK, StateError};
use crate::{Assignment, Muon, MuonState, Rounding};

/// The most elements that are stepped together: what gains from company is small, and the workspace of Newton-Schulz is a
/// few times a batch. One parameter that is larger goes alone.
const ELEMENTS_TOGETHER: usize = 1 << 24;

/// The optimizer of an [`Assignment`], as [`Assignment::optimizer`], that steps all equal matrices of Muon's groups together
/// by [`Muon::step_batch`]: the same parameters bit for bit, sooner where there are many small ones.
///
/// State is saved in the same format: either kind of optimizer loads what the other has saved. (Stochastic rounding draws
/// in another order.)
#[derive(Clone, Debug)]
pub struct BatchedOptimizer {
    /// Everything else.
    rest: RestOptimizer,
    groups: Vec<Group>,
    /// By path.
    states: HashMap<String, Held>,
}

/// Burn's optimizer has no `Debug`.
#[derive(Clone)]
struct RestOptimizer(ModuleOptimizer);

impl std::fmt::Debug for RestOptimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ModuleOptimizer")
    }
}

/// Parameters that one Muon steps.
#[derive(Clone, Debug)]
struct Group {
    muon: Muon,
    learning_rate_factor: f64,
    paths: HashSet<String>,
}

/// The state of a parameter.
#[derive(Clone, Debug)]
struct Held {
    id: ParamId,
    shape: Shape,
    /// Its momentum as the stack that the parameter is stepped as.
    state: MuonState<3>,
    /// Its f32 master, as the same stack.
    master: Option<Tensor<3>>,
}

/// A parameter that waits for its step.
#[derive(Clone, Debug)]
struct Waiting {
    path: String,
    id: ParamId,
    group: usize,
    shape: Shape,
    /// `[batch, A, B]` that it is stepped as.
    stack: [usize; 3],
    dtype: DType,
    device: Device,
}

impl Waiting {
    /// Whether the two can be stepped as one stack.
    fn equals(&self, other: &Self) -> bool {
        (self.group, self.stack, self.dtype) == (other.group, other.stack, other.dtype) && self.device == other.device
    }
}

/// The batches that [`BatchedOptimizer`] steps: each of parameters that are `equal` to its first, in their order, as many
/// as have 2^24 elements together and one at least; `elements` is a parameter's number of them.
pub fn equal_batches<T>(
    waiting: Vec<T>,
    elements: impl Fn(&T) -> usize,
    equal: impl Fn(&T, &T) -> bool,
) -> Vec<Vec<T>> {
    let mut open: Vec<(usize, Vec<T>)> = Vec::new(); // room, members
    for one in waiting {
        match open.iter_mut().find(|(room, members)| *room > 0 && equal(&members[0], &one)) {
            Some((room, members)) => {
                *room -= 1;
                members.push(one);
            }
            None => open.push(((ELEMENTS_TOGETHER / elements(&one).max(1)).saturating_sub(1), vec![one])),
        }
    }
    open.into_iter().map(|(_, members)| members).collect()
}

impl Assignment {
    /// The optimizer for the module, without any state, that steps equal matrices together.
    pub fn batched_optimizer(&self) -> BatchedOptimizer {
        self.batched_around(self.optimizer(), HashMap::new())
    }

    fn batched_around(&self, rest: ModuleOptimizer, states: HashMap<String, Held>) -> BatchedOptimizer {
        let mut groups = Vec::new();
        for (name, group) in self.groups() {
            let Some(config) = group.muon() else { continue };
            for (blocks, paths) in self.by_blocks(name) {
                groups.push(Group {
                    muon: config.clone().with_blocks(blocks).build(),
                    learning_rate_factor: group.learning_rate_factor(),
                    paths: paths.into_iter().map(str::to_string).collect(),
                });
            }
        }
        BatchedOptimizer { rest: RestOptimizer(rest), groups, states }
    }

    /// [`Assignment::batched_optimizer`] with the state of a file that [`BatchedOptimizer::save`] or `ModuleOptimizer::save`
    /// wrote.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn load_batched_optimizer(&self, path: impl AsRef<Path>) -> Result<BatchedOptimizer, StateError> {
        self.restore_batched(Reader::from_file(path)?)
    }

    /// As [`Assignment::load_batched_optimizer`], from bytes.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn load_batched_optimizer_bytes(&self, bytes: Bytes) -> Result<BatchedOptimizer, StateError> {
        self.restore_batched(Reader::from_bytes(bytes)?)
    }

    fn restore_batched(&self, reader: Reader) -> Result<BatchedOptimizer, StateError> {
        // Checked and renamed as any state is; then Muon's part is taken out.
        let reader = Reader::from_bytes(self.restore(reader)?.into_bytes().map_err(unreadable)?)?;
        let mut optimizer = self.batched_optimizer();
        let (paths, scalars) = (reader.metadata().clone(), reader.scalars().clone());
        let mut rest = Vec::new();
        let mut fields: HashMap<String, HashMap<String, TensorData>> = HashMap::new();
        for tensor in reader.into_tensors()? {
            let (id, field) = tensor.name.split_once('.').unwrap_or((&tensor.name, ""));
            let path = paths.get(id).filter(|path| optimizer.group_of(path).is_some());
            let Some(path) = path else {
                rest.push(tensor);
                continue;
            };
            let (path, field) = (path.clone(), field.to_string());
            let (_, dtype, shape, _, bytes) = tensor.into_parts()?;
            fields.entry(path).or_default().insert(field, TensorData::from_bytes(bytes, shape, dtype));
        }
        let device = Device::default();
        let tensor = |data: TensorData, shape: [usize; 3]| {
            let (bytes, _, dtype) = data.into_parts();
            Tensor::<3>::from_data(TensorData::from_bytes(bytes, shape, dtype), (&device, dtype))
        };
        for (id, path) in &paths {
            let (Some(group), Some(mut fields)) = (optimizer.group_of(path), fields.remove(path)) else { continue };
            let Some(momentum) = fields.remove("momentum") else { continue };
            let shape = momentum.shape().clone();
            let stack = optimizer.groups[group].muon.config().view.stack(shape.as_slice());
            let second_moment = fields.remove("second_moment").and_then(|data| {
                let shape: [usize; 3] = data.shape().as_slice().try_into().ok()?;
                Some(tensor(data, shape))
            });
            let step = scalars.get(&format!("{id}.step")).and_then(|step| usize::try_from(*step).ok()).unwrap_or(0);
            let state = MuonState { momentum: tensor(momentum, stack), second_moment, step };
            let master = fields.remove("master").map(|data| tensor(data, stack));
            let id = id.parse::<u64>().map_err(|_| StateError::Nameless { entry: id.clone() })?;
            optimizer.states.insert(path.clone(), Held { id: ParamId::from(id), shape, state, master });
        }
        let mut writer = Writer::new(rest);
        let kept = |id: &str| paths.get(id).is_some_and(|path| !optimizer.states.contains_key(path));
        for (name, value) in &scalars {
            if name.split_once('.').is_some_and(|(id, _)| kept(id)) {
                writer = writer.with_scalar(name, *value);
            }
        }
        for (id, path) in paths.iter().filter(|(id, _)| kept(id)) {
            writer = writer.with_metadata(id, path);
        }
        let rest = self.optimizer().from_bytes(writer.into_bytes()?).map_err(unreadable)?;
        Ok(self.batched_around(rest, optimizer.states))
    }
}

fn unreadable(error: burn::store::RecordError) -> StateError {
    StateError::Unreadable(error.to_string())
}

impl BatchedOptimizer {
    fn group_of(&self, path: &str) -> Option<usize> {
        self.groups.iter().position(|group| group.paths.contains(path))
    }

    /// A step of the module, as `ModuleOptimizer::step`: parameters without a gradient stay as they are.
    ///
    /// At no time are there two copies of more than a batch of parameters, if the caller keeps none.
    pub fn step<M: Module>(&mut self, lr: f64, mut module: M, mut gradients: GradientsParams) -> M {
        let mut listing = Listing { path: Vec::new(), optimizer: self, gradients: &gradients, waiting: Vec::new() };
        module.visit(&mut listing);
        let elements = |waiting: &Waiting| waiting.stack.iter().product();
        for batch in equal_batches(listing.waiting, elements, Waiting::equals) {
            let mut lifter = Lifter { wanted: &batch, gradients: &mut gradients, lifted: HashMap::new() };
            module = module.map(&mut lifter);
            let lifted = lifter.lifted;
            module = module.map(&mut Replacer(self.step_equal(lr, batch, lifted)));
        }
        self.rest.0.step(lr, module, gradients)
    }

    fn step_equal(
        &mut self,
        lr: f64,
        batch: Vec<Waiting>,
        mut lifted: HashMap<ParamId, (Tensor<3>, Tensor<3>)>,
    ) -> HashMap<ParamId, (Shape, Tensor<3>)> {
        let Some(Waiting { group, device, .. }) = batch.first() else { return HashMap::new() };
        let Group { muon, learning_rate_factor, .. } = &self.groups[*group];
        let (device, rounding) = (device.clone(), muon.config().rounding);
        let mut owners = Vec::with_capacity(batch.len());
        let mut members = Vec::with_capacity(batch.len());
        for Waiting { path, id, shape, .. } in batch {
            let Some((tensor, gradient)) = lifted.remove(&id) else { continue };
            let (state, master) = self.states.remove(&path).map(|held| (held.state, held.master)).unzip();
            let state = state.map(|state| MuonState {
                momentum: state.momentum.to_device(&device),
                second_moment: state.second_moment.map(|second| second.to_device(&device)),
                step: state.step,
            });
            let stored = tensor.dtype();
            let start = match stored == full_precision(stored) || rounding == Rounding::Nearest {
                true => tensor,
                false => rounding.start(tensor, master.flatten().map(|master| master.to_device(&device))),
            };
            members.push((start, gradient, state));
            owners.push((path, id, shape, stored));
        }
        let stepped = muon.step_stacks(lr * learning_rate_factor, members);
        let mut updated = HashMap::with_capacity(stepped.len());
        for ((path, id, shape, stored), (tensor, state)) in owners.into_iter().zip(stepped) {
            let (tensor, master) = rounding.finish(tensor, stored);
            updated.insert(id, (shape.clone(), tensor));
            self.states.insert(path, Held { id, shape, state, master });
        }
        updated
    }

    /// The state as bytes, in the format of `ModuleOptimizer::into_bytes`.
    ///
    /// # Errors
    ///
    /// If the state cannot be put together.
    pub fn into_bytes(&self) -> Result<Bytes, StateError> {
        Ok(self.writer()?.into_bytes()?)
    }

    /// Writes the state to a file, as `ModuleOptimizer::save`.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), StateError> {
        Ok(self.writer()?.write_to_file(path)?)
    }

    fn writer(&self) -> Result<Writer, StateError> {
        let reader = Reader::from_bytes(self.rest.0.into_bytes().map_err(unreadable)?)?;
        let (paths, scalars) = (reader.metadata().clone(), reader.scalars().clone());
        let mut tensors = reader.into_tensors()?;
        let mut by_path: Vec<_> = self.states.iter().collect();
        by_path.sort_by_key(|(path, _)| *path);
        for (_, Held { id, shape, state, master }) in &by_path {
            // Each comes off its device when its turn to be written comes: a save needs room for one of them.
            let mut push = |field: &str, value: &Tensor<3>, shape: Shape| {
                let (name, dtype, value) = (format!("{}.{field}", id.val()), value.dtype(), value.clone());
                let bytes = shape.num_elements() * dtype.size();
                let provider = move || Ok(value.clone().into_data().into_parts().0);
                tensors.push(Stored::deferred(name, dtype, shape, Some(id.val()), bytes, provider));
            };
            push("momentum", &state.momentum, shape.clone());
            if let Some(master) = master {
                push("master", master, shape.clone());
            }
            if let Some(second) = &state.second_moment {
                push("second_moment", second, second.shape());
            }
        }
        let mut writer = Writer::new(tensors);
        for (name, value) in &scalars {
            writer = writer.with_scalar(name, *value);
        }
        for (id, path) in &paths {
            writer = writer.with_metadata(id, path);
        }
        for (path, Held { id, shape, state, .. }) in by_path {
            let id = id.val();
            writer = writer.with_scalar(&format!("{id}.{RANK}"), Scalar::from(shape.as_slice().len()));
            writer = writer.with_scalar(&format!("{id}.step"), Scalar::from(state.step));
            writer = writer.with_metadata(&id.to_string(), path);
        }
        Ok(writer)
    }
}

/// Lists the parameters of Muon's groups that have a gradient.
struct Listing<'a> {
    path: Vec<String>,
    optimizer: &'a BatchedOptimizer,
    gradients: &'a GradientsParams,
    waiting: Vec<Waiting>,
}

impl ModuleVisitor for Listing<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let Some(group) = self.optimizer.group_of(&path) else { return };
        let Some(gradient) = self.gradients.get::<D>(param.id) else { return };
        if self.waiting.iter().any(|waiting| waiting.id == param.id) {
            return; // a second name of the same tensor
        }
        let (shape, dtype, device) = (gradient.shape(), param.val().dtype(), gradient.device());
        let stack = self.optimizer.groups[group].muon.config().view.stack(shape.as_slice());
        self.waiting.push(Waiting { path, id: param.id, group, shape, stack, dtype, device });
    }
}

/// Takes the parameters of a batch out of the module, and their gradients, so that nothing else holds them.
struct Lifter<'a> {
    wanted: &'a [Waiting],
    gradients: &'a mut GradientsParams,
    lifted: HashMap<ParamId, (Tensor<3>, Tensor<3>)>,
}

impl ModuleMapper for Lifter<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(wanted) = self.wanted.iter().find(|wanted| wanted.id == param.id) else { return param };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return param };
        let Self { lifted, .. } = self;
        param.map(|old| {
            let empty = Tensor::<D>::empty([0; D], (&wanted.device, wanted.dtype));
            let empty = in_place_of(&old, empty);
            let tensor = old.inner().to_device(&wanted.device);
            lifted.insert(wanted.id, (tensor.reshape(wanted.stack), gradient.reshape(wanted.stack)));
            empty
        })
    }
}

/// Puts stepped parameters back.
struct Replacer(HashMap<ParamId, (Shape, Tensor<3>)>);

impl ModuleMapper for Replacer {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((shape, updated)) = self.0.remove(&param.id) else { return param };
        param.map(|old| in_place_of(&old, updated.reshape(shape)))
    }
}

/// A tensor without a graph as the new value of a parameter, which trains as the old one did.
pub fn in_place_of<const D: usize>(old: &Tensor<D>, new: Tensor<D>) -> Tensor<D> {
    let mut new = Tensor::from_inner(new);
    if let Some(strategy) = old.gradient_checkpointing_strategy() {
        new = new.with_gradient_checkpointing_strategy(strategy);
    }
    new.set_require_grad(old.is_require_grad())
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Distribution;

    use super::*;
    use crate::{AdamWConfig, Adaptive, Blocks, GroupOptimizer, MuonConfig, ParameterRules, Rule};

    #[derive(Module, Debug)]
    struct Net {
        first: Vec<Linear>,
        experts: Param<Tensor<3>>,
        narrow: Linear,
    }

    fn net() -> Net {
        let device = &Device::default().autodiff();
        let experts = Tensor::<3>::random([3, 6, 6], Distribution::Default, device);
        Net {
            first: (0..4).map(|_| LinearConfig::new(6, 6).init(device)).collect(),
            experts: Param::from_tensor(experts),
            narrow: LinearConfig::new(6, 4).init(device),
        }
    }

    fn rules(adaptive: Adaptive) -> ParameterRules {
        ParameterRules::new()
            .group(
                "muon",
                GroupOptimizer::from(MuonConfig::new().with_adaptive(adaptive)).with_learning_rate_factor(0.5),
            )
            .group("adamw", AdamWConfig::new())
            .rule(Rule::to("muon").path("first.3.weight").blocks(Blocks::Columns(vec![2])))
            .rule(Rule::to("muon").rank(2..=3))
            .rule(Rule::to("adamw").rank(1..=1))
    }

    fn gradients(net: &Net, seed: u64) -> GradientsParams {
        let device = &Device::default().autodiff();
        let x = Tensor::<2>::ones([3, 6], device).cumsum(0).mul_scalar(0.1 * seed as f64 + 0.1);
        let mut hidden = x.clone();
        for layer in &net.first {
            hidden = layer.forward(hidden).tanh();
        }
        let experts = hidden.clone().unsqueeze::<3>().matmul(net.experts.val().narrow(0, 0, 1)).sum();
        let loss = net.narrow.forward(hidden).powi_scalar(2).mean().add(experts.clone().mul(experts));
        GradientsParams::from_grads(loss.backward(), net)
    }

    fn values(net: &Net) -> Vec<f32> {
        let mut all = Vec::new();
        for layer in net.first.iter().chain([&net.narrow]) {
            all.extend(layer.weight.val().into_data().iter::<f32>());
            all.extend(layer.bias.as_ref().unwrap().val().into_data().iter::<f32>());
        }
        all.extend(net.experts.val().into_data().iter::<f32>());
        all
    }

    #[test]
    fn the_steps_are_those_of_burns_optimizer_bit_for_bit() {
        for adaptive in [Adaptive::Off, Adaptive::nor_muon(), Adaptive::ada_muon()] {
            let start = net();
            let assignment = rules(adaptive).assign(&start).unwrap();
            let (mut one, mut other) = (start.clone(), start.clone());
            let (mut plain, mut batched) = (assignment.optimizer(), assignment.batched_optimizer());
            for seed in 0..4 {
                let taken = gradients(&one, seed);
                one = plain.step(0.05, one, taken);
                let taken = gradients(&other, seed);
                other = batched.step(0.05, other, taken);
                assert_eq!(values(&one), values(&other), "{adaptive:?} step {seed}");
            }
            assert_ne!(values(&one), values(&start));

            // What either saved, the other loads.
            let mut crossed = assignment.load_batched_optimizer_bytes(plain.into_bytes().unwrap()).unwrap();
            let mut back = assignment.load_optimizer_bytes(batched.into_bytes().unwrap()).unwrap();
            for seed in 4..6 {
                let taken = gradients(&one, seed);
                one = back.step(0.05, one, taken);
                let taken = gradients(&other, seed);
                other = crossed.step(0.05, other, taken);
                assert_eq!(values(&one), values(&other), "{adaptive:?} step {seed}");
            }
        }
    }

    #[test]
    fn masters_are_kept_saved_and_loaded_by_either_kind() {
        let narrow = |net: Net| {
            struct Narrow;
            impl ModuleMapper for Narrow {
                fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                    param.map(|tensor| tensor.cast(DType::BF16).detach().require_grad())
                }
            }
            net.map(&mut Narrow)
        };
        let wide = net();
        let start = narrow(wide.clone());
        let taken = |seed: u64| {
            let mut narrow = GradientsParams::new();
            let all = gradients(&wide, seed);
            struct Cast<'a>(GradientsParams, &'a mut GradientsParams);
            impl ModuleVisitor for Cast<'_> {
                fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                    if let Some(gradient) = self.0.remove::<D>(param.id) {
                        self.1.register(param.id, gradient.cast(DType::BF16));
                    }
                }
            }
            wide.visit(&mut Cast(all, &mut narrow));
            narrow
        };
        let muon = MuonConfig::new().with_rounding(Rounding::MasterWeights);
        let adamw = AdamWConfig::new().with_rounding(Rounding::MasterWeights);
        let assignment = ParameterRules::new()
            .group("muon", muon)
            .group("adamw", adamw)
            .rule(Rule::to("muon").rank(2..=3))
            .rule(Rule::to("adamw").rank(1..=1))
            .assign(&start)
            .unwrap();
        let (mut one, mut other) = (start.clone(), start.clone());
        let (mut plain, mut batched) = (assignment.optimizer(), assignment.batched_optimizer());
        for seed in 0..6 {
            one = plain.step(1e-3, one, taken(seed));
            other = batched.step(1e-3, other, taken(seed));
            assert_eq!(values(&one), values(&other), "step {seed}");
            if seed == 2 {
                let crossed = assignment.load_batched_optimizer_bytes(plain.into_bytes().unwrap()).unwrap();
                plain = assignment.load_optimizer_bytes(batched.into_bytes().unwrap()).unwrap();
                batched = crossed;
            }
        }
        assert_ne!(values(&one), values(&start));
    }

    #[test]
    fn parameters_still_train_afterwards() {
        let start = net();
        let mut batched = rules(Adaptive::Off).assign(&start).unwrap().batched_optimizer();
        let taken = gradients(&start, 0);
        let stepped = batched.step(0.05, start, taken);
        assert!(stepped.first.iter().all(|layer| layer.weight.val().is_require_grad()));
        assert!(stepped.experts.val().is_require_grad());
    }
}
