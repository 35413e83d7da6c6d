//! What can be wrong with parameter rules.

use thiserror::Error;

/// Why rules could not be applied to a module.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RuleError {
    /// A pattern is not a valid glob.
    #[error("the pattern `{pattern}` of a parameter rule is malformed: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// What the glob parser says.
        reason: String,
    },
    /// A rule names a group that there is none of.
    #[error("the rule for {rule} names the parameter group `{group}`, which does not exist")]
    UnknownGroup {
        /// The rule, in words.
        rule: String,
        /// The group that it names.
        group: String,
        /// The groups that exist.
        known: Vec<String>,
    },
    /// Two groups have one name, or one has the name that buffers are listed under.
    #[error("the parameter group name `{group}` is taken")]
    TakenGroupName {
        /// The name.
        group: String,
    },
    /// A rule matches no parameter of the module.
    #[error("the rule for {rule} matches no parameter")]
    MatchesNothing {
        /// The rule, in words.
        rule: String,
    },
    /// Everything that a rule matches is taken by rules before it.
    #[error("the rule for {rule} takes no parameter: all {matched} that it matches are taken by earlier rules")]
    TakesNothing {
        /// The rule, in words.
        rule: String,
        /// How many parameters it matches.
        matched: usize,
    },
    /// Parameters that no rule takes.
    #[error("no rule takes {}", list(parameters))]
    NotTaken {
        /// Path and shape of each.
        parameters: Vec<(String, Vec<usize>)>,
    },
    /// A rule gives Muon something that is not a matrix or a stack of matrices.
    #[error("the rule for {rule} gives Muon what is not a matrix or a stack of matrices: {}", list(parameters))]
    NotAMatrix {
        /// The rule, in words.
        rule: String,
        /// Path and shape of each.
        parameters: Vec<(String, Vec<usize>)>,
    },
    /// A rule cuts matrices into blocks that do not fill them, or that no Muon takes.
    #[error("the rule for {rule} cuts `{path}` {shape:?} into {blocks}, which {problem}")]
    Blocks {
        /// The rule, in words.
        rule: String,
        /// A parameter that it takes.
        path: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The blocks, in words.
        blocks: String,
        /// What is wrong with that.
        problem: &'static str,
    },
    /// A rule without conditions sends matrices to a group that is not Muon's.
    #[error("the rule for every parameter sends matrices past Muon to `{group}`: {}", list(parameters))]
    MatrixPastMuon {
        /// The group that takes them.
        group: String,
        /// Path and shape of each.
        parameters: Vec<(String, Vec<usize>)>,
    },
    /// A group's scale is that of the hidden size, and no hidden size is set.
    #[error("the scale of the group `{group}` is that of the model's hidden size, which is not set")]
    NoHiddenSize {
        /// The name.
        group: String,
    },
    /// The module has no parameter to optimise.
    #[error("the module has no trainable parameter")]
    NoParameters,
}

impl RuleError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            RuleError::Pattern { .. } => {
                Some("`*` stands for any characters of one name, `**` for any number of whole names".to_string())
            }
            RuleError::UnknownGroup { known, .. } => Some(format!("the groups are: {}", known.join(", "))),
            RuleError::TakenGroupName { .. } => None,
            RuleError::MatchesNothing { .. } => {
                Some("mark the rule `.optional()` if some models lack these parameters".to_string())
            }
            RuleError::TakesNothing { .. } => Some("the first rule that matches wins: move this one up".to_string()),
            RuleError::NotTaken { .. } => Some("add a rule for them".to_string()),
            RuleError::NotAMatrix { .. } => Some("restrict the rule with `.rank(2..=3)`".to_string()),
            RuleError::Blocks { .. } => {
                Some("sizes are repeated until they fill the side; a layer's outputs are its columns".to_string())
            }
            RuleError::MatrixPastMuon { .. } => {
                Some("name them in a rule, or mark the rule `.matrices_too()`".to_string())
            }
            RuleError::NoHiddenSize { .. } => Some("set `hidden` of the scale `hidden_size`".to_string()),
            RuleError::NoParameters => {
                Some("parameters with `require_grad` off count as buffers, and so do integer tensors".to_string())
            }
        }
    }
}

/// The first few of `parameters`, in words.
fn list(parameters: &[(String, Vec<usize>)]) -> String {
    const SHOWN: usize = 5;
    let mut text =
        parameters.iter().take(SHOWN).map(|(path, shape)| format!("`{path}` {shape:?}")).collect::<Vec<_>>().join(", ");
    if parameters.len() > SHOWN {
        text.push_str(&format!(" and {} more", parameters.len() - SHOWN));
    }
    text
}
