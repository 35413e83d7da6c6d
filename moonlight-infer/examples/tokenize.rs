//! Tokenizes texts: `cargo run --release -p moonlight-infer --example tokenize -- DIR < texts.jsonl`.
//!
//! Each line of the input is a JSON string. Each line of the output is an object with
//!
//! * `tokens`: the tokens of the text without prefix and suffix, in which special tokens are encoded as text;
//! * `parsed`: the tokens with prefix and suffix, in which special tokens are parsed;
//! * `decoded`, `decoded_with_special`, `streamed`: the text of `parsed`, the last of them decoded token by token.
//!
//! The script `check_tokenizer.py` compares them with those of transformers and tiktoken.

use std::error::Error;
use std::io::{BufRead, Write, stdin, stdout};

use moonlight_infer::Tokenizer;
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1).ok_or("name the tokenizer")?;
    let tokenizer = Tokenizer::open(&name)?;
    let parsing = tokenizer.clone().with_parse_special(true);
    let mut output = stdout().lock();
    for line in stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        let parsed = parsing.encode_text(&text)?;
        let mut stream = tokenizer.stream();
        let mut streamed: String = parsed.iter().map(|&token| stream.push(token)).collect();
        streamed.push_str(&stream.finish());
        let line = json!({
            "tokens": tokenizer.encode(&text)?, "parsed": parsed, "decoded": tokenizer.decode(&parsed),
            "decoded_with_special": tokenizer.decode_with_special(&parsed), "streamed": streamed,
        });
        writeln!(output, "{line}")?;
    }
    Ok(())
}
