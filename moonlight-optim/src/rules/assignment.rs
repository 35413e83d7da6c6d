//! The assignment of a module's parameters to groups.

use burn::module::{ParamGroup, ParamId};
use burn::optim::ModuleOptimizer;
use serde::Serialize;
use serde::ser::SerializeStruct;

use super::group::{GroupSettings, Unassigned};
use super::{GroupOptimizer, Parameter, Rule};
use crate::Blocks;

/// The group under which the table lists tensors without gradients.
pub(crate) const BUFFER: &str = "buffer";

/// A parameter and its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AssignedParameter {
    /// The names from the root of the module, separated by dots.
    pub path: String,
    /// The shape as stored.
    pub shape: Vec<usize>,
    /// The name of its group, or `buffer`.
    pub group: String,
    /// Why it is in this group.
    pub reason: String,
    /// The path of an earlier parameter that this one shares its tensor with, such as a tied head.
    pub shared_with: Option<String>,
    /// The blocks of its rule. [`Blocks::Whole`] means those of the group.
    pub blocks: Blocks,
    /// Burn's id of the parameter. It is not serialized, since it differs in every process.
    #[serde(skip)]
    pub id: ParamId,
}

impl AssignedParameter {
    pub(crate) fn by_rule(parameter: Parameter, rule: &Rule) -> Self {
        let Parameter { path, shape, id, .. } = parameter;
        let (group, blocks) = (rule.group.clone(), rule.blocks.clone());
        Self { path, shape, group, reason: rule.table_reason(), shared_with: None, blocks, id }
    }

    pub(crate) fn buffer(parameter: Parameter) -> Self {
        let Parameter { path, shape, id, .. } = parameter;
        let (group, reason) = (BUFFER.to_string(), "no gradient".to_string());
        Self { path, shape, group, reason, shared_with: None, blocks: Blocks::Whole, id }
    }

    pub(crate) fn shared_as(&self, parameter: Parameter) -> Self {
        let reason = format!("same tensor as `{}`", self.path);
        Self { path: parameter.path, reason, shared_with: Some(self.path.clone()), ..self.clone() }
    }

    /// Whether it has an optimizer: it is neither a buffer nor the second name of a shared tensor.
    pub fn is_optimized(&self) -> bool {
        self.group != BUFFER && self.shared_with.is_none()
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The group of each parameter of a module. Made by [`ParameterRules::assign`](crate::ParameterRules::assign).
///
/// It prints as a table. It serializes as `parameters`, each with path, shape, group and reason, and `groups`, each with the
/// settings of its optimizer and totals.
///
/// [`build`](Self::build) returns its optimizer, [`load`](Self::load) the same with saved state, and
/// [`to_module_optimizer`](Self::to_module_optimizer) Burn's own.
#[derive(Clone, Debug)]
pub struct Assignment {
    rows: Vec<AssignedParameter>,
    groups: Vec<(String, GroupOptimizer)>,
}

impl Assignment {
    pub(crate) fn new(rows: Vec<AssignedParameter>, groups: Vec<(String, GroupOptimizer)>) -> Self {
        Self { rows, groups }
    }

    /// Every parameter and buffer, in the module's order.
    pub fn rows(&self) -> &[AssignedParameter] {
        &self.rows
    }

    /// The groups in the order of their declaration, including those without parameters.
    pub fn groups(&self) -> impl Iterator<Item = (&str, &GroupOptimizer)> {
        self.groups.iter().map(|(name, optimizer)| (name.as_str(), optimizer))
    }

    /// The parameters of a group that its optimizer steps.
    pub fn parameters_of<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a AssignedParameter> {
        self.rows.iter().filter(move |row| row.is_optimized() && row.group == group)
    }

    /// [`Self::parameters_of`] by the blocks that they are split into: those of their rule, or else of the group. Burn's
    /// `ModuleOptimizer` needs a group for each.
    pub(crate) fn by_blocks(&self, group: &str) -> Vec<(Blocks, Vec<&str>)> {
        let own = self.groups().find(|(name, _)| *name == group).and_then(|(_, optimizer)| optimizer.muon());
        let own = own.map_or(Blocks::Whole, |config| config.blocks.clone());
        let mut by_blocks: Vec<(Blocks, Vec<&str>)> = Vec::new();
        for row in self.rows.iter().filter(|row| row.is_optimized() && row.group == group) {
            let blocks = if row.blocks == Blocks::Whole { &own } else { &row.blocks };
            match by_blocks.iter_mut().find(|(known, _)| known == blocks) {
                Some((_, paths)) => paths.push(&row.path),
                None => by_blocks.push((blocks.clone(), vec![&row.path])),
            }
        }
        by_blocks
    }

    /// Burn's own optimizer for the module, without state: a `ModuleOptimizer` with a group for each group here, matched by
    /// path. Use it with burn-train's `Learner` and other code that takes a `ModuleOptimizer`, and for groups with optimizers
    /// other than Muon and AdamW.
    ///
    /// [`Assignment::build`] gives the same parameters bit for bit and is faster if many matrices have equal shapes. Only
    /// stochastic rounding differs, since random numbers are drawn in another order.
    ///
    /// The optimizer works for any module with the same paths. Its step panics for the gradient of a parameter that the rules
    /// were not assigned to.
    pub fn to_module_optimizer(&self) -> ModuleOptimizer {
        let mut optimizer = ModuleOptimizer::from(Unassigned);
        for (name, group) in self.groups() {
            for (blocks, paths) in self.by_blocks(name) {
                optimizer = optimizer.with_group(ParamGroup::from_paths(paths), group.with_blocks(&blocks), None);
            }
        }
        optimizer
    }
}

/// A group of the serialized table.
#[derive(Serialize)]
struct Group<'a> {
    name: &'a str,
    optimizer: &'a GroupSettings,
    learning_rate_factor: f64,
    tensors: usize,
    elements: usize,
}

impl Serialize for Assignment {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let groups: Vec<Group<'_>> = self
            .groups()
            .map(|(name, group)| Group {
                name,
                optimizer: group.settings(),
                learning_rate_factor: group.learning_rate_factor(),
                tensors: self.parameters_of(name).count(),
                elements: self.parameters_of(name).map(AssignedParameter::elements).sum(),
            })
            .collect();
        let mut table = serializer.serialize_struct("Assignment", 2)?;
        table.serialize_field("parameters", &self.rows)?;
        table.serialize_field("groups", &groups)?;
        table.end()
    }
}
