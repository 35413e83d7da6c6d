//! The training and the validation data of a recipe.

use std::collections::HashSet;
use std::sync::Arc;

use moonlight_infer::chat::{ChatEncoder, ChatError, ChatTemplate};
use moonlight_infer::records::FilePosition;
use moonlight_infer::tokenizer::{Tokenizer, TokenizerFile};

use super::bigram::bigram_loss;
use super::files::{self, SourceFile};
use super::hash::Hash;
use super::report::{Fault, Faults};
use super::sequences::{Packing, Sequences};
use super::token_store::{Origin, TokenStore};
use super::tokenize::TokenizeJob;
use super::{DataError, HostBatch, TrainStream};
use crate::file_id::FileId;
use crate::recipe::{DataConfig, DataFormat, LongRecords};

/// The data of a recipe: tokenized, on disk, and divided into sequences.
pub struct Dataset {
    pub(super) train: Sequences,
    pub(super) valid: Option<Sequences>,
    /// The files of the training data; documents refer to them by index.
    pub(super) files: Vec<SourceFile>,
    /// The chat template, if it does not come with the tokenizer.
    template: Option<TokenizerFile>,
    /// The token that ends an assistant's turn.
    end_of_turn: Option<u32>,
    /// `None` without shuffling.
    seed: Option<u64>,
    /// A hash of everything that a position in the training data depends on.
    train_hash: u64,
    /// A hash of the validation documents; 0 without any.
    valid_hash: u64,
    vocab_size: usize,
    notes: Vec<String>,
}

impl Dataset {
    /// Finds the files, tokenizes what is not in `config.cache_dir` yet, and opens the tokens.
    ///
    /// `vocab_size` is the model's; a token beyond it is an error. `tokenizer` may be `None` for files of tokens. The order of
    /// every epoch follows from `seed`.
    ///
    /// # Errors
    ///
    /// [`DataError`] for a glob without a file, a file that cannot be read, a broken or too long record (with file and line), a
    /// cache that cannot be written, and data with nothing to learn from.
    pub fn open(
        config: &DataConfig,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        if config.format != DataFormat::Tokens && tokenizer.is_none() {
            return Err(DataError::NoTokenizer);
        }
        let chat = match (config.format, tokenizer) {
            (DataFormat::Chat, Some(tokenizer)) => Some(chat_encoder(config, tokenizer)?),
            _ => None,
        };
        let mut train_files = files::find("train", &config.train)?;
        let valid_files = if config.valid.is_empty() { Vec::new() } else { files::find("valid", &config.valid)? };
        let of_valid: HashSet<&FileId> = valid_files.iter().map(|file| &file.id).collect();
        // By identity and not by path: the same file may be reached through links.
        train_files.retain(|file| !of_valid.contains(&file.id));
        let (mut documents, mut notes) = (Vec::new(), Vec::new());
        let mut files_of_train = Vec::new();
        // The explanation for each part, in case nothing in it can be learned: key, problem and hint.
        let mut explanations: Vec<(&str, String, Option<String>)> = Vec::new();
        if let Some(chat) = &chat {
            notes.push(format!("data: chat template: {}", chat.template().source()));
            if chat.template().uses_date() {
                notes.push(
                    "data: the chat template writes the date, which is the day on which the records were tokenized"
                        .into(),
                );
            }
        }
        for (key, files) in [("train", train_files), ("valid", valid_files)] {
            if files.is_empty() && key == "valid" {
                continue;
            }
            let Chosen { files, note } = choose(files, config);
            notes.extend(note.iter().map(|note| format!("data.{key}: {note}")));
            let (max_tokens, broken) = (config.max_tokens, config.broken);
            let (format, chat) = (config.format, chat.as_ref());
            let job = TokenizeJob { key, files: &files, format, tokenizer, chat, broken, vocab_size, max_tokens };
            let store = job.store(&config.cache_dir)?;
            notes.extend(store.report().notes(key, &files));
            let UsedDocuments { parts, notes: more, left_out, hint } = parts(&store, &files, config)?;
            notes.extend(more.iter().map(|note| format!("data.{key}: {note}")));
            let mut reasons = store.report().left_out(&files);
            reasons.extend(left_out.into_iter().chain(note));
            let broken = "set `data.broken = \"error\"` to stop at the first broken record";
            let hint = hint.or((store.report().broken.count > 0).then(|| broken.into()));
            explanations.push((key, nothing_in(&files, &reasons), hint));
            if key == "train" {
                files_of_train = files;
            }
            documents.push((key, Arc::new(store), parts));
        }
        let mut documents = documents.into_iter();
        let sequences = |key, store: Arc<TokenStore>, parts| {
            let sequences = Sequences::new(store, parts, config.sequence_length, packing(config));
            match sequences.predicted()? {
                0 => {
                    let found = explanations.iter().find(|(of, ..)| *of == key).or(explanations.first());
                    let (problem, hint) = found.map(|(_, problem, hint)| (problem.clone(), hint.clone())).unzip();
                    let mut problem = problem.unwrap_or_default();
                    if problem.is_empty() {
                        problem = format!("{} tokens in all", sequences.tokens());
                    }
                    Err(DataError::Nothing { key, problem, hint: hint.flatten() })
                }
                _ => Ok(sequences),
            }
        };
        let Some((_, store, mut train)) = documents.next() else {
            return Err(DataError::Nothing { key: "train", problem: "no file".into(), hint: None });
        };
        let (mut valid, mut valid_hash) = (None, 0);
        if config.valid_fraction > 0.0 {
            if config.format == DataFormat::Chat && train.len() == 1 {
                let problem = "there is one conversation, which cannot be divided".into();
                let hint = Some("name validation files by `data.valid`, or leave `data.valid_fraction` out".into());
                return Err(DataError::Nothing { key: "valid_fraction", problem, hint });
            }
            let parts = split(&mut train, config.valid_fraction);
            valid_hash = hash_of(&store, &parts).finish();
            valid = Some(sequences("valid_fraction", store.clone(), parts)?);
        } else if let Some((key, store, parts)) = documents.next() {
            valid_hash = hash_of(&store, &parts).finish();
            valid = Some(sequences(key, store, parts)?);
        }
        let seed = config.shuffle.then_some(seed);
        let mut hash = hash_of(&store, &train);
        for number in
            [config.sequence_length as u64, u64::from(config.pack), u64::from(config.shuffle), seed.unwrap_or(0)]
        {
            hash.number(number);
        }
        let train = sequences("train", store, train)?;
        if config.format == DataFormat::Chat {
            notes.push(learned("train", &train)?);
            notes.extend(valid.as_ref().map(|valid| learned("valid", valid)).transpose()?);
        }
        let end_of_turn = chat.as_ref().and_then(ChatEncoder::end_token);
        let template = chat.filter(|chat| !comes_with_tokenizer(config, tokenizer, chat)).map(|chat| TokenizerFile {
            name: "chat_template.jinja".into(),
            contents: chat.template().text().as_bytes().to_owned(),
        });
        let files = files_of_train;
        let train_hash = hash.finish();
        Ok(Self { train, valid, files, template, end_of_turn, seed, train_hash, valid_hash, vocab_size, notes })
    }

    /// The chat template of the data, if it is not the one in the tokenizer's files. Checkpoints contain it, so that the model
    /// is used with the template it was trained with.
    pub fn template(&self) -> Option<&TokenizerFile> {
        self.template.as_ref()
    }

    /// The token that ends an assistant's turn; `None` for data that are not conversations.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn
    }

    /// An endless stream of training batches from the first one, with `batch_size` (at least 1) sequences each.
    pub fn train_stream(&self, batch_size: usize) -> TrainStream {
        TrainStream::new(self.train.clone(), self.seed, batch_size, self.train_hash)
    }

    /// The validation data once, in order, in batches of `batch_size` (at least 1) sequences; the last batch has the rest.
    /// Empty without validation data.
    pub fn valid_batches(&self, batch_size: usize) -> impl Iterator<Item = Result<HostBatch, DataError>> + '_ {
        let count = self.valid.as_ref().map_or(0, Sequences::count);
        let batches =
            (0..count).step_by(batch_size.max(1)).map(move |start| (start, count.min(start + batch_size as u64)));
        batches.filter_map(|(start, end)| {
            let indices: Vec<u64> = (start..end).collect();
            self.valid.as_ref().map(|valid| valid.batch(&indices))
        })
    }

    /// Whether there are validation data.
    pub fn has_valid(&self) -> bool {
        self.valid.is_some()
    }

    /// Tokens of the training data, without padding.
    pub fn train_tokens(&self) -> u64 {
        self.train.tokens()
    }

    /// Tokens of the validation data, without padding; 0 without any.
    pub fn valid_tokens(&self) -> u64 {
        self.valid.as_ref().map_or(0, Sequences::tokens)
    }

    /// A hash of the training data: their tokens, their order and their division into sequences.
    pub fn train_hash(&self) -> u64 {
        self.train_hash
    }

    /// A hash of the tokens of the validation data; 0 without any.
    pub fn valid_hash(&self) -> u64 {
        self.valid_hash
    }

    /// Sequences of one epoch of the training data.
    pub fn train_sequences(&self) -> u64 {
        self.train.count()
    }

    /// Notes about the data for the log, for example on broken records or on bytes that are not UTF-8.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The loss on the validation data of a bigram model counted on the training data, in nats per predicted token; `None`
    /// without validation data, or if the token cache can no longer be read. See [`bigram_loss`].
    pub fn bigram(&self) -> Option<f64> {
        let valid = self.valid.as_ref()?;
        let (mut of_train, mut of_valid) = (Ok(()), Ok(()));
        let loss = bigram_loss(
            until_fault(self.train.documents(), &mut of_train),
            until_fault(valid.documents(), &mut of_valid),
            self.vocab_size,
        );
        match of_train.and(of_valid) {
            Ok(()) => loss,
            Err(error) => {
                // The baseline is only logged at the end of a run, which must not fail because of it.
                tracing::warn!("the bigram model cannot be counted: {error}");
                None
            }
        }
    }
}

/// A hash of some documents of a store: its contents, and the documents' spans.
fn hash_of(store: &TokenStore, documents: &[(u64, u64)]) -> Hash {
    let mut hash = Hash::new(4);
    hash.number(store.content_hash());
    for (start, end) in documents {
        hash.number(*start);
        hash.number(*end);
    }
    hash
}

/// The documents before the first that cannot be read, whose error goes to `result`.
fn until_fault<D>(
    documents: impl Iterator<Item = Result<D, DataError>>,
    result: &mut Result<(), DataError>,
) -> impl Iterator<Item = D> {
    documents.map_while(|document| document.map_err(|error| *result = Err(error)).ok())
}

/// The files to read.
struct Chosen {
    files: Vec<SourceFile>,
    /// A note about the files that were left out.
    note: Option<String>,
}

fn choose(mut files: Vec<SourceFile>, config: &DataConfig) -> Chosen {
    let limit = config.max_file_bytes;
    let mut note = None;
    if limit > 0 {
        let large: Vec<SourceFile> = files.extract_if(.., |file| file.size > limit).collect();
        if let Some(first) = large.first() {
            let (count, first) = (large.len(), first.path.display());
            note =
                Some(format!("files larger than `data.max_file_bytes` were left out: {count}, the first is `{first}`"));
        }
    }
    Chosen { files: files::limit(files, config.max_bytes), note }
}

/// The reasons why files contain nothing to learn from; empty if none is known.
fn nothing_in(files: &[SourceFile], reasons: &[String]) -> String {
    match (reasons, files) {
        ([], []) => "no file".into(),
        ([], _) => String::new(),
        (reasons, _) => reasons.join("; "),
    }
}

/// The template and the tokenizer of `format = "chat"`.
fn chat_encoder(config: &DataConfig, tokenizer: &Tokenizer) -> Result<ChatEncoder, DataError> {
    let template = match config.chat_template.as_os_str().is_empty() {
        true => ChatTemplate::for_tokenizer(tokenizer),
        false => ChatTemplate::from_file(&config.chat_template, tokenizer),
    };
    let template = template.map_err(|error| DataError::Template {
        problem: error.to_string(),
        hint: match &error {
            ChatError::NoTemplate { .. } => Some(
                "name a template by `data.chat_template = \"FILE.jinja\"`, or for a model of bytes set `data.tokenizer = \
                 \"bytes-chat\"`"
                    .into(),
            ),
            error => error.hint(),
        },
    })?;
    Ok(ChatEncoder::new(template, tokenizer.clone()))
}

fn comes_with_tokenizer(config: &DataConfig, tokenizer: Option<&Tokenizer>, chat: &ChatEncoder) -> bool {
    let own = tokenizer.and_then(|tokenizer| ChatTemplate::for_tokenizer(tokenizer).ok());
    config.chat_template.as_os_str().is_empty()
        && own.is_some_and(|own| own.source() == chat.template().source() && own.is_from_file())
}

fn packing(config: &DataConfig) -> Packing {
    match (config.pack, config.format) {
        (false, _) => Packing::OneByOne,
        (true, DataFormat::Chat) => Packing::Whole,
        (true, DataFormat::Text | DataFormat::Tokens) => Packing::EndToEnd,
    }
}

/// A note about the share of learned tokens and of padding.
fn learned(key: &str, sequences: &Sequences) -> Result<String, DataError> {
    let (learned, tokens) = (sequences.predicted()?, sequences.tokens());
    let full = sequences.fill().map(|fill| format!("; the sequences are {:.1} % full", 100.0 * fill));
    Ok(format!(
        "data.{key}: {learned} of {tokens} tokens are learned ({:.1} %){}",
        100.0 * learned as f64 / tokens.max(1) as f64,
        full.unwrap_or_default()
    ))
}

/// The documents that are used.
struct UsedDocuments {
    /// The span of each in the token store.
    parts: Vec<(u64, u64)>,
    notes: Vec<String>,
    /// The notes about documents that are not used.
    left_out: Vec<String>,
    /// What to do if no document is used.
    hint: Option<String>,
}

/// The spans of the documents to use. Documents that may not be cut into several sequences are checked against the sequence
/// length.
fn parts(store: &TokenStore, files: &[SourceFile], config: &DataConfig) -> Result<UsedDocuments, DataError> {
    let longest = config.sequence_length as u64;
    let mut parts = Vec::with_capacity(store.documents());
    let [mut skipped, mut cut, mut unlearned] = [(); 3].map(|()| Faults::default());
    let mut reader = store.reader(0);
    store.each_document(|document, span| {
        let length = span.end - span.start;
        if packing(config) == Packing::EndToEnd || length <= longest {
            parts.push((span.start, span.end));
            return Ok(());
        }
        let Origin { file, line, column } = store.origin(document)?;
        let fault = Fault { file, line, column, problem: format!("{length} tokens") };
        match config.too_long {
            LongRecords::Error => {
                return Err(DataError::Record {
                    path: files.get(file as usize).map(|file| file.path.clone()).unwrap_or_default(),
                    place: FilePosition { line: line as usize, column: column as usize },
                    problem: format!("the record has {length} tokens, but `data.sequence_length` is {longest}"),
                    hint: Some(match config.format {
                        DataFormat::Chat => {
                            "raise `data.sequence_length`, or set `data.too_long` to `skip` or `truncate`".into()
                        }
                        _ => {
                            "raise `data.sequence_length`, or set `data.too_long = \"truncate\"` or `data.pack = true`"
                                .into()
                        }
                    }),
                });
            }
            LongRecords::Skip => skipped.add(fault),
            LongRecords::Truncate => {
                let end = span.start + longest;
                // The first token of a document is never predicted.
                if reader.read(span.start..end)?.skip(1).all(|(_, weight)| weight == 0.0) {
                    unlearned.add(fault);
                } else {
                    cut.add(fault);
                    parts.push((span.start, end));
                }
            }
        }
        Ok(())
    })?;
    let skipped = skipped.note(&format!("longer than {longest} tokens and left out"), files);
    let cut = cut.note(&format!("longer than {longest} tokens and truncated"), files);
    let unlearned =
        unlearned.note(&format!("left out, because nothing in the first {longest} tokens is learned"), files);
    let left_out: Vec<String> = skipped.iter().chain(&unlearned).cloned().collect();
    let hint = (!left_out.is_empty()).then(|| "raise `data.sequence_length`".into());
    Ok(UsedDocuments { parts, notes: [skipped, cut, unlearned].into_iter().flatten().collect(), left_out, hint })
}

/// Moves documents to the validation data, in the order of a hash of their indices, until they contain `fraction` of the
/// tokens; at least one document stays in the training data. If there is only one, its end is moved. The hash makes the choice
/// independent of the order of topics in the files, and the same in every run.
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
