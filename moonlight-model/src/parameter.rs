//! The description of a parameter: its path, shape, kind and role.

/// One parameter of a model, without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterShape {
    /// The path that Burn's module visitors see, e.g. `layers.3.mlp.experts.gate_proj`.
    pub path: String,
    /// The shape in Burn's layout: a projection is `[in, out]`, a stack of experts `[experts, in, out]`.
    pub shape: Vec<usize>,
    /// Decides which optimizer updates the parameter and how a checkpoint stores it.
    pub kind: ParameterKind,
    /// The projection whose weight or bias the parameter is; `None` for embedding, head, norms and correction bias.
    pub role: Option<ProjectionRole>,
    /// The decoder layer of the parameter, from 0; `None` outside the layers.
    pub layer: Option<usize>,
}

impl ParameterShape {
    /// The number of values.
    pub fn count(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product()
    }

    /// The path within the decoder layer, e.g. `mlp.experts.gate_proj`; outside the layers the complete path.
    pub fn path_in_layer(&self) -> &str {
        match self.layer {
            Some(_) => self.path.splitn(3, '.').nth(2).unwrap_or(&self.path),
            None => &self.path,
        }
    }
}

/// What kind of tensor a parameter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ParameterKind {
    /// The token embedding, `[vocab, hidden]`.
    Embedding,
    /// The output head, `[hidden, vocab]`.
    Head,
    /// A projection, `[in, out]`.
    Matrix,
    /// A stack of routed experts' projections, `[experts, in, out]`.
    Experts,
    /// The router's matrix, `[hidden, experts]`.
    Router,
    /// The gain of a norm, `[width]`.
    Norm,
    /// The bias of a projection, `[out]`.
    Bias,
    /// The router's correction bias, `[experts]`: a buffer without a gradient.
    CorrectionBias,
}

impl ParameterKind {
    /// Whether a parameter of this kind may have an adapter: a projection, a stack of experts, or a router.
    pub fn is_projection(self) -> bool {
        matches!(self, Self::Matrix | Self::Experts | Self::Router)
    }
}

/// Which projection of a decoder layer a parameter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProjectionRole {
    /// A projection of the attention.
    Attention(AttentionRole),
    /// A projection of a dense layer's MLP.
    Mlp(MlpRole),
    /// A projection of the shared experts.
    SharedExperts(MlpRole),
    /// A projection of the routed experts.
    Experts(MlpRole),
    /// The router's matrix, which is never quantized: rounding errors in it would send tokens to other experts.
    Router,
}

/// A projection of an attention, by its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionRole {
    /// Queries, from the hidden state (`q_proj`).
    Query,
    /// The query latent, from the hidden state (`q_a_proj`).
    QueryDown,
    /// Queries, from their latent (`q_b_proj`).
    QueryUp,
    /// Keys, from the hidden state (`k_proj`).
    Key,
    /// Values, from the hidden state (`v_proj`).
    Value,
    /// The latent of keys and values with the shared key, from the hidden state (`kv_a_proj_with_mqa`).
    KeyValueDown,
    /// Keys and values, from their latent (`kv_b_proj`).
    KeyValueUp,
    /// The hidden state, from the outputs of all heads (`o_proj`).
    Output,
}

/// A projection of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MlpRole {
    /// `gate_proj`, whose output passes through SiLU.
    Gate,
    /// `up_proj`, whose output is multiplied by the gate.
    Up,
    /// `down_proj`, back to the hidden size.
    Down,
}

impl ProjectionRole {
    /// Whether the projection's input is the layer's normalized hidden state (routed experts read a copy), and not the output of
    /// another projection.
    pub fn reads_hidden(self) -> bool {
        match self {
            Self::Attention(role) => {
                !matches!(role, AttentionRole::QueryUp | AttentionRole::KeyValueUp | AttentionRole::Output)
            }
            Self::Mlp(role) | Self::SharedExperts(role) | Self::Experts(role) => role != MlpRole::Down,
            Self::Router => true,
        }
    }

    /// Whether QK-clip (MuonClip, arXiv 2507.20534) may rescale the projection: those that output queries, or keys from a latent.
    pub fn is_clipped(self) -> bool {
        use AttentionRole::{KeyValueUp, Query, QueryUp};
        matches!(self, Self::Attention(Query | QueryUp | KeyValueUp))
    }
}

/// The number of parameters of a model. A count that exceeds `u64` is `u64::MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All parameters, correction biases included.
    pub total: u64,
    /// Parameters that the forward pass of one token uses, with only `num_experts_per_tok` of the routed experts.
    pub activated: u64,
    /// Embedding and head, which the model sizes in the Muon report exclude.
    pub embeddings: u64,
}
