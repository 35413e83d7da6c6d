//! The outcome of applying rules to a module.

use burn::module::{ParamGroup, ParamId};
use burn::optim::ModuleOptimizer;

use super::group::Unassigned;
use super::{GroupOptimizer, Parameter, Rule};

/// The name under which tensors without gradients are listed.
pub const BUFFER: &str = "buffer";

/// A parameter, and what takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedParameter {
    /// Names from the root of the module, separated by dots.
    pub path: String,
    /// The shape as stored.
    pub shape: Vec<usize>,
    /// The name of its group, or [`BUFFER`].
    pub group: String,
    /// Why it is there.
    pub reason: String,
    /// The path of the parameter that this one shares its tensor with, if it is not the first of them.
    pub shared_with: Option<String>,
    /// Burn's identity of the parameter.
    pub id: ParamId,
}

impl AssignedParameter {
    pub(crate) fn taken(parameter: Parameter, rule: &Rule) -> Self {
        let Parameter { path, shape, id, .. } = parameter;
        Self { path, shape, group: rule.group.clone(), reason: rule.why(), shared_with: None, id }
    }

    pub(crate) fn buffer(parameter: Parameter) -> Self {
        let Parameter { path, shape, id, .. } = parameter;
        Self { path, shape, group: BUFFER.to_string(), reason: "no gradient".to_string(), shared_with: None, id }
    }

    pub(crate) fn shared_as(&self, parameter: Parameter) -> Self {
        let reason = format!("same tensor as `{}`", self.path);
        Self { path: parameter.path, reason, shared_with: Some(self.path.clone()), ..self.clone() }
    }

    /// Whether an optimizer takes it: it is neither a buffer nor a second name of another parameter.
    pub fn is_optimized(&self) -> bool {
        self.group != BUFFER && self.shared_with.is_none()
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Which group takes each parameter of a module. Prints as a table.
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

    /// The groups in the order in which they were declared, those without a parameter included.
    pub fn groups(&self) -> impl Iterator<Item = (&str, &GroupOptimizer)> {
        self.groups.iter().map(|(name, optimizer)| (name.as_str(), optimizer))
    }

    /// The parameters that the optimizer of a group takes.
    pub fn parameters_of<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a AssignedParameter> {
        self.rows.iter().filter(move |row| row.is_optimized() && row.group == group)
    }

    /// The optimizer for the module, without any state: one group of Burn's `ModuleOptimizer` for each of ours, by
    /// path.
    ///
    /// It goes on working when the module is replaced by another with the same paths. It panics on a step with a
    /// parameter that was not there when the rules were assigned.
    pub fn optimizer(&self) -> ModuleOptimizer {
        let mut optimizer = ModuleOptimizer::from(Unassigned);
        for (name, group) in self.groups() {
            let paths: Vec<&str> = self.parameters_of(name).map(|row| row.path.as_str()).collect();
            if !paths.is_empty() {
                optimizer = optimizer.with_group(ParamGroup::from_paths(paths), group.shared(), None);
            }
        }
        optimizer
    }
}
