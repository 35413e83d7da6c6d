//! Benchmark: prefill and decoding of a checkpoint or GGUF file, with tokens that are given. `scripts/bench/bench_llama_cpp.py` runs it
//! in turns with llama.cpp.
//!
//! The program loads the model once and then answers requests, so that another program can be measured between two of them. A request is
//! a line of JSON on stdin: `{"prompt": [1, 2, 3], "forced": [4, 5]}`. The answer is a line of JSON on stdout: the seconds that the prompt
//! took (`null` if it was that of the previous request, whose cache is used again), the seconds that all tokens of `forced` took, one after
//! the other, and the most likely token after each of them. As in `moonlight generate`, the time of a token includes the choice of the next.
//!
//! `cargo run --release -p moonlight-infer --example bench_generate -- MODEL [f32|bf16] [int8|int4]`

mod precision;

use std::io::{BufRead, Write};
use std::ops::ControlFlow;
use std::time::Instant;

use moonlight_infer::{OpenedModel, Sampler, Sampling, Session};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Request {
    prompt: Vec<u32>,
    forced: Vec<u32>,
}

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    moonlight_model::keep_freed_memory();
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: bench_generate MODEL [f32|bf16] [int8|int4]")?;
    let options = precision::open_options(arguments)?;
    let start = Instant::now();
    let OpenedModel { model, .. } = options.open(path)?;
    println!("{}", json!({"load_seconds": start.elapsed().as_secs_f64()}));

    let context = model.config().max_position_embeddings;
    let (mut session, mut known) = (Session::new(&model, context), Vec::new());
    for line in std::io::stdin().lock().lines() {
        let Request { prompt, forced } = serde_json::from_str(&line?)?;
        let is_known = prompt == known && !forced.is_empty();
        let prompt_seconds = if is_known {
            None
        } else {
            session = Session::new(&model, context);
            Some(next(&mut session, &prompt)?.0)
        };
        let (mut tokens, mut seconds, mut chosen) = (prompt.clone(), 0.0, Vec::new());
        known = prompt;
        for token in forced {
            tokens.push(token);
            let (time, best) = next(&mut session, &tokens)?;
            seconds += time;
            chosen.push(best);
        }
        println!("{}", json!({"prompt_seconds": prompt_seconds, "seconds": seconds, "chosen": chosen}));
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// The seconds to run the tokens that the session has not seen, and the most likely next token.
fn next(session: &mut Session<'_>, tokens: &[u32]) -> Result<(f64, u32), Error> {
    let start = Instant::now();
    let mut sampler = Sampler::new(Sampling::default());
    let generated = session.generate(tokens, 1, &mut sampler, &[], |_| ControlFlow::Continue(()))?;
    Ok((start.elapsed().as_secs_f64(), *generated.tokens.first().ok_or("the context is full")?))
}
