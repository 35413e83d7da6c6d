//! The shape of a model: what the published `config.json` says, checked.
//!
//! * [`ModelConfig`] holds the numbers, grouped by the part of the model that they shape; each part's keys are read,
//!   written and checked beside the part: attention in `attention/*/shape.rs`, experts in `moe/shape.rs`, the rotary
//!   embedding in `rope.rs`.
//! * `json.rs` reads and writes the published spelling(s); `other_keys.rs` lists the keys that change nothing and refuses the
//!   rest; `validate.rs` refuses impossible combinations.
//! * `class_defaults.rs` has what a `config.json` means where it lacks a key.
//! * `presets.rs` has the published shapes by name.

mod class_defaults;
pub(crate) mod error;
mod json;
pub(crate) mod keys;
pub(crate) mod limits;
pub(crate) mod model_type;
mod other_keys;
mod presets;
pub(crate) mod rope;
mod validate;

pub use crate::attention::gqa::{GqaShape, SlidingWindow, WindowLayers};
pub use crate::attention::mla::MlaShape;
pub use crate::attention::{AttentionShape, AttentionWidths};
pub use crate::moe::shape::{MoeShape, ScoringFunc, TopkMethod};
pub use crate::parameter::{AttentionRole, MlpRole, ParameterCount, ParameterKind, ParameterShape, ProjectionRole};
pub use class_defaults::fill_class_defaults;
pub use error::{ConfigError, PRESETS};
pub use json::shape_keys;
pub use model_type::ModelType;
pub use other_keys::ignore_reason;
pub use rope::{Llama3Config, RopeConfig, RopeScaling, YarnConfig};

/// The shape of a decoder-only language model of the Moonlight family.
///
/// Field names are those of the published `config.json`, grouped: [`AttentionShape`], [`RopeConfig`],
/// [`MoeShape`]. Build one with [`ModelConfig::from_json`], [`ModelConfig::preset`] or [`ModelConfig::new`].
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ModelConfig {
    /// The model class.
    pub model_type: ModelType,
    /// Rows of the embedding and columns of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense layer's MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers (multi-token-prediction layers do not count).
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// The longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of the layer norms and the final norm.
    pub rms_norm_eps: f64,
    /// Standard deviation of freshly initialised matrices and embeddings.
    pub initializer_range: f64,
    /// Whether the head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Biases on the three projections of dense MLPs (Llama).
    pub mlp_bias: bool,
    /// Multi-head latent attention, or grouped-query attention.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub attention: AttentionShape,
    /// Rotary position embedding.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub rope: RopeConfig,
    /// Experts; `None` for a dense model.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub moe: Option<MoeShape>,
    /// First token of a text, where the tokenizer adds one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    #[cfg_attr(feature = "schema", schemars(with = "serde_json::Value"))]
    pub eos_token_id: Vec<u32>,
    /// The dtype that the weights were published in (`torch_dtype` or `dtype`), as spelled there.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub dtype: Option<String>,
    /// Every other key of the file, kept so that saving loses nothing. Reading refuses keys that may shape the computation.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl ModelConfig {
    /// A dense or sparse decoder of the class `model_type`; everything else has the defaults of `config.json` (no experts, a
    /// context of 4096 tokens, a head of its own) and is changed by the `with_*` methods or the fields.
    ///
    /// ```
    /// use moonlight_model::ModelConfig;
    /// use moonlight_model::config::{AttentionShape, GqaShape, ModelType};
    ///
    /// let attention = AttentionShape::Gqa(GqaShape::new(2, 16));
    /// let config = ModelConfig::new(ModelType::Llama, 256, 64, 176, 2, 4, attention).with_tie_word_embeddings(true);
    /// assert_eq!(config.parameter_count().embeddings, 256 * 64);
    /// config.validate()?;
    /// # Ok::<(), moonlight_model::ConfigError>(())
    /// ```
    pub fn new(
        model_type: ModelType,
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        attention: AttentionShape,
    ) -> Self {
        let rope = RopeConfig::new().with_interleave(attention.interleaves());
        Self {
            model_type,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-6,
            initializer_range: 0.02,
            tie_word_embeddings: false,
            mlp_bias: false,
            attention,
            rope,
            moe: None,
            bos_token_id: None,
            eos_token_id: Vec::new(),
            dtype: None,
            extra: serde_json::Map::new(),
        }
    }

    /// Reads a `config.json` file, as [`from_json`](ModelConfig::from_json) reads its text.
    ///
    /// # Errors
    ///
    /// [`ConfigError::File`] for a file that cannot be read, and those of [`from_json`](ModelConfig::from_json).
    pub fn load(path: impl AsRef<std::path::Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::file(path, "read", &error))?;
        Self::from_json(&text)
    }

    /// Writes a `config.json` file, the text of [`to_json`](ModelConfig::to_json).
    ///
    /// # Errors
    ///
    /// [`ConfigError::File`] for a file that cannot be written.
    pub fn save(&self, path: impl AsRef<std::path::Path>) -> Result<(), ConfigError> {
        let path = path.as_ref();
        std::fs::write(path, self.to_json()).map_err(|error| ConfigError::file(path, "written", &error))
    }

    /// The experts' configuration of layer `layer`, or `None` where the layer is dense.
    pub fn moe_of_layer(&self, layer: usize) -> Option<&MoeShape> {
        self.moe.as_ref().filter(|moe| moe.is_in_layer(layer))
    }

    /// What one token takes in an attention layer.
    pub fn attention_widths(&self) -> AttentionWidths {
        self.attention.widths(self.num_attention_heads)
    }

    /// Width of one head's query and key.
    pub fn qk_head_dim(&self) -> usize {
        self.attention_widths().head
    }

    /// Dimensions of a head that the rotary embedding turns.
    pub fn rope_dim(&self) -> usize {
        self.attention_widths().rotated
    }

    /// Values that the cache keeps for each token and layer: 576 for Moonlight.
    pub fn cache_values_per_token(&self) -> usize {
        let [key_heads, row] = self.attention_widths().cache;
        key_heads * row
    }

    /// The factor on the attention scores: `head_dim^-1/2`, times YaRN's `mscale(factor, mscale_all_dim)^2` in the
    /// DeepSeek family.
    pub fn softmax_scale(&self) -> f64 {
        self.attention.softmax_scale(&self.rope)
    }
}

/// One `with_*` method for each field that `new` does not ask for.
macro_rules! setters {
    ($($(#[$doc:meta])* $setter:ident: $field:ident, $type:ty;)+) => {
        impl ModelConfig {
            $($(#[$doc])* #[must_use] pub fn $setter(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            })+
        }
    };
}

setters! {
    /// Sets [`max_position_embeddings`](Self::max_position_embeddings); 4096 by default.
    with_max_position_embeddings: max_position_embeddings, usize;
    /// Sets [`rms_norm_eps`](Self::rms_norm_eps); 1e-6 by default.
    with_rms_norm_eps: rms_norm_eps, f64;
    /// Sets [`initializer_range`](Self::initializer_range); 0.02 by default.
    with_initializer_range: initializer_range, f64;
    /// Sets [`tie_word_embeddings`](Self::tie_word_embeddings); false by default.
    with_tie_word_embeddings: tie_word_embeddings, bool;
    /// Sets [`mlp_bias`](Self::mlp_bias); false by default.
    with_mlp_bias: mlp_bias, bool;
    /// Sets [`rope`](Self::rope); by default `theta` is 10,000, without scaling, in the layout of the model class.
    with_rope: rope, RopeConfig;
    /// Sets [`moe`](Self::moe); none by default.
    with_moe: moe, Option<MoeShape>;
    /// Sets [`bos_token_id`](Self::bos_token_id); none by default.
    with_bos_token_id: bos_token_id, Option<u32>;
    /// Sets [`eos_token_id`](Self::eos_token_id); none by default.
    with_eos_token_id: eos_token_id, Vec<u32>;
    /// Sets [`dtype`](Self::dtype); none by default.
    with_dtype: dtype, Option<String>;
}
