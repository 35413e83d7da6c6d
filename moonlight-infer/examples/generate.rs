//! Loads a checkpoint and generates text.
//!
//! ```text
//! cargo run -p moonlight-infer --example generate -- MODEL "Once upon a time"
//! ```
//!
//! `MODEL` is a Hugging Face directory, a checkpoint of a training run, a peft adapter, or `org/name` in the Hub's cache.
//! Without arguments a tiny model of this repository continues five tokens, and the result is checked against transformers'.

use std::error::Error;
use std::io::Write;

use moonlight_infer::{OpenOptions, OpenedModel, Sampling, generate};

/// A random model with the architecture of Moonlight, and the greedy continuation that transformers computed for it
/// (`expected.json` beside its weights). It has no tokenizer, so the prompt is tokens.
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

/// Continues a text and prints it as it is generated.
fn text(model: &str, prompt: &str) -> Result<(), Box<dyn Error>> {
    // The device is the first that this build has, the dtype f32 on the CPU and as stored elsewhere; an adapter or
    // quantization would be further options.
    let opened = OpenOptions::new().open(model)?;
    let tokenizer = opened.tokenizer()?.clone().for_prompts();

    let sampling = Sampling { temperature: 0.7, top_p: 0.95, ..Sampling::default() };
    // Characters can be longer than a token: the stream holds bytes back until they are whole.
    let mut stream = tokenizer.stream();
    print!("{prompt}");
    generate(&opened.model, &tokenizer.encode_text(prompt)?, 200, sampling, &opened.eos, |token| {
        print!("{}", stream.push(token));
        // A closed pipe is no reason to stop the model half-way.
        let _ = std::io::stdout().flush();
    })?;
    println!("{}", stream.finish());
    Ok(())
}

/// The same with tokens for text, on a model whose right answer is known.
fn tokens() -> Result<(), Box<dyn Error>> {
    let OpenedModel { model, eos, .. } = OpenOptions::new().with_device("cpu").open(FIXTURE)?;
    let greedy = Sampling::default();
    let generated = generate(&model, &PROMPT, CONTINUATION.len(), greedy, &eos, |token| print!("{token} "))?;
    println!();
    assert_eq!(generated.tokens, CONTINUATION, "the greedy continuation is that of transformers");
    Ok(())
}
