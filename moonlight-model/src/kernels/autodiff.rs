//! Gradients of the operations, written by hand: each saves its inputs and calls a `*_grad` kernel of the backend.

use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, binary, unary};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend};

use super::reference::AttentionSaved;
use super::{AttentionSpec, CachedAttentionSpec, GroupLayout, Kernels, ModelOps, QuantizedShape, RotationSpec};
use crate::moe::RoutingRule;

/// Evaluates `forward`. If a parent is tracked, the result becomes a node of the graph, and its backward step receives `state`, which
/// saves parents by `prep.checkpoint`.
macro_rules! node {
    ($backward:ident, [$($parent:expr),+], |$prep:ident| $state:expr, $forward:expr) => {
        match $backward.prepare::<C>([$($parent),+]).compute_bound().stateful() {
            #[allow(unused_mut, reason = "not every state checkpoints a parent")]
            OpsKind::Tracked(mut $prep) => {
                let state = $state;
                $prep.finish(state, $forward)
            }
            OpsKind::UnTracked(prep) => prep.finish($forward),
        }
    };
}

impl<B: Kernels, C: CheckpointStrategy> ModelOps for Autodiff<B, C> {
    fn project(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let (rows_tracked, weight_tracked) = (rows.is_tracked(), weight.is_tracked());
        node!(
            Project,
            [rows.node(), weight.node()],
            // Each operand is needed only for the gradient of the other. With a frozen weight, as in LoRA, no rows are
            // saved.
            |prep| (weight_tracked.then(|| prep.checkpoint(&rows)), rows_tracked.then(|| prep.checkpoint(&weight))),
            B::project_forward(rows.into_primitive(), weight.into_primitive())
        )
    }

    fn grouped_matmul(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        layout: Arc<GroupLayout>,
    ) -> FloatTensor<Self> {
        let (rows_tracked, weight_tracked) = (rows.is_tracked(), weight.is_tracked());
        node!(
            GroupedMatmul,
            [rows.node(), weight.node()],
            |prep| (
                weight_tracked.then(|| prep.checkpoint(&rows)),
                rows_tracked.then(|| prep.checkpoint(&weight)),
                layout.clone(),
            ),
            B::grouped_matmul_forward(rows.into_primitive(), weight.into_primitive(), &layout)
        )
    }

    fn quantized_matmul(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: QuantizedShape,
        layout: Arc<GroupLayout>,
    ) -> FloatTensor<Self> {
        let scales = scales.into_primitive();
        node!(
            QuantizedMatmul,
            [rows.node()],
            |prep| (values.clone(), scales.clone(), spec, layout.clone()),
            B::quantized_matmul_forward(rows.into_primitive(), values, scales, spec, &layout)
        )
    }

    fn dispatch_rows(tokens: FloatTensor<Self>, layout: Arc<GroupLayout>) -> FloatTensor<Self> {
        node!(
            DispatchRows,
            [tokens.node()],
            |prep| layout.clone(),
            B::dispatch_rows_forward(tokens.into_primitive(), &layout)
        )
    }

    fn combine_rows(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        layout: Arc<GroupLayout>,
    ) -> FloatTensor<Self> {
        node!(
            CombineRows,
            [rows.node(), weights.node()],
            |prep| (prep.checkpoint(&rows), prep.checkpoint(&weights), layout.clone()),
            B::combine_rows_forward(rows.into_primitive(), weights.into_primitive(), &layout)
        )
    }

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        node!(
            Swiglu,
            [gate.node(), up.node()],
            |prep| (prep.checkpoint(&gate), prep.checkpoint(&up)),
            B::swiglu_forward(gate.into_primitive(), up.into_primitive())
        )
    }

    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        node!(
            RmsNorm,
            [x.node(), gain.node()],
            |prep| (prep.checkpoint(&x), prep.checkpoint(&gain), epsilon),
            B::rms_norm_forward(x.into_primitive(), gain.into_primitive(), epsilon)
        )
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RotationSpec,
    ) -> FloatTensor<Self> {
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        node!(
            Rotate,
            [x.node()],
            |prep| (cos.clone(), sin.clone(), spec.clone()),
            B::rotate_forward(x.into_primitive(), cos, sin, &spec)
        )
    }

    fn latent_attention(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        let (query_node, key_node, shared_node) = (query.node(), key_value.node(), shared_key.node());
        let (query, key_value, shared_key) =
            (query.into_primitive(), key_value.into_primitive(), Some(shared_key.into_primitive()));
        let (output, log_sum) = B::attention_forward(query.clone(), key_value.clone(), shared_key.clone(), &spec);
        // Computed before the node is made, because its state holds `output` and `log_sum`. These are results, not parents that
        // `prep.checkpoint` could save.
        node!(
            Attention,
            [query_node, key_node, shared_node],
            |prep| (AttentionSaved { query, key_value, shared_key, output: output.clone(), log_sum }, spec),
            output
        )
    }

    fn grouped_attention(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        let (query_node, key_node) = (query.node(), key_value.node());
        let (query, key_value) = (query.into_primitive(), key_value.into_primitive());
        let (output, log_sum) = B::attention_forward(query.clone(), key_value.clone(), None, &spec);
        node!(
            Attention,
            [query_node, key_node],
            |prep| (AttentionSaved { query, key_value, shared_key: None, output: output.clone(), log_sum }, spec),
            output
        )
    }

    // Choices have no gradient.
    fn choose_experts(
        scores: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        has_bias: bool,
        rule: RoutingRule,
    ) -> IntTensor<Self> {
        let bias = has_bias.then(|| bias.into_primitive());
        B::choose_experts_forward(scores.into_primitive(), bias, &rule)
    }

    fn count_choices(
        choices: IntTensor<Self>,
        counted: IntTensor<Self>,
        has_counted: bool,
        groups: usize,
        sections: usize,
    ) -> IntTensor<Self> {
        B::count_choices_forward(choices, has_counted.then_some(counted), groups, sections)
    }

    fn sort_choices(choices: IntTensor<Self>, counts: IntTensor<Self>) -> IntTensor<Self> {
        B::sort_choices_forward(choices, counts)
    }

    // Decoding has no gradient: the result enters the graph as a constant.
    fn cached_attention(
        query: FloatTensor<Self>,
        cache: FloatTensor<Self>,
        spec: CachedAttentionSpec,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::cached_attention_forward(query.into_primitive(), cache.into_primitive(), &spec))
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        node!(
            CrossEntropy,
            [logits.node()],
            |prep| (prep.checkpoint(&logits), targets.clone()),
            B::cross_entropy_forward(logits.into_primitive(), targets)
        )
    }
}

const SAVED: &str = "an operand is saved if the other one is tracked";

#[derive(Debug)]
struct Project;

impl<B: Kernels> Backward<B, 2> for Project {
    type State = (Option<NodeId>, Option<NodeId>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (rows, weight) = ops.state;
        let rows: Option<FloatTensor<B>> = rows.map(|rows| checkpointer.retrieve_node_output(rows));
        let weight: Option<FloatTensor<B>> = weight.map(|weight| checkpointer.retrieve_node_output(weight));
        binary::<B, _, _>(
            ops.parents,
            ops.node,
            grads,
            |grad| B::project_rows_grad(grad, weight.expect(SAVED)),
            |grad| B::project_weight_grad(rows.expect(SAVED), grad),
        );
    }
}

#[derive(Debug)]
struct GroupedMatmul;

impl<B: Kernels> Backward<B, 2> for GroupedMatmul {
    type State = (Option<NodeId>, Option<NodeId>, Arc<GroupLayout>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (rows, weight, layout) = ops.state;
        let rows: Option<FloatTensor<B>> = rows.map(|rows| checkpointer.retrieve_node_output(rows));
        let weight: Option<FloatTensor<B>> = weight.map(|weight| checkpointer.retrieve_node_output(weight));
        binary::<B, _, _>(
            ops.parents,
            ops.node,
            grads,
            |grad| B::grouped_matmul_rows_grad(grad, weight.expect(SAVED), &layout),
            |grad| B::grouped_matmul_weight_grad(rows.expect(SAVED), grad, &layout),
        );
    }
}

#[derive(Debug)]
struct DispatchRows;

impl<B: Kernels> Backward<B, 1> for DispatchRows {
    type State = Arc<GroupLayout>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let layout = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |grad| B::dispatch_rows_grad(grad, &layout));
    }
}

#[derive(Debug)]
struct CombineRows;

impl<B: Kernels> Backward<B, 2> for CombineRows {
    type State = (NodeId, NodeId, Arc<GroupLayout>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (rows, weights, layout) = ops.state;
        let rows: FloatTensor<B> = checkpointer.retrieve_node_output(rows);
        let weights: FloatTensor<B> = checkpointer.retrieve_node_output(weights);
        let grad = grads.consume::<B>(&ops.node);
        let (grad_rows, grad_weights) = B::combine_rows_grad(rows, weights, grad, &layout);
        register::<B, 2>(
            grads,
            ops.parents.map(|parent| parent.map(|node| node.id)),
            [Some(grad_rows), Some(grad_weights)],
        );
    }
}

#[derive(Debug)]
struct Swiglu;

impl<B: Kernels> Backward<B, 2> for Swiglu {
    type State = (NodeId, NodeId);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (gate, up) = ops.state;
        let gate: FloatTensor<B> = checkpointer.retrieve_node_output(gate);
        let up: FloatTensor<B> = checkpointer.retrieve_node_output(up);
        let grad = grads.consume::<B>(&ops.node);
        let (grad_gate, grad_up) = B::swiglu_grad(gate, up, grad);
        register::<B, 2>(grads, ops.parents.map(|parent| parent.map(|node| node.id)), [Some(grad_gate), Some(grad_up)]);
    }
}

#[derive(Debug)]
struct RmsNorm;

impl<B: Kernels> Backward<B, 2> for RmsNorm {
    type State = (NodeId, NodeId, f32);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (x, gain, epsilon) = ops.state;
        let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
        let gain: FloatTensor<B> = checkpointer.retrieve_node_output(gain);
        let grad = grads.consume::<B>(&ops.node);
        let (grad_x, grad_gain) = B::rms_norm_grad(x, gain, grad, epsilon);
        register::<B, 2>(grads, ops.parents.map(|parent| parent.map(|node| node.id)), [Some(grad_x), Some(grad_gain)]);
    }
}

#[derive(Debug)]
struct QuantizedMatmul;

impl<B: Kernels> Backward<B, 1> for QuantizedMatmul {
    type State = (IntTensor<B>, FloatTensor<B>, QuantizedShape, Arc<GroupLayout>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let (values, scales, spec, layout) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |grad| {
            B::quantized_matmul_rows_grad(grad, values, scales, spec, &layout)
        });
    }
}

#[derive(Debug)]
struct Rotate;

impl<B: Kernels> Backward<B, 1> for Rotate {
    type State = (FloatTensor<B>, FloatTensor<B>, RotationSpec);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let (cos, sin, spec) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |grad| B::rotate_forward(grad, cos, B::float_neg(sin), &spec));
    }
}

#[derive(Debug)]
struct Attention;

impl<B: Kernels> Backward<B, 3> for Attention {
    type State = (AttentionSaved<B>, AttentionSpec);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let (saved, spec) = ops.state;
        let grad = grads.consume::<B>(&ops.node);
        let (query, key_value, shared) = B::attention_grad(saved, grad, &spec);
        register::<B, 3>(
            grads,
            ops.parents.map(|parent| parent.map(|node| node.id)),
            [Some(query), Some(key_value), shared],
        );
    }
}

impl<B: Kernels> Backward<B, 2> for Attention {
    type State = (AttentionSaved<B>, AttentionSpec);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let (saved, spec) = ops.state;
        let grad = grads.consume::<B>(&ops.node);
        let (query, key_value, _) = B::attention_grad(saved, grad, &spec);
        register::<B, 2>(grads, ops.parents.map(|parent| parent.map(|node| node.id)), [Some(query), Some(key_value)]);
    }
}

#[derive(Debug)]
struct CrossEntropy;

impl<B: Kernels> Backward<B, 1> for CrossEntropy {
    type State = (NodeId, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (logits, targets) = ops.state;
        let logits: FloatTensor<B> = checkpointer.retrieve_node_output(logits);
        unary::<B, _>(ops.parents, ops.node, grads, |grad| B::cross_entropy_grad(logits, targets, grad));
    }
}

/// Adds each value to the gradient of its parent, if the parent is in the graph.
fn register<B: Backend, const N: usize>(
    grads: &mut Gradients,
    parents: [Option<NodeId>; N],
    values: [Option<FloatTensor<B>>; N],
) {
    for (parent, value) in parents.into_iter().zip(values) {
        if let (Some(parent), Some(value)) = (parent, value) {
            grads.register::<B>(parent, value);
        }
    }
}
