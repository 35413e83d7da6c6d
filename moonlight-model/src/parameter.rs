//! What is known of a tensor of the model: its path, its shape and what it is for.

/// One tensor of the model, under the path that Burn's module visitors see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterShape {
    /// The path, e.g. `layers.3.mlp.experts.gate_proj`.
    pub path: String,
    /// The shape in Burn's layout: a projection is `[in, out]`, a stack of experts `[experts, in, out]`.
    pub shape: Vec<usize>,
    /// What kind of tensor it is.
    pub kind: ParameterKind,
    /// The projection that it belongs to; `None` for embedding, head, router and norms.
    pub role: Option<ProjectionRole>,
    /// The decoder layer that it belongs to, from 0; `None` outside of the layers.
    pub layer: Option<usize>,
}

impl ParameterShape {
    /// Number of values.
    pub fn count(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product()
    }

    /// The path inside the decoder layer, e.g. `mlp.experts.gate_proj`; the whole path outside of the layers.
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
    /// The gain of a norm.
    Norm,
    /// The bias of a projection.
    Bias,
    /// The router's correction bias: a buffer that no gradient reaches.
    CorrectionBias,
}

impl ParameterKind {
    /// Whether it is a weight that may have an adapter: a projection, a stack of experts', a router.
    pub fn is_projection(self) -> bool {
        matches!(self, Self::Matrix | Self::Experts | Self::Router)
    }
}

/// What a projection does, and in which part of its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProjectionRole {
    /// In the attention.
    Attention(AttentionRole),
    /// In a dense layer's MLP.
    Mlp(MlpRole),
    /// In the experts that every token visits.
    SharedExperts(MlpRole),
    /// In the routed experts.
    Experts(MlpRole),
    /// The matrix that chooses among the routed experts; it is never quantized.
    Router,
}

/// What a projection of an attention makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionRole {
    /// Queries, from the hidden state.
    Query,
    /// The latent of queries, from the hidden state.
    QueryDown,
    /// Queries, from their latent.
    QueryUp,
    /// Keys, from the hidden state.
    Key,
    /// Values, from the hidden state.
    Value,
    /// The latent of keys and values, from the hidden state.
    KeyValueDown,
    /// Keys and values, from their latent.
    KeyValueUp,
    /// The hidden state, from the weighted values of all heads.
    Output,
}

/// The part of a gated MLP that a projection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MlpRole {
    /// The half that goes through SiLU.
    Gate,
    /// The half that is gated.
    Up,
    /// Back to the hidden state.
    Down,
}

impl ProjectionRole {
    /// Whether the projection reads the layer's normed hidden state (a routed expert reads a copy of it), not what another
    /// projection made.
    pub fn reads_hidden(self) -> bool {
        match self {
            Self::Attention(role) => {
                !matches!(role, AttentionRole::QueryUp | AttentionRole::KeyValueUp | AttentionRole::Output)
            }
            Self::Mlp(role) | Self::SharedExperts(role) | Self::Experts(role) => role != MlpRole::Down,
            Self::Router => true,
        }
    }

    /// Whether QK-clip (MuonClip, arXiv 2507.20534) may rewrite the projection: what makes heads' queries, and keys from a
    /// latent.
    pub fn is_clipped(self) -> bool {
        use AttentionRole::{KeyValueUp, Query, QueryUp};
        matches!(self, Self::Attention(Query | QueryUp | KeyValueUp))
    }
}

/// How many parameters a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All of them, the correction bias included.
    pub total: u64,
    /// Those that one token's forward pass uses: of the routed experts only the chosen ones.
    pub activated: u64,
    /// The embedding and the head, which the report's sizes leave out.
    pub embeddings: u64,
}
