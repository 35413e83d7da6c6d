//! [`Target`]: which projections get an adapter.

use crate::parameter::ProjectionRole;
use crate::pattern::{NamePattern, PatternError};

/// The targets that name a kind of projection. `all` excludes the router.
pub const TARGET_GROUPS: [&str; 6] = ["attention", "mlp", "shared_experts", "experts", "all", "router"];

/// One target: a name in [`TARGET_GROUPS`], or the end of a projection's path as a glob.
#[derive(Debug, Clone)]
pub(super) enum Target {
    Group(&'static str),
    Path(NamePattern),
    /// The end of a router's path.
    Router(NamePattern),
}

impl Target {
    pub(super) fn new(text: &str) -> Result<Self, PatternError> {
        if let Some(group) = TARGET_GROUPS.iter().find(|group| **group == text) {
            return Ok(Self::Group(group));
        }
        // As in peft, `q_proj` matches the projection of every layer. Names in a checkpoint begin with `model.`, paths in the module do
        // not.
        let end = text.strip_prefix("model.").unwrap_or(text);
        // The router is `gate` in a checkpoint and `router` in the module.
        let router = match end.strip_suffix("gate") {
            Some(front) if front.is_empty() || front.ends_with('.') => Some(format!("{front}router")),
            _ => (end == "router" || end.ends_with(".router")).then(|| end.to_owned()),
        };
        let pattern = NamePattern::new(&format!("**.{}", router.as_deref().unwrap_or(end)))?;
        Ok(if router.is_some() { Self::Router(pattern) } else { Self::Path(pattern) })
    }

    /// Whether the projection at `path`, e.g. `layers.3.mlp.shared_experts.up_proj`, is targeted.
    pub(super) fn matches(&self, path: &str, role: ProjectionRole) -> bool {
        match self {
            Self::Group("all") => role != ProjectionRole::Router,
            Self::Group(group) => group_of(role) == *group,
            // A router is adapted only if it is named, not because a glob like `layers.1.**` matches it: an adapter on a router
            // unbalances the loads of the experts.
            Self::Path(pattern) => role != ProjectionRole::Router && pattern.matches(path),
            Self::Router(pattern) => role == ProjectionRole::Router && pattern.matches(path),
        }
    }
}

fn group_of(role: ProjectionRole) -> &'static str {
    match role {
        ProjectionRole::Attention(_) => "attention",
        ProjectionRole::Mlp(_) => "mlp",
        ProjectionRole::SharedExperts(_) => "shared_experts",
        ProjectionRole::Experts(_) => "experts",
        ProjectionRole::Router => "router",
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
    fn groups_match_kinds_and_globs_match_ends_of_paths() {
        let all = [
            ("layers.0.self_attn.q_proj", ProjectionRole::Attention(AttentionRole::Query)),
            ("layers.0.mlp.gate_proj", ProjectionRole::Mlp(MlpRole::Gate)),
            ("layers.1.mlp.shared_experts.gate_proj", ProjectionRole::SharedExperts(MlpRole::Gate)),
            ("layers.1.mlp.experts.gate_proj", ProjectionRole::Experts(MlpRole::Gate)),
            ("layers.1.mlp.router", ProjectionRole::Router),
        ];
        let found = |target: &str| all.map(|projection| matches(target, projection));
        assert_eq!(found("attention"), [true, false, false, false, false]);
        assert_eq!(found("mlp"), [false, true, false, false, false]);
        assert_eq!(found("shared_experts"), [false, false, true, false, false]);
        assert_eq!(found("experts"), [false, false, false, true, false]);
        assert_eq!(found("all"), [true, true, true, true, false]);
        assert_eq!(found("gate_proj"), [false, true, true, true, false]);
        assert_eq!(found("mlp.gate_proj"), [false, true, false, false, false]);
        assert_eq!(found("*_proj"), [true, true, true, true, false]);
        assert_eq!(found("model.layers.1.**"), [false, false, true, true, false]);
        assert_eq!(found("proj"), [false; 5]);
        for router in ["router", "gate", "mlp.gate", "model.layers.1.mlp.gate", "layers.*.mlp.router"] {
            assert_eq!(found(router), [false, false, false, false, true], "{router}");
        }
        assert!(Target::new("layers.[0").is_err());
    }
}
