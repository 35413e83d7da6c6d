use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};

use super::*;

#[derive(Module, Debug)]
struct Layer {
    up: Linear,
    experts: Param<Tensor<3>>,
    norm: RmsNorm,
    bias: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Model {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    lm_head: Option<Linear>,
}

fn model(head: bool) -> Model {
    let device = &Device::default().autodiff();
    let layer = || Layer {
        up: LinearConfig::new(4, 6).init(device),
        experts: Initializer::Ones.init([3, 4, 5], device),
        norm: RmsNormConfig::new(4).init(device),
        bias: Initializer::Zeros.init([3], device).set_require_grad(false),
    };
    Model {
        embed_tokens: EmbeddingConfig::new(10, 4).init(device),
        layers: vec![layer(), layer()],
        lm_head: head.then(|| LinearConfig::new(4, 10).with_bias(false).init(device)),
    }
}

fn moonlight() -> ParameterRules {
    ParameterRules::moonlight(MuonConfig::new(), AdamWConfig::new())
}

#[test]
fn the_table_has_the_group_of_each_parameter_and_the_reason() {
    let assignment = moonlight().assign(&model(true)).unwrap();
    let expected = "\
parameter            shape      optimizer  why
embed_tokens.weight  [10, 4]    adamw      embedding
layers.0.up.weight   [4, 6]     muon       matrix
layers.0.up.bias     [6]        adamw      not a matrix
layers.0.experts     [3, 4, 5]  muon       stack of matrices
layers.0.norm.gamma  [4]        adamw      not a matrix
layers.0.bias        [3]        buffer     no gradient
layers.1.up.weight   [4, 6]     muon       matrix
layers.1.up.bias     [6]        adamw      not a matrix
layers.1.experts     [3, 4, 5]  muon       stack of matrices
layers.1.norm.gamma  [4]        adamw      not a matrix
layers.1.bias        [3]        buffer     no gradient
lm_head.weight       [4, 10]    adamw      output head

muon: 4 tensors, 168 elements
adamw: 6 tensors, 100 elements
buffer: 2 tensors, 6 elements";
    assert_eq!(assignment.to_string(), expected);
}

#[test]
fn the_short_table_has_one_row_for_all_layers() {
    let assignment = moonlight().assign(&model(true)).unwrap();
    let expected = "\
parameter                shape      optimizer  why
embed_tokens.weight      [10, 4]    adamw      embedding
layers.{0-1}.up.weight   [4, 6]     muon       matrix
layers.{0-1}.up.bias     [6]        adamw      not a matrix
layers.{0-1}.experts     [3, 4, 5]  muon       stack of matrices
layers.{0-1}.norm.gamma  [4]        adamw      not a matrix
layers.{0-1}.bias        [3]        buffer     no gradient
lm_head.weight           [4, 10]    adamw      output head
";
    assert!(format!("{assignment:#}").starts_with(expected), "{assignment:#}");
}

#[test]
fn a_tied_head_may_be_absent_but_not_the_embedding() {
    assert!(moonlight().assign(&model(false)).is_ok());
    let linear: Linear = LinearConfig::new(4, 6).init(&Device::default().autodiff());
    let error = moonlight().assign(&linear).unwrap_err();
    assert_eq!(error.to_string(), "the rule for path `**.embed_tokens.**` matches no parameter");
    assert!(error.hint().is_some());
}

#[test]
fn a_module_without_autodiff_is_assigned_as_it_would_be_for_training() {
    let trained = moonlight().assign(&model(true)).unwrap();
    let plain = moonlight().assign(&model(true).valid()).unwrap();
    assert_eq!(plain.to_string(), trained.to_string());
}

#[test]
fn embeddings_are_found_by_their_type() {
    let rules = ParameterRules::muon_except(["lm_head.*"], MuonConfig::new(), AdamWConfig::new());
    let assignment = rules.assign(&model(true)).unwrap();
    let adamw: Vec<_> = assignment.parameters_of("adamw").map(|row| row.path.as_str()).collect();
    assert_eq!(adamw[0], "embed_tokens.weight");
    assert_eq!(adamw.last(), Some(&"lm_head.weight"));
    let error = rules.assign(&model(false)).unwrap_err();
    assert_eq!(error, RuleError::MatchesNothing { rule: "path `lm_head.*`".to_string() });
}

#[test]
fn every_mistake_in_the_rules_is_an_error_that_names_it() {
    let base = || ParameterRules::new().group("muon", MuonConfig::new()).group("adamw", AdamWConfig::new());
    let message = |rules: ParameterRules| rules.assign(&model(true)).unwrap_err().to_string();

    let rules = base().rule(Rule::to("muon").rank(3..=3)).rule(Rule::to("adamw").rank(..2));
    assert_eq!(
        message(rules),
        "no rule matches `embed_tokens.weight` [10, 4], `layers.0.up.weight` [4, 6], `layers.1.up.weight` [4, 6], \
         `lm_head.weight` [4, 10]"
    );
    let rules = base().rule(Rule::to("adamw")).rule(Rule::to("muon").path("layers.*.experts"));
    assert_eq!(
        message(rules),
        "the rule for path `layers.*.experts` has no effect: earlier rules match all 2 of its parameters"
    );
    let rules = base().rule(Rule::to("muon").path("layers.**")).rule(Rule::to("adamw"));
    assert_eq!(
        message(rules),
        "the rule for path `layers.**` assigns to Muon what is not a matrix or a stack of matrices: \
         `layers.0.up.bias` [6], `layers.0.norm.gamma` [4], `layers.1.up.bias` [6], `layers.1.norm.gamma` [4]"
    );
    let rules = base().rule(Rule::to("moun").rank(2..=3)).rule(Rule::to("adamw"));
    assert_eq!(message(rules), "the rule for rank 2 to 3 names the parameter group `moun`, which does not exist");
    let rules = base().rule(Rule::to("adamw").path("layers.**x"));
    assert!(message(rules).starts_with("the pattern `layers.**x` of a parameter rule is malformed"));
    let rules = base().group("muon", MuonConfig::new()).rule(Rule::to("adamw"));
    assert_eq!(message(rules), "the parameter group name `muon` is already in use");
    let rules = ParameterRules::new().group("buffer", AdamWConfig::new()).rule(Rule::to("buffer"));
    assert_eq!(message(rules), "the parameter group name `buffer` is already in use");
    let rules = base().rule(Rule::to("adamw").rank(..0)).rule(Rule::to("muon"));
    assert!(message(rules).ends_with("matches no parameter"));
}

#[test]
fn a_shared_tensor_is_assigned_once() {
    let device = &Device::default().autodiff();
    let first: Linear = LinearConfig::new(4, 6).with_bias(false).init(device);
    let pair = vec![first.clone(), first];
    let rules = ParameterRules::muon_except(Vec::<String>::new(), MuonConfig::new(), AdamWConfig::new());
    let assignment = rules.assign(&pair).unwrap();
    assert_eq!(assignment.parameters_of("muon").count(), 1);
    assert_eq!(assignment.rows()[1].shared_with.as_deref(), Some("0.weight"));
    assert!(assignment.to_string().contains("same tensor as `0.weight`"));
}

#[test]
fn matrices_do_not_reach_another_optimizer_unnoticed() {
    let base = || {
        ParameterRules::new()
            .group("muon", MuonConfig::new())
            .group("adamw", AdamWConfig::new())
            .rule(Rule::to("muon").path("layers.*.experts"))
            .rule(Rule::to("muon").path("layers.*.up.weight"))
    };
    let error = base().rule(Rule::to("adamw")).assign(&model(true)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the rule for every parameter assigns matrices to `adamw` instead of Muon: `embed_tokens.weight` [10, 4], \
         `lm_head.weight` [4, 10]"
    );
    assert!(error.hint().unwrap().contains(".matrices_too()"));
    assert!(base().rule(Rule::to("adamw").matrices_too()).assign(&model(true)).is_ok());
    // Nor does a parameter with a number of dimensions that no rule accepts, such as a convolution kernel.
    #[derive(Module, Debug)]
    struct Kernel {
        weight: Param<Tensor<4>>,
    }
    let kernel = Kernel { weight: Initializer::Ones.init([2, 3, 4, 4], &Device::default().autodiff()) };
    let rules = ParameterRules::muon_except(Vec::<String>::new(), MuonConfig::new(), AdamWConfig::new());
    assert_eq!(rules.assign(&kernel).unwrap_err().to_string(), "no rule matches `weight` [2, 3, 4, 4]");
    let kernels = MuonConfig::new().with_view(crate::MatrixView::Kernel);
    let rules = ParameterRules::new().group("kernels", kernels).rule(Rule::to("kernels").rank(4..=4));
    assert!(rules.assign(&kernel).is_ok());
}

#[test]
fn blocks_of_a_rule_are_checked_and_printed() {
    let rules = |blocks: Blocks| {
        ParameterRules::new()
            .group("muon", MuonConfig::new())
            .group("adamw", AdamWConfig::new())
            .rule(Rule::to("adamw").path("embed_tokens.*"))
            .rule(Rule::to("muon").path("layers.*.up.weight").blocks(blocks).because("two heads"))
            .rule(Rule::to("muon").rank(2..=3))
            .rule(Rule::to("adamw").rank(..=1))
    };
    let assignment = rules(Blocks::Columns(vec![3])).assign(&model(true)).unwrap();
    assert!(
        format!("{assignment:#}").contains("[4, 6]     muon       two heads, blocks of 3 columns\n"),
        "{assignment:#}"
    );
    let error = rules(Blocks::Columns(vec![4])).assign(&model(true)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the rule for path `layers.*.up.weight` splits `layers.0.up.weight` [4, 6] into blocks of 4 columns, which do \
         not fill it"
    );
    let other = ParameterRules::new()
        .group("adamw", AdamWConfig::new())
        .rule(Rule::to("adamw").path("lm_head.*").blocks(Blocks::Rows(vec![2])))
        .rule(Rule::to("adamw"));
    assert!(other.assign(&model(true)).unwrap_err().to_string().ends_with("blocks of 2 rows, which only Muon can do"));
}

#[test]
fn the_table_serializes() {
    let assignment = ParameterRules::keller_jordan(["lm_head.*"]).assign(&model(true)).unwrap();
    let table = serde_json::to_value(assignment).unwrap();
    assert_eq!(
        table["parameters"][1],
        serde_json::json!({
            "path": "layers.0.up.weight",
            "shape": [4, 6],
            "group": "muon",
            "reason": "matrix",
            "shared_with": null,
            "blocks": "whole"
        })
    );
    let groups = table["groups"].as_array().unwrap();
    assert_eq!(groups[0]["name"], "muon");
    assert_eq!(groups[0]["optimizer"]["muon"]["scale"], "keller_jordan");
    assert_eq!((&groups[0]["tensors"], &groups[0]["elements"]), (&4.into(), &168.into()));
    assert_eq!(groups[1]["learning_rate_factor"], 0.015);
}

#[test]
fn a_group_applies_its_factor_to_the_learning_rate() {
    use burn::optim::GradientsParams;
    let device = &Device::default().autodiff();
    let layer: Linear = LinearConfig::new(4, 6).init(device);
    let step = |factor: f64, lr: f64| {
        let muon = MuonConfig::new().with_weight_decay(0.5);
        let rules = ParameterRules::new()
            .group("muon", GroupOptimizer::from(muon).with_learning_rate_factor(factor))
            .group("adamw", AdamWConfig::new())
            .rule(Rule::to("muon").rank(2..=2))
            .rule(Rule::to("adamw").rank(1..=1));
        let mut optimizer = rules.assign(&layer).unwrap().to_module_optimizer();
        let loss = layer.forward(Tensor::<2>::ones([2, 4], device)).powi_scalar(3).sum();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        let after = optimizer.step(lr, layer.clone(), grads);
        let floats = |data: burn::tensor::TensorData| data.iter::<f32>().collect::<Vec<_>>();
        (floats(after.weight.val().into_data()), floats(after.bias.unwrap().val().into_data()))
    };
    assert_eq!(step(0.25, 0.1).0, step(1.0, 0.025).0);
    assert_eq!(step(0.25, 0.1).1, step(1.0, 0.1).1);
}

#[test]
fn embedding_and_head_may_have_a_rate_of_their_own() {
    for (rules, matrices) in [(moonlight(), "muon"), (ParameterRules::adamw(AdamWConfig::new()), "adamw")] {
        for head in [true, false] {
            let assignment = rules.clone().with_embedding_rate(AdamWConfig::new(), 4.0).assign(&model(head)).unwrap();
            for row in assignment.rows().iter().filter(|row| row.group != BUFFER) {
                let expected = match row.path.as_str() {
                    "embed_tokens.weight" | "lm_head.weight" => "embedding",
                    path if path.ends_with("gamma") || path.ends_with("bias") => "adamw",
                    _ => matrices,
                };
                assert_eq!(row.group, expected, "{}", row.path);
            }
        }
    }
}

#[test]
fn a_scale_without_its_hidden_size_is_refused() {
    let muon = |scale: UpdateScale| ParameterRules::moonlight(MuonConfig::new().with_scale(scale), AdamWConfig::new());
    let unset = UpdateScale::HiddenSize { factor: 0.2, hidden: 0 };
    let error = muon(unset).assign(&model(true)).unwrap_err();
    assert_eq!(error, RuleError::NoHiddenSize { group: "muon".into() });
    assert!(muon(unset.with_hidden_size(64)).assign(&model(true)).is_ok());
    // A hidden size that is set is kept.
    let set = UpdateScale::HiddenSize { factor: 0.2, hidden: 16 };
    assert_eq!((set.with_hidden_size(64), UpdateScale::Unit.with_hidden_size(64)), (set, UpdateScale::Unit));
}
