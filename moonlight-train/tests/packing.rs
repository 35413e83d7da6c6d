//! Packed conversations compared with the same conversations one by one, through a model.

mod common;

use std::collections::BTreeMap;

use burn::tensor::Device;
use common::SHAPE;
use moonlight_model::{ModelConfig, Probe};
use moonlight_train::data::{Dataset, HostBatch};
use moonlight_train::recipe::Recipe;

const RECIPE: &str = r#"
[model]
vocab_size = 259
max_position_embeddings = 256
SHAPE
[data]
train = ["DIR/*.jsonl"]
format = "chat"
sequence_length = 256
cache_dir = "DIR/cache"
shuffle = false

[optimizer]
learning_rate = 1e-3

[train]
steps = 1
"#;

/// The documents of a batch: the tokens of each, and the batch with a loss mask of 0 for all other documents.
fn documents(batch: &HostBatch) -> Vec<(Vec<i32>, HostBatch)> {
    let numbers = batch.documents.clone().unwrap_or(vec![0; batch.tokens.len()]);
    let mut found = Vec::new();
    for row in 0..batch.batch {
        let places = row * batch.sequence..(row + 1) * batch.sequence;
        let last = numbers[places.clone()].iter().copied().max().unwrap();
        for document in 0..=last {
            let inside = |at: usize| places.contains(&at) && numbers[at] == document;
            let tokens = places.clone().filter(|&at| inside(at)).map(|at| batch.tokens[at]).collect();
            let mask = batch.loss_mask.iter().enumerate().map(|(at, &weight)| if inside(at) { weight } else { 0.0 });
            found.push((tokens, HostBatch { loss_mask: mask.collect(), ..batch.clone() }));
        }
    }
    found
}

#[test]
fn a_packed_conversation_has_the_same_loss_as_alone() {
    let dir = tempfile::tempdir().unwrap();
    let lines: String = (0..24)
        .map(|n| {
            let weight = [1.0, 0.5, 2.0][n % 3];
            let talk = serde_json::json!({"messages": [
                {"role": "system", "content": format!("S{n}")},
                {"role": "user", "content": "q".repeat(n % 5)},
                {"role": "assistant", "content": format!("{n} is {}", n * n), "weight": weight},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "that is all"},
            ]});
            format!("{talk}\n")
        })
        .collect();
    std::fs::write(dir.path().join("a.jsonl"), lines).unwrap();
    let text = RECIPE.replace("SHAPE", SHAPE).replace("DIR", &dir.path().display().to_string());
    let recipe = Recipe::parse(&text, &dir.path().join("recipe.toml"), &[]).unwrap();
    let tokenizer = recipe.data.tokenizer.open().unwrap().unwrap();
    let config: ModelConfig = recipe.model.config_for(Some(&tokenizer)).unwrap();
    let device = Device::flex();
    device.seed(5);
    let model = config.init(&device);

    // The loss of each document, by its tokens.
    let losses = |pack: bool| {
        let mut data = recipe.data.clone();
        data.pack = pack;
        let dataset = Dataset::open(&data, Some(&tokenizer), config.vocab_size, 0).unwrap();
        let mut losses = BTreeMap::new();
        let mut stream = dataset.train_stream(2);
        let mut most = 0;
        while stream.position().epoch == 0 {
            let found = documents(&stream.next_batch().unwrap());
            most = most.max(found.len());
            for (tokens, batch) in found {
                let sum = model.loss(&batch.to_device(&device), 0.0, Probe::default()).loss_sum;
                losses.insert(tokens, (f64::from(sum.into_scalar::<f32>()), batch.predicted()));
            }
        }
        (losses, most)
    };
    let (packed, of_row_pair) = losses(true);
    let (alone, two) = losses(false);
    assert!(of_row_pair > 4 && two == 2, "{of_row_pair} documents in two packed rows, {two} in two padded ones");
    assert_eq!(packed.len(), 24);
    assert!(packed.keys().eq(alone.keys()));
    for ((packed, weight), (alone, same)) in packed.values().zip(alone.values()) {
        assert_eq!(weight, same);
        assert!(*packed > 0.0 && (packed - alone).abs() <= 1e-5 * alone.abs(), "{packed} is not {alone}");
    }
}
