//! The cost of decoding a token hardly depends on its position.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::{CausalLm, KvCache, ModelConfig};

const TOKENS: usize = 24;

/// The time of decoding one token.
fn decode(model: &CausalLm, cache: &mut KvCache, device: &Device) -> Duration {
    let token = Tensor::<2, Int>::from_data([[7]], device);
    let start = Instant::now();
    let logits = model.decode(token, cache);
    logits.sum().into_scalar::<f32>(); // waits for the result
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn position_two_thousand_costs_at_most_twice_position_ten() {
    let device = Device::default();
    let config = ModelConfig::preset("bench-small").unwrap();
    let model = config.init(&device);
    let cache_of = |length: usize| {
        let tokens: Vec<i32> = (0..length).map(|index| (index * 31 % 8192) as i32).collect();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [1, length]), &device);
        let mut cache = KvCache::new(&config, 1, 2048, &device, model.dtype());
        model.decode(tokens, &mut cache);
        cache
    };
    let (mut early, mut late) = (cache_of(10), cache_of(2000));
    for cache in [&mut early, &mut late] {
        decode(&model, cache, &device); // prepares the weights for decoding
    }
    // Alternating, so that other load on the machine affects both alike.
    let (mut early_times, mut late_times) = (Vec::new(), Vec::new());
    for _ in 0..TOKENS {
        early_times.push(decode(&model, &mut early, &device));
        late_times.push(decode(&model, &mut late, &device));
    }
    let (early, late) = (median(early_times), median(late_times));
    println!("a token at position 10: {early:?}, at position 2000: {late:?}");
    assert!(late < 2 * early, "a token at position 10 took {early:?}, at position 2000 {late:?}");
}
