//! Errors of parameter rules.

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
        /// The message of the glob parser.
        reason: String,
    },
    /// A rule names a group that does not exist.
    #[error("the rule for {rule} names the parameter group `{group}`, which does not exist")]
    UnknownGroup {
        /// The rule, in words.
        rule: String,
        /// The group that it names.
        group: String,
        /// The groups that exist.
        known: Vec<String>,
    },
    /// Two groups have the same name, or one has the name that buffers are listed under.
    #[error("the parameter group name `{group}` is already in use")]
    DuplicateGroup {
        /// The name.
        group: String,
    },
    /// A rule matches no parameter of the module.
    #[error("the rule for {rule} matches no parameter")]
    MatchesNothing {
        /// The rule, in words.
        rule: String,
    },
    /// Earlier rules match everything that a rule matches.
    #[error("the rule for {rule} has no effect: earlier rules match all {matched} of its parameters")]
    Shadowed {
        /// The rule, in words.
        rule: String,
        /// How many parameters it matches.
        matched: usize,
    },
    /// Parameters that no rule matches.
    #[error("no rule matches {}", list(parameters))]
    Unmatched {
        /// Path and shape of each.
        parameters: Vec<(String, Vec<usize>)>,
    },
    /// A rule assigns parameters to Muon that are neither matrices nor stacks of matrices.
    #[error("the rule for {rule} assigns to Muon what is not a matrix or a stack of matrices: {}", list(parameters))]
    NotAMatrix {
        /// The rule, in words.
        rule: String,
        /// Path and shape of each.
        parameters: Vec<(String, Vec<usize>)>,
    },
    /// A rule splits matrices into blocks that do not fill them, or splits those of an optimizer other than Muon.
    #[error("the rule for {rule} splits `{path}` {shape:?} into {blocks}, which {problem}")]
    Blocks {
        /// The rule, in words.
        rule: String,
        /// The path of a parameter that it matches.
        path: String,
        /// The shape of that parameter.
        shape: Vec<usize>,
        /// The blocks, in words.
        blocks: String,
        /// The rest of the sentence.
        problem: &'static str,
    },
    /// A rule without conditions assigns matrices to a group other than Muon's.
    #[error("the rule for every parameter assigns matrices to `{group}` instead of Muon: {}", list(parameters))]
    MatrixWithoutMuon {
        /// The group that they are assigned to.
        group: String,
        /// Path and shape of each.
        parameters: Vec<(String, Vec<usize>)>,
    },
    /// The scale of a group depends on the model's hidden size, which is not set.
    #[error("the scale of the group `{group}` needs the model's hidden size, which is not set")]
    NoHiddenSize {
        /// The name of the group.
        group: String,
    },
    /// The module has no trainable parameters.
    #[error("the module has no trainable parameters")]
    NoParameters,
}

impl RuleError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            RuleError::Pattern { .. } => {
                Some("use `*` for any characters of one name, `**` for any number of whole names".to_string())
            }
            RuleError::UnknownGroup { known, .. } => Some(format!("use one of the groups {}", known.join(", "))),
            RuleError::DuplicateGroup { .. } => Some("choose another name; `buffer` is reserved".to_string()),
            RuleError::MatchesNothing { .. } => {
                Some("correct the rule, or mark it `.optional()` if some models lack these parameters".to_string())
            }
            RuleError::Shadowed { .. } => Some("move the rule up: the first rule that matches decides".to_string()),
            RuleError::Unmatched { .. } => Some("add a rule for them".to_string()),
            RuleError::NotAMatrix { .. } => Some("restrict the rule with `.rank(2..=3)`".to_string()),
            RuleError::Blocks { .. } => Some(
                "choose sizes that fill the side when repeated; the outputs of a Burn `Linear` are columns".to_string(),
            ),
            RuleError::MatrixWithoutMuon { .. } => {
                Some("name them in a rule, or mark this rule `.matrices_too()`".to_string())
            }
            RuleError::NoHiddenSize { .. } => Some("set `hidden` of the scale `hidden_size`".to_string()),
            RuleError::NoParameters => Some(
                "check `require_grad`: parameters without it count as buffers, and so do integer tensors".to_string(),
            ),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{render, seen};

    #[test]
    fn messages() {
        let rule = || "path `layers.**`".to_string();
        let group = || "adamw".to_string();
        let parameters = |count: usize| (0..count).map(|index| (format!("layers.{index}.norm"), vec![64])).collect();
        let errors = [
            RuleError::Pattern { pattern: "layers.**x".into(), reason: "recursive wildcards must be alone".into() },
            RuleError::UnknownGroup { rule: rule(), group: "moun".into(), known: vec!["muon".into(), group()] },
            RuleError::DuplicateGroup { group: group() },
            RuleError::MatchesNothing { rule: rule() },
            RuleError::Shadowed { rule: rule(), matched: 12 },
            RuleError::Unmatched { parameters: parameters(2) },
            RuleError::NotAMatrix { rule: rule(), parameters: parameters(7) },
            RuleError::Blocks {
                rule: rule(),
                path: "layers.0.up.weight".into(),
                shape: vec![4, 6],
                blocks: "blocks of 4 columns".into(),
                problem: "do not fill it",
            },
            RuleError::MatrixWithoutMuon { group: group(), parameters: vec![("head.weight".into(), vec![4, 6])] },
            RuleError::NoHiddenSize { group: "muon".into() },
            RuleError::NoParameters,
        ];
        // A new variant does not compile until it has a name here, and fails the test until it has an example above.
        let name = |error: &RuleError| match error {
            RuleError::Pattern { .. } => "Pattern",
            RuleError::UnknownGroup { .. } => "UnknownGroup",
            RuleError::DuplicateGroup { .. } => "DuplicateGroup",
            RuleError::MatchesNothing { .. } => "MatchesNothing",
            RuleError::Shadowed { .. } => "Shadowed",
            RuleError::Unmatched { .. } => "Unmatched",
            RuleError::NotAMatrix { .. } => "NotAMatrix",
            RuleError::Blocks { .. } => "Blocks",
            RuleError::MatrixWithoutMuon { .. } => "MatrixWithoutMuon",
            RuleError::NoHiddenSize { .. } => "NoHiddenSize",
            RuleError::NoParameters => "NoParameters",
        };
        assert_eq!(seen(&errors, name).len(), 11);
        insta::assert_snapshot!(render(&errors, name, RuleError::hint));
    }
}
