//! [`ModelConfig`]: the published `config.json`, checked.
//!
//! * [`ModelConfig`] groups the keys by the part of the model that they shape. Each part reads, writes and checks its own keys:
//!   attention in `attention/*/shape.rs`, experts in `moe/shape.rs`, the rotary embedding in `rope.rs`.
//! * `json.rs` reads and writes the file. `other_keys.rs` lists the keys that are ignored and refuses all others.
//!   `validate.rs` refuses impossible values.
//! * `class_defaults.rs` has the defaults of keys that a `config.json` lacks.
//! * `presets.rs` has published configs by name.

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

/// The config of a decoder-only language model, as in the published `config.json`.
///
/// Field names are those of `config.json`, grouped in [`AttentionShape`], [`RopeConfig`] and [`MoeShape`]. Make one by
/// [`ModelConfig::load`], [`ModelConfig::preset`] or [`ModelConfig::new`], and a model by [`ModelConfig::init`].
///
/// ```
/// use moonlight_model::ModelConfig;
///
/// let config = ModelConfig::preset("moonlight-16b-a3b")?;
/// assert_eq!((config.hidden_size, config.num_hidden_layers), (2048, 27));
/// assert_eq!(config.cache_values_per_token(), 576);
/// assert_eq!(ModelConfig::from_json(&config.to_json())?, config);
/// # Ok::<(), moonlight_model::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ModelConfig {
    /// The published model class; decides the kind of attention and the defaults.
    pub model_type: ModelType,
    /// Number of token ids: rows of the embedding, columns of the head.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width of the MLP of a dense layer.
    pub intermediate_size: usize,
    /// Number of decoder layers, without multi-token-prediction layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// The longest sequence that the model supports, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of the layer norms and the final norm.
    pub rms_norm_eps: f64,
    /// Standard deviation of initialized matrices and embeddings.
    pub initializer_range: f64,
    /// Whether the head is the transposed embedding.
    pub tie_word_embeddings: bool,
    /// Whether the three projections of dense MLPs have biases (Llama).
    pub mlp_bias: bool,
    /// Latent or grouped-query attention, with its sizes.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub attention: AttentionShape,
    /// Frequencies of the rotary embedding and their scaling.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub rope: RopeConfig,
    /// The mixture of experts; `None` for a dense model.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub moe: Option<MoeShape>,
    /// The token that begins a text, if the tokenizer adds one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    #[cfg_attr(feature = "schema", schemars(with = "serde_json::Value"))]
    pub eos_token_id: Vec<u32>,
    /// The dtype of the published weights (`torch_dtype` or `dtype`), as written in the file.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub dtype: Option<String>,
    /// All other keys of the file, so that saving loses nothing. Reading refuses those that may change the computation.
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl ModelConfig {
    /// A config with these sizes. Everything else has a default (no experts, 4096 tokens, a head that is not tied to the embedding)
    /// and can be set by the `with_*` methods or the fields. Nothing is checked before [`validate`](ModelConfig::validate).
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

    /// Reads a `config.json` file; see [`from_json`](ModelConfig::from_json).
    ///
    /// # Errors
    ///
    /// [`ConfigError::File`] if the file cannot be read, and the errors of [`from_json`](ModelConfig::from_json).
    pub fn load(path: impl AsRef<std::path::Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::file(path, "read", &error))?;
        Self::from_json(&text)
    }

    /// Writes a `config.json` file; see [`to_json`](ModelConfig::to_json).
    ///
    /// # Errors
    ///
    /// [`ConfigError::File`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<std::path::Path>) -> Result<(), ConfigError> {
        let path = path.as_ref();
        std::fs::write(path, self.to_json()).map_err(|error| ConfigError::file(path, "written", &error))
    }

    /// The mixture of experts of layer `layer`, from 0; `None` if the layer is dense.
    pub fn moe_of_layer(&self, layer: usize) -> Option<&MoeShape> {
        self.moe.as_ref().filter(|moe| moe.is_in_layer(layer))
    }

    /// The number of values that one token needs in an attention layer.
    pub fn attention_widths(&self) -> AttentionWidths {
        self.attention.widths(self.num_attention_heads)
    }

    /// Width of the query and the key of one head.
    pub fn qk_head_dim(&self) -> usize {
        self.attention_widths().head
    }

    /// Dimensions of a head that the rotary embedding rotates.
    pub fn rope_dim(&self) -> usize {
        self.attention_widths().rotated
    }

    /// Values in the KV cache for each token and layer: 576 for Moonlight.
    pub fn cache_values_per_token(&self) -> usize {
        let [key_heads, row] = self.attention_widths().cache;
        key_heads * row
    }

    /// The factor on the attention scores: `qk_head_dim^-1/2`, which the DeepSeek family multiplies by YaRN's
    /// `mscale(factor, mscale_all_dim)^2`.
    pub fn softmax_scale(&self) -> f64 {
        self.attention.softmax_scale(&self.rope)
    }
}

/// A `with_*` method for each field that is not an argument of `new`.
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
    /// Sets [`rope`](Self::rope); by default `theta` is 10,000, without scaling, with the pairs of the model class.
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
