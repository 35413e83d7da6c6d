//! LoRA in thirty lines: adapters for a frozen model are trained, saved in peft's layout, and loaded again.
//!
//! `cargo run -p moonlight-train --example lora`
//!
//! `moonlight train` does the same from a recipe with a `[lora]` section.

use std::error::Error;
use std::path::Path;

use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Int, Tensor};
use moonlight_convert::adapter::{load_adapter, write_adapter};
use moonlight_convert::load;
use moonlight_model::lora::LoraConfig;
use moonlight_model::{CausalLm, LmBatch, Probe};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/moonlight-like");

fn main() -> Result<(), Box<dyn Error>> {
    // The base model, on an autodiff device.
    let device = Device::flex().autodiff();
    // In f32, because merging adapters into bf16 weights would round the sums.
    let base = load(Path::new(MODEL), &device, Some(DType::F32))?.model;

    // `with_lora` freezes the base. `B` is initialized with zeros, so the model is equivalent to the base at first.
    let config = LoraConfig { rank: 4, alpha: 8.0, targets: vec!["attention".into()], ..LoraConfig::default() };
    let mut model = base.clone().with_lora(&config, 0)?;
    let batch = batch(&device);
    assert_eq!(loss(&model, &batch), loss(&base, &batch));

    // Only the adapters have gradients, so the optimizer has no other parameters.
    let mut optimizer = AdamWConfig::new().init();
    for step in 1..=10 {
        let output = model.loss(&batch, 0.0, Probe::default());
        let gradients = GradientsParams::from_grads(output.loss_sum.backward(), &model);
        model = optimizer.step(0.01, model, gradients);
        println!("step {step}: loss {:.4}", loss(&model, &batch));
    }
    assert!(loss(&model, &batch) < 0.9 * loss(&base, &batch), "the adapters learn the batch");

    // `adapter_config.json` and `adapter_model.safetensors`, which peft opens as well.
    let directory = tempfile::tempdir()?;
    write_adapter(&model, directory.path(), Path::new(MODEL), None)?;
    let again = load_adapter(base.clone(), directory.path())?;
    assert_eq!(again.adapters(), model.adapters(), "what was saved is what is loaded");

    // After merging there is no adapter left, and nothing to add at inference.
    let merged = model.clone().merge();
    assert!(!merged.has_adapters());
    let (merged, adapted) = (loss(&merged, &batch), loss(&model, &batch));
    assert!((merged - adapted).abs() < 1e-5 * adapted, "{merged} and {adapted}");
    Ok(())
}

/// Two sequences of eight tokens, and the next token of each.
fn batch(device: &Device) -> LmBatch {
    let tokens = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]];
    let targets = [[1, 4, 1, 5, 9, 2, 6, 5], [7, 1, 8, 2, 8, 1, 8, 2]];
    LmBatch {
        tokens: Tensor::<2, Int>::from_ints(tokens, device),
        targets: Tensor::<2, Int>::from_ints(targets, device),
        loss_mask: Tensor::ones([2, 8], device),
        segments: None,
    }
}

/// The sum of the losses of the batch, in nats.
fn loss(model: &CausalLm, batch: &LmBatch) -> f32 {
    model.loss(batch, 0.0, Probe::default()).loss_sum.into_scalar::<f32>()
}
