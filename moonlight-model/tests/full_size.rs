//! Moonlight-16B in full size: one block runs, and the parameters of the whole model are counted.

use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::{LmBatch, ModelConfig, Probe};

#[test]
fn moonlight_has_the_published_number_of_parameters() {
    let count = ModelConfig::preset("moonlight-16b-a3b").unwrap().parameter_count();
    assert_eq!(count.total, 15_960_110_208);
    assert_eq!(count.embeddings, 2 * 335_544_320);
    // The report's table: 15.29B and 2.24B, without embeddings.
    assert_eq!(count.total - count.embeddings, 15_289_021_568);
    assert_eq!((count.activated - count.embeddings) / 10_000_000, 224);
}

#[test]
fn one_full_size_block_runs_forward_and_backward() {
    let mut config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
    // A small vocabulary around one block of 2048 dimensions and 64 experts.
    config.vocab_size = 64;
    config.num_hidden_layers = 1;
    config.moe.as_mut().unwrap().first_k_dense_replace = 0;
    let block: u64 = config
        .parameter_shapes()
        .iter()
        .filter(|parameter| parameter.path.starts_with("layers.0."))
        .map(|parameter| parameter.count())
        .sum();
    let dense_first_layer = 82_973_184;
    let whole = 26 * block + dense_first_layer + 2 * 335_544_320 + 2048;
    assert_eq!(whole, 15_960_110_208, "a block has {block} parameters");

    let device = Device::default().autodiff();
    let model = config.init(&device);
    let sequence = 48;
    let tokens: Vec<i32> = (0..sequence).map(|index| index * 31 % 64).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [1, sequence]), &device);
    let batch = LmBatch {
        targets: tokens.clone().flip([1]),
        tokens,
        loss_mask: Tensor::ones([1, sequence], &device),
        segments: None,
    };
    let output = model.loss(&batch, 0.001, Probe::default());
    let loss = output.loss_sum.clone().into_scalar::<f32>() / sequence as f32;
    // With initial weights the loss is about that of a uniform guess, ln 64 = 4.16.
    assert!((3.5..6.0).contains(&loss), "{loss}");
    let load = output.stats.expert_loads()[0].clone().expect("the block has experts");
    assert_eq!(load.iter().sum::<u64>(), 6 * sequence as u64);
    let gradients = (output.loss_sum + output.balance_loss.expect("the weight is not zero")).backward();
    let gradient = model.embed_tokens.weight.val().grad(&gradients).expect("the embedding is trained");
    let largest = gradient.abs().max().into_scalar::<f32>();
    assert!(largest.is_finite() && largest > 0.0, "{largest}");
}
