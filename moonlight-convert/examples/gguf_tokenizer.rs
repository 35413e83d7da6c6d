//! Writes the tokenizer of a model as a GGUF file without tensors, or that of a GGUF file as `tokenizer.json`:
//!
//! ```sh
//! cargo run --release --example gguf_tokenizer -- path/to/model tokenizer.gguf
//! cargo run --release --example gguf_tokenizer -- model.gguf path/to/directory
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use moonlight_convert::gguf::tokenizer::{tokenizer_metadata, tokenizer_texts};
use moonlight_convert::gguf::{GgufHeader, Metadata, write_header};
use moonlight_model::ModelConfig;

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

fn run() -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [from, to] = paths.as_slice() else { return Err("usage: gguf_tokenizer FROM TO".into()) };
    if from.is_dir() {
        let config = ModelConfig::from_json(&std::fs::read_to_string(from.join("config.json"))?)?;
        let tokenizer = tokenizer_metadata(from, &config)?;
        tokenizer.notes.iter().for_each(|note| eprintln!("note: {note}"));
        let mut metadata = Metadata::default();
        metadata.insert("general.architecture", "llama");
        metadata.extend(tokenizer.entries);
        std::fs::write(to, write_header(&GgufHeader::lay_out(metadata, Vec::new())?))?;
        return Ok(());
    }
    let file = std::fs::File::open(from)?;
    let length = file.metadata()?.len();
    let header = GgufHeader::parse(std::io::BufReader::new(file), length)?;
    let Some(texts) = tokenizer_texts(from, &header.metadata)? else { return Err("the file has no tokenizer".into()) };
    texts.notes.iter().for_each(|note| eprintln!("note: {note}"));
    std::fs::create_dir_all(to)?;
    for (name, contents) in texts.files {
        std::fs::write(to.join(name), contents)?;
    }
    Ok(())
}
