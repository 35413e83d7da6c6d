//! Writes the logits of every token of given sequences, for `scripts/parity/check_quantized.py`.
//!
//! The program loads a checkpoint or GGUF file once. For each line of JSON on stdin, an array of tokens, it writes the logits
//! `[tokens, vocabulary]` to stdout as f32 in little-endian order.
//!
//! `cargo run --release -p moonlight-infer --example logits -- MODEL [f32|bf16] [int8|int4]`

mod precision;

use std::io::{BufRead, Write};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use moonlight_infer::OpenedModel;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    moonlight_model::keep_freed_memory();
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: logits MODEL [f32|bf16] [int8|int4]")?;
    let options = precision::open_options(arguments)?;
    let OpenedModel { model, .. } = options.open(path)?;
    let mut stdout = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let tokens: Vec<i32> = serde_json::from_str(&line?)?;
        let count = tokens.len();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [1, count]), &Device::default());
        let logits = model.logits(tokens, None).cast(DType::F32).into_data(); // [1, tokens, vocabulary]
        for value in logits.iter::<f32>() {
            stdout.write_all(&value.to_le_bytes())?;
        }
        stdout.flush()?;
    }
    Ok(())
}
