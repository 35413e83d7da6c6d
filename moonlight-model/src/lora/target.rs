//! Which projections get an adapter.

use crate::parameter::ProjectionRole;
use crate::pattern::NamePattern;

/// The words that stand for a kind of projection.
pub const TARGET_GROUPS: [&str; 5] = ["attention", "mlp", "shared_experts", "experts", "all"];

/// One target: a word of [`TARGET_GROUPS`], or the end of a projection's path as a glob.
#[derive(Debug, Clone)]
pub(super) enum Target {
    Group(&'static str),
    Path(NamePattern),
}

impl Target {
    /// The error is what is wrong with the glob.
    pub(super) fn new(text: &str) -> Result<Self, String> {
        if let Some(group) = TARGET_GROUPS.iter().find(|group| **group == text) {
            return Ok(Self::Group(group));
        }
        // `q_proj` is every layer's, as peft reads it; a checkpoint's names begin with `model.`.
        let end = text.strip_prefix("model.").unwrap_or(text);
        NamePattern::new(&format!("**.{end}")).map(Self::Path)
    }

    /// Whether a projection is meant, at `path`, say `layers.3.mlp.shared_experts.up_proj`.
    pub(super) fn matches(&self, path: &str, role: ProjectionRole) -> bool {
        match self {
            Self::Group("all") => true,
            Self::Group(group) => group_of(role) == *group,
            Self::Path(pattern) => pattern.matches(path),
        }
    }
}

fn group_of(role: ProjectionRole) -> &'static str {
    match role {
        ProjectionRole::Attention(_) => "attention",
        ProjectionRole::Mlp(_) => "mlp",
        ProjectionRole::SharedExperts(_) => "shared_experts",
        ProjectionRole::Experts(_) => "experts",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameter::{AttentionRole, MlpRole};

    fn matches(target: &str, (path, role): (&str, ProjectionRole)) -> bool {
        Target::new(target).unwrap().matches(path, role)
    }

    #[test]
    fn words_stand_for_kinds_and_names_for_ends_of_paths() {
        let all = [
            ("layers.0.self_attn.q_proj", ProjectionRole::Attention(AttentionRole::Query)),
            ("layers.0.mlp.gate_proj", ProjectionRole::Mlp(MlpRole::Gate)),
            ("layers.1.mlp.shared_experts.gate_proj", ProjectionRole::SharedExperts(MlpRole::Gate)),
            ("layers.1.mlp.experts.gate_proj", ProjectionRole::Experts(MlpRole::Gate)),
        ];
        let found = |target: &str| all.map(|projection| matches(target, projection));
        assert_eq!(found("attention"), [true, false, false, false]);
        assert_eq!(found("mlp"), [false, true, false, false]);
        assert_eq!(found("shared_experts"), [false, false, true, false]);
        assert_eq!(found("experts"), [false, false, false, true]);
        assert_eq!(found("all"), [true; 4]);
        assert_eq!(found("gate_proj"), [false, true, true, true]);
        assert_eq!(found("mlp.gate_proj"), [false, true, false, false]);
        assert_eq!(found("*_proj"), [true; 4]);
        assert_eq!(found("model.layers.1.**"), [false, false, true, true]);
        assert_eq!(found("proj"), [false; 4]);
        assert!(Target::new("layers.[0").is_err());
    }
}
