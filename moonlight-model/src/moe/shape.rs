//! [`MoeShape`]: the keys of `config.json` for the mixture of experts.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{MoeConfig, RouterConfig};
use crate::config::error::ConfigError;
use crate::config::keys::Keys;
use crate::config::limits::{
    MAX_EXPERTS, MAX_HEADS, MAX_WIDTH, check_at_most, check_positive, check_positive_number, check_size, require,
};
use crate::config::model_type::ModelType;

/// The keys of `config.json` for the mixture of experts.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MoeShape {
    /// Number of routed experts.
    pub n_routed_experts: usize,
    /// Number of routed experts for each token.
    pub num_experts_per_tok: usize,
    /// Width of the MLP of one expert.
    pub moe_intermediate_size: usize,
    /// Number of shared experts, which are built as one MLP of this many times the width; 0 for none.
    pub n_shared_experts: usize,
    /// Number of layers at the start that are dense.
    pub first_k_dense_replace: usize,
    /// After these, layers whose index is a multiple of this have experts; 1 for all.
    pub moe_layer_freq: usize,
    /// Number of groups that the experts are divided into.
    pub n_group: usize,
    /// Number of groups that the experts of a token may come from.
    pub topk_group: usize,
    /// How the router's logits become scores.
    #[cfg_attr(feature = "schema", schemars(rename = "scoring_func"))]
    pub scoring: ScoringFunc,
    /// How experts are chosen by their scores.
    pub topk_method: TopkMethod,
    /// Whether the scores of the chosen experts are normalized to a sum of 1.
    pub norm_topk_prob: bool,
    /// Factor on the weights of the chosen experts.
    pub routed_scaling_factor: f64,
}

/// How the router's logits become scores (`scoring_func`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ScoringFunc {
    /// A sigmoid of each logit (DeepSeek-V3).
    Sigmoid,
    /// A softmax over all experts (DeepSeek-V2).
    Softmax,
}

/// How experts are chosen by their scores (`topk_method`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum TopkMethod {
    /// Auxiliary-loss-free balancing (DeepSeek-V3): a correction bias is added for the choice, but not in the weights; groups are
    /// ranked by the sum of their two best experts.
    NoauxTc,
    /// The best scores, without groups.
    Greedy,
    /// The best scores within the groups with the best maximum (DeepSeek-V2).
    GroupLimitedGreedy,
}

impl MoeShape {
    /// The keys that are read.
    pub(crate) const KEYS: &[&str] = &[
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "first_k_dense_replace",
        "moe_layer_freq",
        "n_group",
        "topk_group",
        "scoring_func",
        "topk_method",
        "norm_topk_prob",
        "routed_scaling_factor",
    ];

    /// Reads the keys; `None` for a dense model.
    pub(crate) fn read(keys: &mut Keys, model_type: ModelType) -> Result<Option<Self>, ConfigError> {
        // As in DeepSeek-V2's remote code, a model without `n_routed_experts` is dense.
        let Some(n_routed_experts) = keys.optional_size("n_routed_experts")? else {
            return Ok(None);
        };
        let v2 = model_type == ModelType::DeepseekV2;
        let scoring = match keys.string("scoring_func")?.as_deref() {
            None if v2 => ScoringFunc::Softmax,
            None | Some("sigmoid") => ScoringFunc::Sigmoid,
            Some("softmax") => ScoringFunc::Softmax,
            Some(other) => {
                return Err(ConfigError::Invalid {
                    field: "scoring_func",
                    problem: format!("is `{other}`; supported are `sigmoid` and `softmax`"),
                });
            }
        };
        let topk_method = match keys.string("topk_method")?.as_deref() {
            None if v2 => TopkMethod::Greedy,
            None | Some("noaux_tc") => TopkMethod::NoauxTc,
            Some("greedy" | "gready") => TopkMethod::Greedy, // V2-Lite's remote code spells it `gready`
            Some("group_limited_greedy") => TopkMethod::GroupLimitedGreedy,
            Some(other) => {
                return Err(ConfigError::Invalid {
                    field: "topk_method",
                    problem: format!("is `{other}`; supported are `noaux_tc`, `greedy` and `group_limited_greedy`"),
                });
            }
        };
        Ok(Some(Self {
            n_routed_experts,
            num_experts_per_tok: keys.size("num_experts_per_tok")?,
            moe_intermediate_size: keys.size("moe_intermediate_size")?,
            n_shared_experts: keys.optional_size("n_shared_experts")?.unwrap_or(0),
            first_k_dense_replace: keys.optional_size("first_k_dense_replace")?.unwrap_or(0),
            moe_layer_freq: keys.optional_size("moe_layer_freq")?.unwrap_or(1),
            n_group: keys.optional_size("n_group")?.unwrap_or(1),
            topk_group: keys.optional_size("topk_group")?.unwrap_or(1),
            scoring,
            topk_method,
            norm_topk_prob: keys.boolean("norm_topk_prob")?.unwrap_or(!v2),
            routed_scaling_factor: keys.number("routed_scaling_factor")?.unwrap_or(1.0),
        }))
    }

    /// Writes the keys as published files spell them.
    pub(crate) fn write(&self, map: &mut Map<String, Value>) {
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_owned(), value);
        };
        put("n_routed_experts", json!(self.n_routed_experts));
        put("num_experts_per_tok", json!(self.num_experts_per_tok));
        put("moe_intermediate_size", json!(self.moe_intermediate_size));
        put("n_shared_experts", json!(self.n_shared_experts));
        put("first_k_dense_replace", json!(self.first_k_dense_replace));
        put("moe_layer_freq", json!(self.moe_layer_freq));
        put("n_group", json!(self.n_group));
        put("topk_group", json!(self.topk_group));
        put("scoring_func", json!(self.scoring.as_str()));
        put("topk_method", json!(self.topk_method.as_str()));
        put("norm_topk_prob", json!(self.norm_topk_prob));
        put("routed_scaling_factor", json!(self.routed_scaling_factor));
    }

    /// Whether layer `layer` has experts; it is dense otherwise.
    pub(crate) fn is_in_layer(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq)
    }

    /// The config of the mixture of one layer.
    pub(crate) fn config(&self, hidden_size: usize, initializer_range: f64) -> MoeConfig {
        let router = RouterConfig {
            hidden_size,
            n_routed_experts: self.n_routed_experts,
            num_experts_per_tok: self.num_experts_per_tok,
            n_group: self.n_group,
            topk_group: self.topk_group,
            scoring: self.scoring,
            topk_method: self.topk_method,
            norm_topk_prob: self.norm_topk_prob,
            routed_scaling_factor: self.routed_scaling_factor,
            initializer_range,
        };
        MoeConfig {
            router,
            moe_intermediate_size: self.moe_intermediate_size,
            n_shared_experts: self.n_shared_experts,
            initializer_range,
        }
    }

    /// Refuses impossible values and combinations.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check_size(self.n_routed_experts, "n_routed_experts", MAX_EXPERTS)?;
        check_positive(self.num_experts_per_tok, "num_experts_per_tok")?;
        check_size(self.moe_intermediate_size, "moe_intermediate_size", MAX_WIDTH)?;
        check_at_most(self.n_shared_experts, "n_shared_experts", MAX_HEADS)?;
        check_positive(self.moe_layer_freq, "moe_layer_freq")?;
        check_positive(self.n_group, "n_group")?;
        check_positive_number(self.routed_scaling_factor, "routed_scaling_factor")?;
        let experts = self.n_routed_experts;
        require(self.num_experts_per_tok <= experts, "num_experts_per_tok", || {
            format!("is {}, more than the {experts} routed experts", self.num_experts_per_tok)
        })?;
        require(experts.is_multiple_of(self.n_group), "n_group", || {
            format!("is {}, which does not divide the {experts} routed experts", self.n_group)
        })?;
        require((1..=self.n_group).contains(&self.topk_group), "topk_group", || {
            format!("is {}, outside 1..={}", self.topk_group, self.n_group)
        })?;
        let per_group = experts / self.n_group;
        require(self.num_experts_per_tok <= self.topk_group * per_group, "num_experts_per_tok", || {
            format!(
                "is {}, but the {} groups that a token can choose from have {} experts",
                self.num_experts_per_tok,
                self.topk_group,
                self.topk_group * per_group
            )
        })?;
        // `noaux_tc` ranks a group by the sum of its two best experts, so a group needs two.
        let needs_two = self.topk_method == TopkMethod::NoauxTc && self.n_group > 1;
        require(!needs_two || per_group >= 2, "n_group", || {
            format!(
                "is {}, which leaves {per_group} expert in a group; `noaux_tc` ranks groups by their two best",
                self.n_group
            )
        })
    }
}

impl ScoringFunc {
    fn as_str(self) -> &'static str {
        match self {
            Self::Sigmoid => "sigmoid",
            Self::Softmax => "softmax",
        }
    }
}

impl TopkMethod {
    fn as_str(self) -> &'static str {
        match self {
            Self::NoauxTc => "noaux_tc",
            Self::Greedy => "greedy",
            Self::GroupLimitedGreedy => "group_limited_greedy",
        }
    }
}
