//! The list of all parameters of a model, read from the module itself: it is built lazily, without drawing a parameter, and
//! visited.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};

use crate::config::ModelConfig;
use crate::init::{Init, ParameterKinds};
use crate::layer::DecoderLayerConfig;
use crate::parameter::{ParameterCount, ParameterKind, ParameterShape};

/// The field of [`CausalLm`](crate::CausalLm) with the decoder layers.
const LAYERS: &str = "layers";

impl ModelConfig {
    /// All parameters of the model, in the order of the module's fields. No weight is allocated.
    ///
    /// There is no other list of parameters: loading, saving, memory plans, freezing and LoRA targets read this one.
    ///
    /// ```
    /// let config = moonlight_model::ModelConfig::preset("moonlight-16b-a3b")?;
    /// let first = &config.parameter_shapes()[0];
    /// assert_eq!((first.path.as_str(), &first.shape[..]), ("embed_tokens.weight", &[163_840, 2048][..]));
    /// # Ok::<(), moonlight_model::ConfigError>(())
    /// ```
    pub fn parameter_shapes(&self) -> Vec<ParameterShape> {
        // The model is built without layers, and their parameters are added where the visitor enters the field. Layers with equal
        // configs are visited once, so a deep model takes little longer than a shallow one.
        let outer = Self { num_hidden_layers: 0, ..self.clone() };
        list_parameters(|init| outer.build(init), |shapes| self.push_layers(shapes))
    }

    fn push_layers(&self, shapes: &mut Vec<ParameterShape>) {
        let mut known: Vec<(DecoderLayerConfig, Vec<ParameterShape>)> = Vec::new();
        for layer in 0..self.num_hidden_layers {
            let config = self.layer(layer);
            let index = known.iter().position(|(other, _)| *other == config).unwrap_or_else(|| {
                let list = list_parameters(|init| config.build(init), |_| {});
                shapes.reserve_exact((self.num_hidden_layers - layer) * list.len());
                known.push((config, list));
                known.len() - 1
            });
            shapes.extend(known[index].1.iter().map(|parameter| ParameterShape {
                path: format!("{LAYERS}.{layer}.{}", parameter.path),
                shape: parameter.shape.clone(),
                kind: parameter.kind,
                role: parameter.role,
                layer: Some(layer),
            }));
        }
    }

    /// Counts the parameters from their shapes.
    pub fn parameter_count(&self) -> ParameterCount {
        let mut count = ParameterCount { total: 0, activated: 0, embeddings: 0 };
        for parameter in self.parameter_shapes() {
            let values = parameter.count();
            count.total = count.total.saturating_add(values);
            let activated = match (parameter.kind, &self.moe) {
                (ParameterKind::Experts, Some(moe)) => {
                    values / moe.n_routed_experts as u64 * moe.num_experts_per_tok as u64
                }
                _ => values,
            };
            count.activated = count.activated.saturating_add(activated);
            if matches!(parameter.kind, ParameterKind::Embedding | ParameterKind::Head) {
                count.embeddings = count.embeddings.saturating_add(values);
            }
        }
        count
    }
}

/// The parameters of a module with their paths in it; `at_layers` is called when the visitor enters the decoder layers.
fn list_parameters<M: Module>(
    build: impl FnOnce(Init<'_>) -> M,
    at_layers: impl FnMut(&mut Vec<ParameterShape>),
) -> Vec<ParameterShape> {
    let (device, kinds) = (Device::default(), ParameterKinds::default());
    let module = build(Init::recording(&device, &kinds));
    let mut visitor = ParameterLister { kinds: &kinds, path: Vec::new(), shapes: Vec::new(), at_layers };
    module.visit(&mut visitor);
    visitor.shapes
}

struct ParameterLister<'a, F> {
    kinds: &'a ParameterKinds,
    path: Vec<String>,
    shapes: Vec<ParameterShape>,
    at_layers: F,
}

impl<F: FnMut(&mut Vec<ParameterShape>)> ModuleVisitor for ParameterLister<'_, F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        if self.path.is_empty() && name == LAYERS {
            (self.at_layers)(&mut self.shapes);
        }
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let kinds = self.kinds.borrow();
        let &(kind, role) = kinds.get(&param.id).unwrap_or_else(|| panic!("`{path}` is made by `Init`"));
        let shape = param.lazy_shape().as_slice().to_vec();
        self.shapes.push(ParameterShape { path, shape, kind, role, layer: None });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PRESETS;
    use crate::parameter::{AttentionRole, MlpRole, ProjectionRole};

    /// The counts of the published checkpoint and of the Muon report's table of model sizes.
    #[test]
    fn moonlight_has_the_published_number_of_parameters() {
        let count = ModelConfig::preset("moonlight-16b-a3b").unwrap().parameter_count();
        assert_eq!(count.total, 15_960_110_208);
        assert_eq!(count.embeddings, 2 * 335_544_320);
        // "15.29B total, 2.24B activated, excluding embeddings".
        assert_eq!(count.total - count.embeddings, 15_289_021_568);
        assert_eq!((count.activated - count.embeddings) / 10_000_000, 224);
    }

    #[test]
    fn paths_are_unique() {
        for preset in PRESETS {
            let shapes = ModelConfig::preset(preset).unwrap().parameter_shapes();
            let mut paths: Vec<_> = shapes.iter().map(|shape| &shape.path).collect();
            paths.sort();
            paths.dedup();
            assert_eq!(paths.len(), shapes.len(), "{preset}");
        }
    }

    /// Every kind of parameter of DeepSeek-V3, against the shapes of the published checkpoint.
    #[test]
    fn kinds_roles_and_shapes_are_those_of_deepseek_v3() {
        let shapes = ModelConfig::preset("deepseek-v3").unwrap().parameter_shapes();
        let attention = |role| Some(ProjectionRole::Attention(role));
        let find = |path: &str| {
            let found = shapes.iter().find(|parameter| parameter.path == path);
            let found = found.unwrap_or_else(|| panic!("no parameter `{path}`"));
            (found.shape.as_slice(), found.kind, found.role, found.layer)
        };
        use AttentionRole::{KeyValueDown, KeyValueUp, Output, QueryDown, QueryUp};
        use ParameterKind::{CorrectionBias, Embedding, Experts, Head, Matrix, Norm, Router};
        let layer = Some(3);
        for (path, expected) in [
            ("embed_tokens.weight", (&[129_280, 7168][..], Embedding, None, None)),
            ("layers.3.input_layernorm.weight", (&[7168], Norm, None, layer)),
            ("layers.3.self_attn.q_a_proj.weight", (&[7168, 1536], Matrix, attention(QueryDown), layer)),
            ("layers.3.self_attn.q_a_layernorm.weight", (&[1536], Norm, None, layer)),
            ("layers.3.self_attn.q_b_proj.weight", (&[1536, 24_576], Matrix, attention(QueryUp), layer)),
            ("layers.3.self_attn.kv_a_proj_with_mqa.weight", (&[7168, 576], Matrix, attention(KeyValueDown), layer)),
            ("layers.3.self_attn.kv_b_proj.weight", (&[512, 32_768], Matrix, attention(KeyValueUp), layer)),
            ("layers.3.self_attn.o_proj.weight", (&[16_384, 7168], Matrix, attention(Output), layer)),
            ("layers.3.mlp.router.weight", (&[7168, 256], Router, Some(ProjectionRole::Router), layer)),
            ("layers.3.mlp.router.e_score_correction_bias", (&[256], CorrectionBias, None, layer)),
            (
                "layers.3.mlp.experts.down_proj",
                (&[256, 2048, 7168], Experts, Some(ProjectionRole::Experts(MlpRole::Down)), layer),
            ),
            (
                "layers.3.mlp.shared_experts.up_proj.weight",
                (&[7168, 2048], Matrix, Some(ProjectionRole::SharedExperts(MlpRole::Up)), layer),
            ),
            (
                "layers.2.mlp.gate_proj.weight",
                (&[7168, 18_432], Matrix, Some(ProjectionRole::Mlp(MlpRole::Gate)), Some(2)),
            ),
            ("norm.weight", (&[7168], Norm, None, None)),
            ("lm_head.weight", (&[7168, 129_280], Head, None, None)),
        ] {
            assert_eq!(find(path), expected, "{path}");
        }
        let first = &shapes[1];
        assert_eq!(
            (first.path.as_str(), first.path_in_layer()),
            ("layers.0.input_layernorm.weight", "input_layernorm.weight")
        );
    }

    #[test]
    fn the_list_has_the_paths_shapes_and_order_that_a_visitor_sees() {
        struct Visited {
            path: Vec<String>,
            found: Vec<(String, Vec<usize>)>,
        }
        impl ModuleVisitor for Visited {
            fn enter_module(&mut self, name: &str, _container_type: &str) {
                self.path.push(name.to_owned());
            }

            fn exit_module(&mut self, _name: &str, _container_type: &str) {
                self.path.pop();
            }

            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.found.push((self.path.join("."), param.lazy_shape().as_slice().to_vec()));
            }
        }
        for preset in PRESETS {
            let mut config = ModelConfig::preset(preset).unwrap();
            for freq in [1, 3] {
                // With 3, dense layers alternate with layers of experts.
                if let Some(moe) = &mut config.moe {
                    moe.moe_layer_freq = freq;
                }
                let mut visited = Visited { path: Vec::new(), found: Vec::new() };
                config.init(&Device::default()).visit(&mut visited);
                let listed: Vec<_> =
                    config.parameter_shapes().into_iter().map(|parameter| (parameter.path, parameter.shape)).collect();
                assert_eq!(listed, visited.found, "{preset}");
            }
        }
    }

    /// Drawing 16B parameters would take minutes; listing them takes milliseconds, or on a busy machine a second.
    #[test]
    fn the_list_is_cheap() {
        let start = std::time::Instant::now();
        assert_eq!(ModelConfig::preset("moonlight-16b-a3b").unwrap().parameter_shapes().len(), 403);
        assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
