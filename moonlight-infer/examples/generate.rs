//! Loads a checkpoint and generates text.
//!
//! ```text
//! cargo run -p moonlight-infer --example generate -- MODEL "Once upon a time"
//! ```
//!
//! `MODEL` is a Hugging Face directory, a checkpoint of a training run, a PEFT adapter, or `org/name` in the Hub's cache.
//! Without arguments, a tiny model of this repository continues five tokens, and the result is compared with that of
//! transformers.

use std::error::Error;
use std::io::Write;

use moonlight_infer::{OpenOptions, OpenedModel, Sampling, generate};

/// A model with the architecture of Moonlight and random weights. It has no tokenizer, so the prompt consists of tokens. The
/// continuation is the greedy one that transformers computed (`expected.json` next to the weights).
const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/moonlight-like");
const PROMPT: [u32; 5] = [79, 5, 81, 33, 32];
const CONTINUATION: [u32; 16] = [87, 32, 15, 3, 25, 84, 28, 15, 3, 25, 84, 15, 3, 25, 84, 15];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next(), arguments.next()) {
        (Some(model), Some(prompt)) => text(&model, &prompt),
        (None, None) => tokens(),
        _ => Err("usage: generate [MODEL PROMPT]".into()),
    }
}

/// Continues a text and prints the continuation as it is generated.
fn text(model: &str, prompt: &str) -> Result<(), Box<dyn Error>> {
    // The default is the first available device, with f32 on the CPU and the dtype of the checkpoint on a GPU. Further options
    // are an adapter and quantization.
    let opened = OpenOptions::new().open(model)?;
    let tokenizer = opened.tokenizer()?.clone().for_prompts();

    let sampling = Sampling { temperature: 0.7, top_p: 0.95, ..Sampling::default() };
    // A token may end in the middle of a character. The stream holds its bytes back until the character is complete.
    let mut stream = tokenizer.stream();
    print!("{prompt}");
    generate(&opened.model, &tokenizer.encode_text(prompt)?, 200, sampling, &opened.eos, |token| {
        print!("{}", stream.push(token));
        // A closed pipe is not an error here.
        let _ = std::io::stdout().flush();
    })?;
    println!("{}", stream.finish());
    Ok(())
}

/// Continues tokens instead of text, with a model whose output is known.
fn tokens() -> Result<(), Box<dyn Error>> {
    let OpenedModel { model, eos, .. } = OpenOptions::new().with_device("cpu").open(FIXTURE)?;
    let greedy = Sampling::default();
    let generated = generate(&model, &PROMPT, CONTINUATION.len(), greedy, &eos, |token| print!("{token} "))?;
    println!();
    assert_eq!(generated.tokens, CONTINUATION, "the greedy continuation is that of transformers");
    Ok(())
}
