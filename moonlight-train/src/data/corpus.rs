//! The training and the validation data of a recipe.

use std::sync::Arc;

use super::files::{self, SourceFile};
use super::hash::Hash;
use super::sequences::Sequences;
use super::store::Store;
use super::tokenise::Reading;
use super::{DataError, HostBatch, TrainStream};
use crate::bigram::bigram_loss;
use crate::recipe::{DataConfig, DataFormat, TooLong};
use crate::tokenizer::Tokenizer;

/// The data of a recipe, tokenised and on disk.
pub struct Corpus {
    train: Sequences,
    valid: Option<Sequences>,
    seed: Option<u64>,
    /// Hash of everything that a position in the training data depends on.
    data: u64,
    vocab_size: usize,
    notes: Vec<String>,
}

impl Corpus {
    /// Finds the files, tokenises what is not in `config.cache_dir` yet, and maps the tokens.
    ///
    /// `vocab_size` is the model's: a token that it does not hold is an error. `tokenizer` may be absent where the files
    /// hold tokens. `seed` gives the order of every epoch.
    ///
    /// # Errors
    ///
    /// [`DataError`]: a glob without a file, a file that cannot be read, a record that is wrong or too long (with file and
    /// line), a cache that cannot be written, nothing to learn from.
    pub fn open(
        config: &DataConfig,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        if config.format == DataFormat::Text && tokenizer.is_none() {
            return Err(DataError::NoTokenizer);
        }
        let mut train_files = files::find("train", &config.train)?;
        let valid_files = if config.valid.is_empty() { Vec::new() } else { files::find("valid", &config.valid)? };
        train_files.retain(|file| valid_files.iter().all(|valid| valid.path != file.path));
        let (mut documents, mut notes) = (Vec::new(), Vec::new());
        for (key, files) in [("train", train_files), ("valid", valid_files)] {
            if files.is_empty() && key == "valid" {
                continue;
            }
            let files = choose(files, config);
            let max_tokens = config.max_tokens;
            let reading = Reading { key, files: &files, format: config.format, tokenizer, vocab_size, max_tokens };
            let store = reading.store(&config.cache_dir)?;
            if store.replaced() > 0 {
                notes.push(format!(
                    "data.{key}: bytes that are not UTF-8 were read as U+FFFD; files that have such: {}",
                    store.replaced()
                ));
            }
            let parts = parts(&store, &files, config)?;
            documents.push((key, Arc::new(store), parts));
        }
        let mut documents = documents.into_iter();
        let sequences = |key, store: Arc<Store>, parts| {
            let sequences = Sequences::new(store, parts, config.sequence_length, config.pack);
            match sequences.predicted() {
                0 => Err(DataError::Nothing { key, problem: format!("{} tokens in all", sequences.tokens()) }),
                _ => Ok(sequences),
            }
        };
        let Some((_, store, mut train)) = documents.next() else {
            return Err(DataError::Nothing { key: "train", problem: "no file".into() });
        };
        let mut valid = None;
        if config.valid_fraction > 0.0 {
            let parts = split(&mut train, config.valid_fraction);
            valid = Some(sequences("valid_fraction", store.clone(), parts)?);
        } else if let Some((key, store, parts)) = documents.next() {
            valid = Some(sequences(key, store, parts)?);
        }
        let seed = config.shuffle.then_some(seed);
        let mut hash = Hash::new(4);
        hash.number(store.content());
        for (start, end) in &train {
            hash.number(*start);
            hash.number(*end);
        }
        for number in
            [config.sequence_length as u64, u64::from(config.pack), u64::from(config.shuffle), seed.unwrap_or(0)]
        {
            hash.number(number);
        }
        let train = sequences("train", store, train)?;
        Ok(Self { train, valid, seed, data: hash.finish(), vocab_size, notes })
    }

    /// The training batches from the beginning, `batch_size` (at least 1) sequences each.
    pub fn train_stream(&self, batch_size: usize) -> TrainStream {
        TrainStream::new(self.train.clone(), self.seed, batch_size, self.data)
    }

    /// The validation data once, in order, `batch_size` (at least 1) sequences a batch, the last batch what is left;
    /// nothing where the recipe names none.
    pub fn valid_batches(&self, batch_size: usize) -> impl Iterator<Item = Result<HostBatch, DataError>> + '_ {
        let count = self.valid.as_ref().map_or(0, Sequences::count);
        let batches =
            (0..count).step_by(batch_size.max(1)).map(move |start| (start, count.min(start + batch_size as u64)));
        batches.filter_map(|(start, end)| {
            let indices: Vec<u64> = (start..end).collect();
            self.valid.as_ref().map(|valid| Ok(valid.batch(&indices)))
        })
    }

    /// Whether there are validation data.
    pub fn has_valid(&self) -> bool {
        self.valid.is_some()
    }

    /// Tokens of the training data.
    pub fn train_tokens(&self) -> u64 {
        self.train.tokens()
    }

    /// Tokens of the validation data.
    pub fn valid_tokens(&self) -> u64 {
        self.valid.as_ref().map_or(0, Sequences::tokens)
    }

    /// Sequences of one epoch of the training data.
    pub fn train_sequences(&self) -> u64 {
        self.train.count()
    }

    /// What the reader should know of the data: for example files that are not UTF-8.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What a bigram model counted on the training data loses on the validation data, in nats per predicted token; `None`
    /// without validation data. See [`bigram_loss`].
    pub fn bigram(&self) -> Option<f64> {
        let valid = self.valid.as_ref()?;
        bigram_loss(self.train.documents(), valid.documents(), self.vocab_size)
    }
}

fn choose(mut files: Vec<SourceFile>, config: &DataConfig) -> Vec<SourceFile> {
    if config.max_file_bytes > 0 {
        files.retain(|file| file.size <= config.max_file_bytes);
    }
    files::limit(files, config.max_bytes)
}

/// The span of each document, checked against the sequence length where each is a sequence of its own.
fn parts(store: &Store, files: &[SourceFile], config: &DataConfig) -> Result<Vec<(u64, u64)>, DataError> {
    let longest = config.sequence_length as u64;
    (0..store.documents())
        .map(|document| {
            let span = store.span(document);
            let length = span.end - span.start;
            if config.pack || length <= longest {
                return Ok((span.start, span.end));
            }
            if config.too_long == TooLong::Truncate {
                return Ok((span.start, span.start + longest));
            }
            let origin = store.origin(document);
            Err(DataError::Record {
                path: files.get(origin.file as usize).map(|file| file.path.clone()).unwrap_or_default(),
                line: origin.line as usize,
                problem: format!("the record has {length} tokens; data.sequence_length is {longest}"),
                hint: Some(
                    "raise data.sequence_length, or set data.too_long = \"truncate\" or data.pack = true".into(),
                ),
            })
        })
        .collect()
}

/// Takes documents, in the order of a hash of their numbers, until they hold `fraction` of the tokens; never all of
/// them. Of a single document the end is taken.
fn split(documents: &mut Vec<(u64, u64)>, fraction: f64) -> Vec<(u64, u64)> {
    let tokens: u64 = documents.iter().map(|(start, end)| end - start).sum();
    let wanted = (tokens as f64 * fraction).ceil() as u64;
    if let [(start, end)] = documents.as_mut_slice() {
        let cut = (*end - wanted.min(*end - *start)).max(*start);
        let valid = (cut, *end);
        *end = cut;
        return vec![valid];
    }
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.sort_by_cached_key(|&document| {
        let mut hash = Hash::new(5);
        hash.number(document as u64);
        hash.finish()
    });
    let mut chosen = vec![false; documents.len()];
    let mut taken = 0;
    for &document in order.iter().take(documents.len().saturating_sub(1)) {
        if taken >= wanted {
            break;
        }
        chosen[document] = true;
        taken += documents[document].1 - documents[document].0;
    }
    let valid = documents.iter().zip(&chosen).filter(|(_, chosen)| **chosen).map(|(span, _)| *span).collect();
    let mut index = 0;
    documents.retain(|_| {
        index += 1;
        !chosen[index - 1]
    });
    valid
}
