//! A rule: which parameters, which group, and why.

use std::ops::{Bound, RangeBounds};

use super::parameter::Parameter;
use crate::Blocks;

/// Assigns the parameters that it matches to a group. All of its conditions must hold; a rule without conditions matches every
/// parameter.
///
/// ```
/// use moonlight_optim::Rule;
///
/// let embeddings = Rule::to("adamw").module("Embedding").because("embedding");
/// let matrices = Rule::to("muon").path("decoder.**").rank(2..=3).because("hidden matrix");
/// ```
#[derive(Clone, Debug)]
pub struct Rule {
    pub(crate) group: String,
    pub(crate) path: Option<String>,
    pub(crate) module: Option<String>,
    pub(crate) lowest_rank: usize,
    pub(crate) highest_rank: usize,
    pub(crate) reason: Option<String>,
    pub(crate) optional: bool,
    pub(crate) blocks: Blocks,
    pub(crate) matrices_too: bool,
}

impl Rule {
    /// A rule that assigns every parameter to the group of this name.
    pub fn to(group: impl Into<String>) -> Self {
        Self {
            group: group.into(),
            path: None,
            module: None,
            lowest_rank: 0,
            highest_rank: usize::MAX,
            reason: None,
            optional: false,
            blocks: Blocks::Whole,
            matrices_too: false,
        }
    }

    /// Only parameters whose path matches a glob, in which names are separated by dots: `*` matches any characters of one name,
    /// `**` any number of whole names, `?` one character, `[0-9]` one of a set.
    pub fn path(mut self, pattern: impl Into<String>) -> Self {
        self.path = Some(pattern.into());
        self
    }

    /// Only parameters that are fields of a module of this type, such as `Embedding` or `RmsNorm`.
    pub fn module(mut self, name: impl Into<String>) -> Self {
        self.module = Some(name.into());
        self
    }

    /// Only parameters with these numbers of dimensions: 2 for matrices, 3 for stacks of matrices, `..=1` for vectors and
    /// scalars.
    pub fn rank(mut self, ranks: impl RangeBounds<usize>) -> Self {
        self.lowest_rank = match ranks.start_bound() {
            Bound::Included(rank) => *rank,
            Bound::Excluded(rank) => rank.saturating_add(1),
            Bound::Unbounded => 0,
        };
        self.highest_rank = match ranks.end_bound() {
            Bound::Included(rank) => *rank,
            // `..0` is empty, and so is `1..=0`: `assign` then reports a rule that matches nothing.
            Bound::Excluded(0) => {
                self.lowest_rank = 1;
                0
            }
            Bound::Excluded(rank) => rank - 1,
            Bound::Unbounded => usize::MAX,
        };
        self
    }

    /// The reason that the printed table gives for the parameters of this rule. Without it, the table gives the conditions.
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    /// Allows the rule to match nothing. Without this it is an error, since the cause is usually a misspelled name.
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    /// Splits the matrices of this rule into these blocks, instead of those of the Muon group.
    ///
    /// ```
    /// use moonlight_optim::{Blocks, Rule};
    ///
    /// let heads = Rule::to("muon").path("**.q_proj.weight").blocks(Blocks::Columns(vec![192])).because("16 heads");
    /// ```
    pub fn blocks(mut self, blocks: Blocks) -> Self {
        self.blocks = blocks;
        self
    }

    /// Allows a rule without conditions to assign matrices to a group other than Muon's. Without this it is an error if there is
    /// a Muon group, since AdamW would silently train a matrix that a pattern missed.
    pub fn matrices_too(mut self) -> Self {
        self.matrices_too = true;
        self
    }

    /// Whether the rule has no conditions.
    pub(crate) fn matches_all(&self) -> bool {
        self.path.is_none() && self.module.is_none() && (self.lowest_rank, self.highest_rank) == (0, usize::MAX)
    }

    /// Whether the number of dimensions and the module type match. The path is matched by its compiled pattern.
    pub(crate) fn matches_kind(&self, parameter: &Parameter) -> bool {
        let rank = parameter.shape.len();
        let module = self.module.as_ref().is_none_or(|name| *name == parameter.module);
        (self.lowest_rank..=self.highest_rank).contains(&rank) && module
    }

    /// The rule in words, for messages: ``path `a.**`, rank 2 to 3``.
    pub(crate) fn describe(&self) -> String {
        let mut parts = Vec::new();
        if let Some(path) = &self.path {
            parts.push(format!("path `{path}`"));
        }
        if let Some(module) = &self.module {
            parts.push(format!("module `{module}`"));
        }
        match (self.lowest_rank, self.highest_rank) {
            (0, usize::MAX) => {}
            (lowest, usize::MAX) => parts.push(format!("rank {lowest} and above")),
            (lowest, highest) if lowest == highest => parts.push(format!("rank {lowest}")),
            (lowest, highest) => parts.push(format!("rank {lowest} to {highest}")),
        }
        if parts.is_empty() { "every parameter".to_string() } else { parts.join(", ") }
    }

    /// The reason in the printed table, with the blocks.
    pub(crate) fn table_reason(&self) -> String {
        let reason = self.reason.clone().unwrap_or_else(|| self.describe());
        if self.blocks == Blocks::Whole { reason } else { format!("{reason}, {}", self.blocks) }
    }
}
