//! Rules that assign parameters to optimizers, checked against a module before the first step.

mod assignment;
mod error;
mod group;
mod parameter;
mod pattern;
mod rule;
mod table;

use std::collections::HashMap;

use burn::module::Module;

pub(crate) use assignment::BUFFER;
pub use assignment::{AssignedParameter, Assignment};
pub use error::RuleError;
pub use group::{GroupOptimizer, GroupSettings};
pub use parameter::Parameter;
pub use rule::Rule;

use crate::{AdamWConfig, Blocks, MuonConfig, UpdateScale};
use pattern::PathPattern;

/// Parameter groups, each with an optimizer, and the rules that assign parameters to them. The first rule that matches a
/// parameter decides.
///
/// Rules do not guess: [`assign`](Self::assign) returns an error for a rule that matches nothing, a parameter that no rule
/// matches, and a matrix that would reach AdamW only because a pattern missed it.
///
/// ```
/// use burn::nn::{Linear, LinearConfig};
/// use burn::tensor::Device;
/// use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules, Rule};
///
/// let layer: Linear = LinearConfig::new(8, 16).init(&Device::default().autodiff());
/// let assignment = ParameterRules::new()
///     .group("muon", MuonConfig::new())
///     .group("adamw", AdamWConfig::new())
///     .rule(Rule::to("muon").rank(2..=3).because("matrix"))
///     .rule(Rule::to("adamw").because("not a matrix"))
///     .assign(&layer)?;
/// println!("{assignment}");
/// let optimizer = assignment.build(OptimizerOptions::new())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ParameterRules {
    groups: Vec<(String, GroupOptimizer)>,
    rules: Vec<Rule>,
}

impl ParameterRules {
    /// No groups and no rules.
    pub fn new() -> Self {
        Self::default()
    }

    /// The report's rules, for models with Hugging Face's parameter names: Muon (group `muon`) for matrices and stacks of
    /// matrices, except `embed_tokens` and `lm_head`; AdamW (group `adamw`) for these two, for norms and for biases.
    pub fn moonlight(muon: MuonConfig, adamw: AdamWConfig) -> Self {
        Self::new()
            .group("muon", muon)
            .group("adamw", adamw)
            .rule(Rule::to("adamw").path("**.embed_tokens.**").because("embedding"))
            // Optional: a head that is tied to the embedding has no parameter.
            .rule(Rule::to("adamw").path("**.lm_head.**").because("output head").optional())
            .with_matrices_and_vectors()
    }

    /// The same rules for any module. AdamW takes the weights of Burn's `Embedding` modules, parameters that match a glob of
    /// `except` (name the output head there), and everything that is not a matrix. Muon takes all other matrices and stacks of
    /// matrices.
    pub fn muon_except<P: Into<String>>(
        except: impl IntoIterator<Item = P>,
        muon: MuonConfig,
        adamw: AdamWConfig,
    ) -> Self {
        let mut rules = Self::new()
            .group("muon", muon)
            .group("adamw", adamw)
            .rule(Rule::to("adamw").module("Embedding").because("embedding").optional());
        for pattern in except {
            let pattern = pattern.into();
            let reason = format!("excepted by `{pattern}`");
            rules = rules.rule(Rule::to("adamw").path(pattern).because(reason));
        }
        rules.with_matrices_and_vectors()
    }

    /// The rules of [`ParameterRules::muon_except`] with Keller Jordan's settings. AdamW's learning rate is 0.015 times that of
    /// the step: 3e-4 for Muon's 0.02 (`MuonWithAuxAdam` of KellerJordan/Muon).
    pub fn keller_jordan<P: Into<String>>(except: impl IntoIterator<Item = P>) -> Self {
        let rules = Self::muon_except(except, MuonConfig::keller_jordan(), AdamWConfig::keller_jordan());
        let slower = |(name, group): (String, GroupOptimizer)| {
            let group = if name == "adamw" { group.with_learning_rate_factor(0.015) } else { group };
            (name, group)
        };
        Self { groups: rules.groups.into_iter().map(slower).collect(), ..rules }
    }

    /// Kimi K2's rules and settings, which are the report's. Kimi K2 also applies [`QkClip`](crate::QkClip) after each step.
    pub fn kimi_k2() -> Self {
        Self::moonlight(MuonConfig::kimi_k2(), AdamWConfig::new())
    }

    /// AdamW (group `adamw`) for every parameter.
    pub fn adamw(adamw: AdamWConfig) -> Self {
        Self::new().group("adamw", adamw).rule(Rule::to("adamw").because("AdamW takes all"))
    }

    /// AdamW with `factor` times the learning rate (group `embedding`) for the embedding and the output head, by rules that come
    /// before the existing ones. For models with Hugging Face's parameter names. Megatron calls it the decoupled learning rate.
    pub fn with_embedding_rate(self, adamw: AdamWConfig, factor: f64) -> Self {
        let rule = |path: &str| Rule::to("embedding").path(path).because("a rate of its own").optional();
        let earlier = self.rules.into_iter().map(Rule::optional); // what the new rules leave for one of them may be nothing
        let rules = [rule("**.embed_tokens.**"), rule("**.lm_head.**")].into_iter().chain(earlier).collect();
        let group = GroupOptimizer::from(adamw).with_learning_rate_factor(factor);
        Self { groups: self.groups, rules }.group("embedding", group)
    }

    fn with_matrices_and_vectors(self) -> Self {
        self.rule(Rule::to("muon").rank(2..=2).because("matrix").optional())
            .rule(Rule::to("muon").rank(3..=3).because("stack of matrices").optional())
            .rule(Rule::to("adamw").rank(..=1).because("not a matrix").optional())
    }

    /// Adds a group. Rules that name it assign its parameters.
    pub fn group(mut self, name: impl Into<String>, optimizer: impl Into<GroupOptimizer>) -> Self {
        self.groups.push((name.into(), optimizer.into()));
        self
    }

    /// Adds a rule after the existing ones.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Assigns every parameter of a module to a group.
    ///
    /// # Errors
    ///
    /// [`RuleError`]:
    ///
    /// * a rule that matches nothing, or only parameters that earlier rules took (unless it is optional or matches frozen
    ///   parameters)
    /// * a trainable parameter that no rule matches
    /// * a parameter assigned to Muon that is not a matrix or a stack of matrices
    /// * blocks that do not fill their matrix
    /// * a rule without conditions that assigns matrices to a group other than Muon's
    /// * a group that does not exist, or exists twice
    /// * a scale without its hidden size, a malformed pattern, a module without trainable parameters
    pub fn assign<M: Module>(&self, module: &M) -> Result<Assignment, RuleError> {
        self.assign_parameters(Parameter::of(module))
    }

    /// Assigns a list of parameters, without a module.
    ///
    /// # Errors
    ///
    /// As [`ParameterRules::assign`].
    pub fn assign_parameters(&self, parameters: Vec<Parameter>) -> Result<Assignment, RuleError> {
        self.check_groups()?;
        let patterns = self.rules.iter().map(Self::compile).collect::<Result<Vec<_>, _>>()?;
        let matches = |rule: usize, parameter: &Parameter| {
            let path = patterns[rule].as_ref().is_none_or(|pattern| pattern.matches(&parameter.path));
            path && self.rules[rule].matches_kind(parameter)
        };

        let mut matched = vec![0_usize; self.rules.len()];
        let mut frozen = vec![0_usize; self.rules.len()];
        let mut assigned = vec![Vec::new(); self.rules.len()];
        let mut unmatched = Vec::new();
        let mut rows = Vec::with_capacity(parameters.len());
        let mut first_paths = HashMap::new();
        for parameter in parameters {
            if !parameter.trainable {
                // A rule that matches only frozen parameters is not an error: its pattern is not misspelled.
                for (rule, count) in frozen.iter_mut().enumerate() {
                    *count += usize::from(matches(rule, &parameter));
                }
                rows.push(AssignedParameter::buffer(parameter));
                continue;
            }
            // A second name of a tensor, such as a tied head: the tensor must be stepped once, by the rule of its first name.
            if let Some(&first) = first_paths.get(&parameter.id) {
                let owner: &AssignedParameter = &rows[first];
                rows.push(owner.shared_as(parameter));
                continue;
            }
            let mut first_match = None;
            for (rule, count) in matched.iter_mut().enumerate() {
                if matches(rule, &parameter) {
                    *count += 1;
                    first_match = first_match.or(Some(rule));
                }
            }
            let name = (parameter.path.clone(), parameter.shape.clone());
            let Some(rule) = first_match else {
                unmatched.push(name);
                continue;
            };
            assigned[rule].push(name);
            first_paths.insert(parameter.id, rows.len());
            rows.push(AssignedParameter::by_rule(parameter, &self.rules[rule]));
        }

        if !unmatched.is_empty() {
            return Err(RuleError::Unmatched { parameters: unmatched });
        }
        if first_paths.is_empty() {
            return Err(RuleError::NoParameters);
        }
        for (index, (rule, (&matched, assigned))) in self.rules.iter().zip(matched.iter().zip(&assigned)).enumerate() {
            if matched > 0 || frozen[index] == 0 {
                self.check_rule(rule, matched, assigned)?;
            }
        }
        // Only now, after all rules: a Muon rule that comes too late explains why this one got its matrices, and is the error to
        // report.
        for (rule, assigned) in self.rules.iter().zip(&assigned) {
            self.check_matrices(rule, assigned)?;
        }
        Ok(Assignment::new(rows, self.groups.clone()))
    }

    fn compile(rule: &Rule) -> Result<Option<PathPattern>, RuleError> {
        let Some(pattern) = &rule.path else { return Ok(None) };
        let compiled = PathPattern::new(pattern);
        compiled.map(Some).map_err(|reason| RuleError::Pattern { pattern: pattern.clone(), reason })
    }

    fn check_groups(&self) -> Result<(), RuleError> {
        for (index, (name, _)) in self.groups.iter().enumerate() {
            if name == BUFFER || self.groups[..index].iter().any(|(earlier, _)| earlier == name) {
                return Err(RuleError::DuplicateGroup { group: name.clone() });
            }
        }
        for (name, group) in &self.groups {
            if let Some(UpdateScale::HiddenSize { hidden: 0, .. }) = group.muon().map(|muon| muon.scale) {
                return Err(RuleError::NoHiddenSize { group: name.clone() });
            }
        }
        for rule in &self.rules {
            if !self.groups.iter().any(|(name, _)| *name == rule.group) {
                let known = self.groups.iter().map(|(name, _)| name.clone()).collect();
                return Err(RuleError::UnknownGroup { rule: rule.describe(), group: rule.group.clone(), known });
            }
        }
        Ok(())
    }

    fn check_rule(&self, rule: &Rule, matched: usize, assigned: &[(String, Vec<usize>)]) -> Result<(), RuleError> {
        if matched == 0 && !rule.optional {
            return Err(RuleError::MatchesNothing { rule: rule.describe() });
        }
        if assigned.is_empty() && !rule.optional {
            return Err(RuleError::Shadowed { rule: rule.describe(), matched });
        }
        let muon = self.groups.iter().find(|(name, _)| *name == rule.group).and_then(|(_, group)| group.muon());
        let Some(muon) = muon else {
            return match assigned.first() {
                Some(parameter) if rule.blocks != Blocks::Whole => {
                    Err(Self::blocks(rule, &rule.blocks, parameter, "only Muon can do"))
                }
                _ => Ok(()),
            };
        };
        let wrong: Vec<_> = assigned.iter().filter(|(_, shape)| !muon.view.accepts(shape.len())).cloned().collect();
        if !wrong.is_empty() {
            return Err(RuleError::NotAMatrix { rule: rule.describe(), parameters: wrong });
        }
        let blocks = if rule.blocks == Blocks::Whole { &muon.blocks } else { &rule.blocks };
        for parameter in assigned {
            let [_, rows, columns] = muon.view.stack(&parameter.1);
            if blocks.sizes(rows, columns).is_none() {
                return Err(Self::blocks(rule, blocks, parameter, "do not fill it"));
            }
        }
        Ok(())
    }

    /// Refuses a rule without conditions that assigns matrices to a group other than Muon's: it would hide that the pattern of
    /// an earlier rule has missed them.
    fn check_matrices(&self, rule: &Rule, assigned: &[(String, Vec<usize>)]) -> Result<(), RuleError> {
        let muon =
            |name: &str| self.groups.iter().any(|(group, optimizer)| group == name && optimizer.muon().is_some());
        let matrices: Vec<_> = assigned.iter().filter(|(_, shape)| shape.len() >= 2).cloned().collect();
        let any_muon = self.groups.iter().any(|(name, _)| muon(name));
        if any_muon && !muon(&rule.group) && rule.matches_all() && !rule.matrices_too && !matrices.is_empty() {
            return Err(RuleError::MatrixWithoutMuon { group: rule.group.clone(), parameters: matrices });
        }
        Ok(())
    }

    fn blocks(rule: &Rule, blocks: &Blocks, (path, shape): &(String, Vec<usize>), problem: &'static str) -> RuleError {
        RuleError::Blocks {
            rule: rule.describe(),
            path: path.clone(),
            shape: shape.clone(),
            blocks: blocks.to_string(),
            problem,
        }
    }
}

#[cfg(test)]
mod tests;
