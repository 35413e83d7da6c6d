//! Attention layers. Each kind has a folder, with its module and config in `mod.rs` and its part of `config.json` in `shape.rs`. This
//! file lists the kinds; `kind.rs` has the traits that a kind implements.

mod cache;
pub(crate) mod gqa;
pub(crate) mod kind;
mod logit_stats;
pub(crate) mod mla;

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::error::ConfigError;
use crate::config::keys::Keys;
use crate::config::model_type::ModelType;
use crate::config::rope::RopeConfig;
use crate::forward::{DecodeContext, ForwardContext};
use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::module_enum::delegate_module;
use crate::projection::projections_of_variants;
use gqa::GqaShape;
use kind::{AttentionKind, AttentionModule};
use mla::MlaShape;

pub(crate) use cache::LayerCache;
pub use gqa::{GroupedQueryAttention, GroupedQueryAttentionConfig};
pub(crate) use kind::ModelWidths;
pub use kind::{AttentionWidths, QkClipProjections};
pub(crate) use logit_stats::LogitStats;
pub use mla::{MultiHeadLatentAttention, MultiHeadLatentAttentionConfig};

/// The attention of a model's layers, by the keys of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionShape {
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
    Mla(MlaShape),
    /// Grouped-query attention (Llama, Qwen2).
    Gqa(GqaShape),
}

impl AttentionShape {
    /// The keys of `config.json` of all kinds.
    pub(crate) fn keys() -> impl Iterator<Item = &'static str> {
        [MlaShape::KEYS, GqaShape::KEYS].into_iter().flatten().copied()
    }

    /// Reads the keys of the model class's kind of attention.
    pub(crate) fn read(
        keys: &mut Keys,
        model_type: ModelType,
        hidden_size: usize,
        heads: usize,
    ) -> Result<Self, ConfigError> {
        match model_type {
            ModelType::DeepseekV3 | ModelType::DeepseekV2 | ModelType::KimiK2 => MlaShape::read(keys).map(Self::Mla),
            ModelType::Llama | ModelType::Qwen2 => GqaShape::read(keys, model_type, hidden_size, heads).map(Self::Gqa),
        }
    }

    /// The config of the attention of one layer.
    pub(crate) fn config(&self, model: &ModelWidths<'_>) -> AttentionConfig {
        match self {
            Self::Mla(shape) => AttentionConfig::Mla(shape.config(model)),
            Self::Gqa(shape) => AttentionConfig::Gqa(shape.config(model)),
        }
    }

    fn kind(&self) -> &dyn AttentionKind {
        match self {
            Self::Mla(shape) => shape,
            Self::Gqa(shape) => shape,
        }
    }

    pub(crate) fn write(&self, model_type: ModelType, heads: usize, map: &mut Map<String, Value>) {
        self.kind().write(model_type, heads, map);
    }

    pub(crate) fn validate(&self, heads: usize) -> Result<(), ConfigError> {
        self.kind().validate(heads)
    }

    pub(crate) fn widths(&self, heads: usize) -> AttentionWidths {
        self.kind().widths(heads)
    }

    pub(crate) fn interleaves(&self) -> bool {
        self.kind().interleaves()
    }

    pub(crate) fn softmax_scale(&self, rope: &RopeConfig) -> f64 {
        self.kind().softmax_scale(rope)
    }
}

/// One object with the keys of all kinds, because `config.json` does not nest them.
#[cfg(feature = "schema")]
impl schemars::JsonSchema for AttentionShape {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "AttentionShape".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let mut properties = Map::new();
        for kind in [MlaShape::json_schema(generator), GqaShape::json_schema(generator)] {
            for (key, value) in kind.get("properties").and_then(Value::as_object).into_iter().flatten() {
                properties.entry(key).or_insert_with(|| value.clone());
            }
        }
        schemars::json_schema!({"type": "object", "properties": properties})
    }
}

/// The config of an [`Attention`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum AttentionConfig {
    /// Multi-head latent attention.
    Mla(MultiHeadLatentAttentionConfig),
    /// Grouped-query attention.
    Gqa(GroupedQueryAttentionConfig),
}

impl AttentionConfig {
    /// Initializes an attention layer. A parameter is drawn when it is first read.
    ///
    /// # Panics
    ///
    /// If the `init` of the kind panics.
    pub fn init(&self, device: &Device) -> Attention {
        self.build(Init::new(device))
    }

    /// Width of the hidden states.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Mla(config) => config.hidden_size,
            Self::Gqa(config) => config.hidden_size,
        }
    }

    pub(crate) fn build(&self, init: Init<'_>) -> Attention {
        match self {
            Self::Mla(config) => Attention::Mla(config.build(init)),
            Self::Gqa(config) => Attention::Gqa(config.build(init)),
        }
    }
}

/// The attention of a decoder layer.
///
/// Should be created with [`AttentionConfig`].
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there are a few dozen, one a layer")]
pub enum Attention {
    /// Multi-head latent attention.
    Mla(MultiHeadLatentAttention),
    /// Grouped-query attention.
    Gqa(GroupedQueryAttention),
}

delegate_module!(Attention { Mla, Gqa });
projections_of_variants!(Attention { Mla, Gqa });

impl Attention {
    fn module(&self) -> &dyn AttentionModule {
        match self {
            Self::Mla(attention) => attention,
            Self::Gqa(attention) => attention,
        }
    }

    fn module_mut(&mut self) -> &mut dyn AttentionModule {
        match self {
            Self::Mla(attention) => attention,
            Self::Gqa(attention) => attention,
        }
    }

    /// Causal attention over whole sequences.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, sequence, hidden]`
    ///
    /// # Panics
    ///
    /// If the context has another batch size or sequence length, or no positions.
    pub fn forward(&self, x: Tensor<3>, context: &ForwardContext) -> Tensor<3> {
        match self {
            Self::Mla(attention) => attention.forward(x, context),
            Self::Gqa(attention) => attention.forward(x, context),
        }
    }

    /// The projections that QK-clip rescales.
    pub fn qk_clip_projections_mut(&mut self) -> QkClipProjections<'_> {
        self.module_mut().qk_clip_projections_mut()
    }

    pub(crate) fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Option<LogitStats>) {
        self.module().forward_rows(x, context)
    }

    pub(crate) fn decode(&self, x: Tensor<2>, new: &DecodeContext, cache: &mut LayerCache) -> Tensor<2> {
        self.module().decode(x, new, cache)
    }

    /// The attention as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self, cache: &mut LayerCache) -> Option<few_tokens::Attention> {
        Some(match self {
            Self::Mla(attention) => few_tokens::Attention::Mla(Box::new(attention.few_tokens(cache)?)),
            Self::Gqa(attention) => few_tokens::Attention::Gqa(Box::new(attention.few_tokens()?)),
        })
    }
}
