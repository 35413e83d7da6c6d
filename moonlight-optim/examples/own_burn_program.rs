//! Muon in your own Burn program: `cargo run -p moonlight-optim --example own_burn_program`.
//!
//! A small classifier of token pairs that used Burn's AdamW before. A comment at each changed line has the line that it replaces.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
// Was: use burn::optim::AdamWConfig;
use moonlight_optim::{AdamWConfig, Assignment, MuonAdamW, MuonConfig, OptimizerOptions, ParameterRules};

/// The learning rate that was used with AdamW.
const RATE: f64 = 1e-2;
const VOCAB: usize = 32;
const WIDTH: usize = 64;

#[derive(Module, Debug)]
struct Classifier {
    tokens: Embedding,
    norm: RmsNorm,
    up: Linear,
    down: Linear,
    output: Linear,
}

impl Classifier {
    fn new(device: &Device) -> Self {
        Self {
            tokens: EmbeddingConfig::new(VOCAB, WIDTH).init(device),
            norm: RmsNormConfig::new(2 * WIDTH).init(device),
            up: LinearConfig::new(2 * WIDTH, 4 * WIDTH).init(device),
            down: LinearConfig::new(4 * WIDTH, WIDTH).init(device),
            output: LinearConfig::new(WIDTH, VOCAB).init(device),
        }
    }

    /// `[batch, 2]` tokens to `[batch, vocab]` logits.
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [batch, _] = tokens.dims();
        let pair = self.tokens.forward(tokens).reshape([batch, 2 * WIDTH]);
        let hidden = self.up.forward(self.norm.forward(pair)).tanh();
        self.output.forward(self.down.forward(hidden))
    }
}

/// All pairs of tokens, and the class of each: the larger one.
fn data(device: &Device) -> (Tensor<2, Int>, Tensor<1, Int>) {
    let pairs = (0..VOCAB).flat_map(|one| (0..VOCAB).map(move |other| (one, other)));
    let (tokens, classes): (Vec<_>, Vec<_>) =
        pairs.map(|(one, other)| ([one as i32, other as i32], one.max(other) as i32)).unzip();
    let tokens = TensorData::new(tokens.concat(), [VOCAB * VOCAB, 2]);
    (Tensor::from_data(tokens, device), Tensor::from_data(TensorData::new(classes, [VOCAB * VOCAB]), device))
}

/// Trains for some steps. Returns the model, and the loss before and after.
fn train(
    mut model: Classifier,
    optimizer: &mut MuonAdamW,
    steps: usize,
    device: &Device,
) -> Result<(Classifier, f32, f32), Box<dyn std::error::Error>> {
    let (tokens, classes) = data(device);
    let loss = CrossEntropyLossConfig::new().init(device);
    let loss = |model: &Classifier| loss.forward(model.forward(tokens.clone()), classes.clone());
    let before = loss(&model).into_scalar::<f32>();
    for _ in 0..steps {
        let gradients = GradientsParams::from_grads(loss(&model).backward(), &model);
        // Was: model = optimizer.step(RATE, model, gradients);
        model = optimizer.step(RATE, model, gradients)?;
    }
    let after = loss(&model).into_scalar::<f32>();
    Ok((model, before, after))
}

/// Muon for the hidden matrices; AdamW for the embedding (found by its type), the output head (named), norms and biases.
fn assign(model: &Classifier) -> Result<Assignment, Box<dyn std::error::Error>> {
    // Options of Muon and AdamW are set here, such as `MuonConfig::new().with_scale(UpdateScale::Spectral)`.
    let rules = ParameterRules::muon_except(["output.*"], MuonConfig::new(), AdamWConfig::new());
    Ok(rules.assign(model)?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::default().autodiff();
    device.seed(1);
    let model = Classifier::new(&device);
    let assignment = assign(&model)?;
    println!("{assignment}\n");
    // Was: let mut optimizer = AdamWConfig::new().init();
    let mut optimizer = assignment.build(OptimizerOptions::new())?;

    let (model, before, after) = train(model, &mut optimizer, 40, &device)?;
    println!("loss {before:.3}, after 40 steps {after:.3}");
    assert!(after < 0.7 * before, "the loss falls");

    // Save and resume. State is matched by parameter path, since `ParamId`s differ in another process.
    let file = std::env::temp_dir().join(format!("own-burn-program-{}.bpk", std::process::id()));
    optimizer.save(&file)?;
    let mut resumed = assign(&model)?.load(&[&file], OptimizerOptions::new())?;
    std::fs::remove_file(&file)?;
    let (_, _, uninterrupted) = train(model.clone(), &mut optimizer, 10, &device)?;
    let (_, _, after_resume) = train(model, &mut resumed, 10, &device)?;
    println!("after 50 steps {uninterrupted:.3}, resumed after 40 {after_resume:.3}");
    assert_eq!(uninterrupted.to_bits(), after_resume.to_bits(), "a resumed run repeats the run bit for bit");
    Ok(())
}
