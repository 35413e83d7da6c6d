use moonlight_model::ModelConfig;

use super::perplexity::count_words;
use super::*;
use crate::chat::{ChatEncoder, ChatTemplate};
use crate::score::score_batch;

/// A small model with random weights and the vocabulary of `bytes`.
fn model() -> CausalLm {
    let shape = serde_json::json!({
        "model_type": "llama", "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
    });
    let config = ModelConfig::from_value(shape).unwrap();
    let device = burn::tensor::Device::flex();
    device.seed(3);
    config.init(&device)
}

/// The log-likelihood of `continuation` after `context`, token by token with [`crate::score::score`].
fn by_hand(model: &CausalLm, context: &str, continuation: &str) -> f64 {
    let tokens: Vec<u32> = context.bytes().chain(continuation.bytes()).map(u32::from).collect();
    let scores = crate::score::score(model, &tokens).unwrap();
    scores[context.len()..].iter().map(|score| f64::from(score.unwrap())).sum()
}

fn run(model: &CausalLm, name: &str, lines: &str, change: impl FnOnce(&mut Task)) -> Result<Evaluation, InferError> {
    let dir = tempfile::tempdir().unwrap();
    let mut task = Task { path: dir.path().join(name), ..Task::default() };
    std::fs::write(&task.path, lines).unwrap();
    change(&mut task);
    evaluate(EvalModel { model, tokenizer: &Tokenizer::bytes_chat(), dir: None }, &task)
}

fn value(evaluation: &Evaluation, name: &str) -> Estimate {
    evaluation.metrics.iter().find(|metric| metric.name == name).unwrap().estimate
}

fn argmax(values: &[f64]) -> usize {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap()
}

#[test]
fn choices_are_scored_as_one_text_after_the_context() {
    let model = model();
    let endings = [["a", "sits down", "é é"], ["up", "x", "down again now"], ["1", "22", "333"]];
    let lines: String = endings
        .iter()
        .enumerate()
        .map(|(index, endings)| {
            format!("{}\n", json!({"ctx": format!("He {index}"), "endings": endings, "label": index}))
        })
        .collect();
    let evaluation = run(&model, "x.jsonl", &lines, |_| {}).unwrap();
    assert_eq!((evaluation.format, evaluation.rows), (TaskFormat::HellaSwag, 3));
    let mut right = [0.0; 3];
    for (index, endings) in endings.iter().enumerate() {
        let sums: Vec<f64> =
            endings.iter().map(|ending| by_hand(&model, &format!("He {index}"), &format!(" {ending}"))).collect();
        let record = &evaluation.records[index];
        for (got, expected) in record["loglikelihoods"].as_array().unwrap().iter().zip(&sums) {
            assert!((got.as_f64().unwrap() - expected).abs() < 1e-4, "{got} is not {expected}");
        }
        let by = |length: fn(&str) -> usize| {
            let sums: Vec<f64> = sums.iter().zip(endings).map(|(sum, text)| sum / length(text) as f64).collect();
            argmax(&sums)
        };
        let chosen = [argmax(&sums), by(|text| text.chars().count()), by(str::len)];
        for (right, chosen) in right.iter_mut().zip(chosen) {
            *right += f64::from(u8::from(chosen == index));
        }
    }
    for (name, right) in ["acc", "acc_norm", "acc_bytes"].into_iter().zip(right) {
        let share = right / 3.0;
        let got = value(&evaluation, name);
        assert!((got.value - share).abs() < 1e-12, "{name}");
        assert!((got.stderr.unwrap() - (share * (1.0 - share) / 2.0).sqrt()).abs() < 1e-12, "{name}");
    }
}

#[test]
fn few_shot_examples_precede_the_question() {
    let model = model();
    let row = |question: &str, answer: usize| json!({"question": question, "choices": ["y", "n"], "answer": answer});
    let lines = format!("{}\n{}\n", row("p", 0), row("q", 1));
    let evaluation = run(&model, "x.jsonl", &lines, |task| task.shots = 1).unwrap();
    let context = "q\nA. y\nB. n\nAnswer: B\n\np\nA. y\nB. n\nAnswer:";
    for (index, letter) in [" A", " B"].into_iter().enumerate() {
        let got = evaluation.records[0]["loglikelihoods"][index].as_f64().unwrap();
        assert!((got - by_hand(&model, context, letter)).abs() < 1e-4);
    }
    assert_eq!(evaluation.shots, 1);
    let error = run(&model, "x.jsonl", &lines, |task| task.shots = 2).unwrap_err().to_string();
    assert!(error.contains("there are 1 examples for 2 shots"), "{error}");
    // A context of more than 64 tokens is truncated on the left.
    let long = format!("{}\n{}\n", row(&"w".repeat(100), 0), row("q", 1));
    let evaluation = run(&model, "x.jsonl", &long, |_| {}).unwrap();
    let whole: Vec<u32> = format!("{}\nA. y\nB. n\nAnswer: B", "w".repeat(100)).bytes().map(u32::from).collect();
    // The last 65: 64 are read, and the last is predicted.
    let scored = score_batch(&model, &[&whole[whole.len() - 65..]]).unwrap().remove(0);
    let expected: f64 = scored[62..].iter().map(|scored| f64::from(scored.logprob)).sum();
    let got = evaluation.records[0]["loglikelihoods"][1].as_f64().unwrap();
    assert!((got - expected).abs() < 1e-4, "{got} is not {expected}");
}

#[test]
fn long_texts_are_scored_in_windows() {
    let model = model();
    let texts = ["hello world", &"abc def ".repeat(20), "x"];
    let lines: String = texts.iter().map(|text| format!("{}\n", json!({"text": text}))).collect();
    let evaluation = run(&model, "x.jsonl", &lines, |_| {}).unwrap();
    let (mut sum, mut bytes, mut words) = (0.0, 0.0, 0.0);
    for text in texts {
        // The harness's windows for a context of 64: `<|bos|>` and 64 tokens, then 64 new tokens each, the last one with a
        // full context before.
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        let mut at = 0;
        while at < tokens.len() {
            let end = tokens.len().min(at + 64);
            let window = if at == 0 {
                [&[crate::tokenizer::BOS], &tokens[..end]].concat()
            } else {
                tokens[end - 65..end].to_vec()
            };
            let scored = score_batch(&model, &[&window]).unwrap().remove(0);
            sum += scored[scored.len() - (end - at)..].iter().map(|scored| f64::from(scored.logprob)).sum::<f64>();
            at = end;
        }
        bytes += text.len() as f64;
        words += text.split(' ').count() as f64;
    }
    for (name, expected) in [
        ("byte_perplexity", (-sum / bytes).exp()),
        ("word_perplexity", (-sum / words).exp()),
        ("token_perplexity", (-sum / bytes).exp()),
        ("bits_per_byte", -sum / bytes / 2f64.ln()),
    ] {
        let got = value(&evaluation, name);
        assert!((got.value / expected - 1.0).abs() < 1e-4, "{name}: {} is not {expected}", got.value);
        assert!(got.stderr.unwrap() > 0.0);
    }
}

/// As in the harness's task `wikitext`, the detokenized text is scored, and the words and bytes of the original are counted.
#[test]
fn a_page_of_wikitext_is_scored_detokenized() {
    let model = model();
    let page = " = A = \n 1 @,@ 000 dogs ' tails . \n";
    let plain = " = A =\n1,000 dogs' tails.\n";
    let [wiki, text] = [json!({"page": page}), json!({"text": plain})]
        .map(|row| run(&model, "x.jsonl", &format!("{row}\n"), |_| {}).unwrap());
    let [wiki, text] = [&wiki.records[0], &text.records[0]];
    assert_eq!(wiki["loglikelihood"], text["loglikelihood"]);
    assert_eq!((&wiki["words"], &wiki["bytes"]), (&json!(count_words(page)), &json!(page.len())));
    assert_eq!((&text["words"], &text["bytes"]), (&json!(count_words(plain)), &json!(plain.len())));
}

#[test]
fn words_are_counted_as_by_pythons_split() {
    for (text, words) in [("", 1), (" ", 2), ("a", 1), ("a  b\nc", 3), (" a ", 3)] {
        assert_eq!(count_words(text), words, "{text:?}");
    }
}

#[test]
fn an_answer_matches_exactly_if_greedy_decoding_gives_it() {
    let model = model();
    let tokenizer = Tokenizer::bytes_chat();
    let encoder = ChatEncoder::new(ChatTemplate::for_tokenizer(&tokenizer).unwrap(), tokenizer.clone());
    let turns = |answer: &str| {
        json!({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer}]})
    };
    // The loss of a conversation by hand.
    let line = turns("yes").to_string();
    let conversation = encoder.parse(line.as_bytes()).unwrap();
    let read = encoder.weighted_tokens(&conversation).unwrap();
    let scores = crate::score::score(&model, &read.tokens).unwrap();
    let learned: Vec<f64> = scores
        .iter()
        .zip(&read.weights)
        .filter(|(_, weight)| **weight > 0.0)
        .map(|(score, _)| -f64::from(score.unwrap()))
        .collect();
    assert_eq!(learned.len(), 4);
    let evaluation = run(&model, "x.jsonl", &format!("{line}\n"), |_| {}).unwrap();
    let nll = value(&evaluation, "nll").value;
    assert!((nll - learned.iter().sum::<f64>() / 4.0).abs() < 1e-4, "{nll}");
    // Every token that greedy decoding generates is greedy, and a different first token is not.
    let prompt = encoder.tokens(&conversation.messages()[..2], true).unwrap();
    let sampling = crate::generate::Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    let generated = crate::generate::generate(&model, &prompt, 3, sampling, &[], |_| {}).unwrap().tokens;
    let scored = score_batch(&model, &[&[&prompt[..], &generated[..]].concat()]).unwrap().remove(0);
    assert!(scored[prompt.len() - 1..].iter().all(|scored| scored.greedy));
    let wrong: Vec<u32> = generated.iter().map(|token| (token + 1) % 259).collect();
    let scored = score_batch(&model, &[&[&prompt[..], &wrong[..1]].concat()]).unwrap().remove(0);
    assert!(!scored[prompt.len() - 1].greedy);
    assert_eq!(value(&evaluation, "exact_match").value, 0.0);
}

#[test]
fn invalid_rows_are_errors_with_their_line() {
    let model = model();
    let message_of = |lines: &str, change: fn(&mut Task)| {
        let error = run(&model, "x.jsonl", lines, change).unwrap_err();
        error.to_string().split("x.jsonl").last().unwrap().to_owned()
    };
    assert_eq!(message_of("{}\n", |_| {}), ":1: the keys of the row are not those of any format");
    assert_eq!(message_of("{\"text\": \"a\"}\n{\"text\": 3}\n", |_| {}), ":2: the row has no `text`");
    assert_eq!(
        message_of("{\"text\": \"a\"}\n\n{\n", |_| {}),
        ":3:1: the record is not JSON: EOF while parsing an object"
    );
    assert_eq!(message_of("\n", |_| {}), "` has no rows");
    assert_eq!(message_of("{\"messages\": []}\n", |_| {}), ":1: the conversation has no assistant message");
    let as_arc: fn(&mut Task) = |task| task.format = Some(TaskFormat::Arc);
    assert_eq!(message_of("{\"text\": \"a\"}\n", as_arc), ":1: the row has no `choices`");
    let long = json!({"instruction": "x".repeat(100), "output": "y"}).to_string();
    assert!(message_of(&long, |_| {}).contains("are more than the model's context of 64"));
    assert!(
        message_of("{\"text\": \"a\"}\n", |task| task.shots = 1)
            .contains("few-shot examples are not supported for rows of `perplexity`")
    );
}

/// A tokenizer with ASCII characters, `<s>` and `merges`; with `bos` it adds `<s>` before each text.
fn tokenizer_with(merges: &[[&str; 2]], bos: bool) -> (tempfile::TempDir, Tokenizer) {
    let mut vocab: Map<String, Value> = (b' '..=b'~')
        .map(char::from)
        .chain(['\n'])
        .zip(1..)
        .map(|(letter, id)| (letter.to_string(), json!(id)))
        .collect();
    vocab.insert("<s>".into(), json!(0));
    for [left, right] in merges {
        vocab.insert(format!("{left}{right}"), json!(vocab.len()));
    }
    let around = json!({
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    });
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": if bos { around } else { Value::Null }, "decoder": {"type": "Fuse"},
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges},
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), json!({"bos_token": "<s>"}).to_string()).unwrap();
    let tokenizer = Tokenizer::open(dir.path().to_str().unwrap()).unwrap();
    (dir, tokenizer)
}

fn run_with(model: &CausalLm, tokenizer: &Tokenizer, lines: &str, fix_harness: bool) -> Result<Evaluation, InferError> {
    let dir = tempfile::tempdir().unwrap();
    let task = Task { path: dir.path().join("x.jsonl"), fix_harness, ..Task::default() };
    std::fs::write(&task.path, lines).unwrap();
    evaluate(EvalModel { model, tokenizer, dir: None }, &task)
}

/// The log-likelihood of the tokens from index `from`.
fn sum_from(model: &CausalLm, tokens: &[u32], from: usize) -> f64 {
    let scores = crate::score::score(model, tokens).unwrap();
    scores[from..].iter().map(|score| f64::from(score.unwrap())).sum()
}

fn assert_likelihoods(evaluation: &Evaluation, expected: &[f64]) {
    let found: Vec<f64> = evaluation.records[0]["loglikelihoods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|value| value.as_f64().unwrap())
        .collect();
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?} is not {expected:?}");
}

/// lm_eval 0.4.13 returns (0.0, True) for a choice whose only token is merged with the context; see
/// `scripts/parity/check_eval.py`.
#[test]
fn a_choice_that_is_merged_with_the_context() {
    let model = model();
    let (_dir, tokenizer) = tokenizer_with(&[[":", " "], [": ", "C"]], false);
    let row = json!({"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 0}).to_string();
    let context = "Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:";
    let alone = tokenizer.encode(context).unwrap();
    let whole = |letter: &str| tokenizer.encode(&format!("{context} {letter}")).unwrap();
    assert_eq!((whole("C").len(), whole("A").len()), (alone.len(), alone.len() + 1));
    let harness = run_with(&model, &tokenizer, &row, false).unwrap();
    // Only the letter is left, after a context without its space.
    let letter = |text: &str| sum_from(&model, &[&alone[..], &tokenizer.encode(text).unwrap()].concat(), alone.len());
    assert_likelihoods(&harness, &[letter("A"), letter("B"), 0.0, letter("D")]);
    assert_eq!(harness.records[0]["choice"], 2);
    assert!(harness.notes[0].contains("in 1 rows (the first on line 1)"), "{:?}", harness.notes);
    assert!(harness.notes[0].contains("`--fix-harness` scores it"));
    let fixed = run_with(&model, &tokenizer, &row, true).unwrap();
    let from = alone.len() - 1;
    assert_likelihoods(&fixed, &["A", "B", "C", "D"].map(|letter| sum_from(&model, &whole(letter), from)));
    assert!(fixed.notes[0].contains("scored with the choice"));
    // Without such a token both yield the same scores, and no note.
    let (_dir, plain) = tokenizer_with(&[], false);
    let [a, b] = [false, true].map(|fix| run_with(&model, &plain, &row, fix).unwrap());
    assert_eq!((&a.records, a.notes.len(), b.notes.len()), (&b.records, 0, 0));
}

#[test]
fn a_context_has_bos_if_the_tokenizer_adds_it_to_texts() {
    let model = model();
    let (_dir, tokenizer) = tokenizer_with(&[], true);
    let row = |question: &str| json!({"question": question, "choices": ["a", "b"], "answer": 0}).to_string();
    let by_hand = |text: &str, bos: bool| {
        let mut tokens = tokenizer.encode(text).unwrap();
        tokens.splice(0..0, bos.then_some(0));
        sum_from(&model, &tokens, tokens.len() - 2)
    };
    let text = "Q?\nA. a\nB. b\nAnswer:";
    let expected = |bos| ["A", "B"].map(|letter| by_hand(&format!("{text} {letter}"), bos));
    assert_likelihoods(&run_with(&model, &tokenizer, &row("Q?"), false).unwrap(), &expected(true));
    let without = tokenizer.clone().with_bos(crate::tokenizer::AddBos::Never).unwrap();
    assert_likelihoods(&run_with(&model, &without, &row("Q?"), false).unwrap(), &expected(false));
    // A context that itself starts with BOS gets no second one.
    let spelled = ["A", "B"].map(|letter| by_hand(&format!("{} {letter}", text.replace("Q?", "Q")), true));
    assert_likelihoods(&run_with(&model, &tokenizer, &row("<s>Q"), false).unwrap(), &spelled);
}

/// The harness adds BOS to a text that already has it, and scores the second one.
#[test]
fn a_text_with_bos_has_it_twice_unless_that_is_fixed() {
    let model = model();
    let (_dir, tokenizer) = tokenizer_with(&[], true);
    let letters = tokenizer.encode("moon").unwrap();
    let twice = sum_from(&model, &[&[0, 0], &letters[..]].concat(), 1);
    let once = sum_from(&model, &[&[0], &letters[..]].concat(), 1);
    let line = json!({"text": "moon"}).to_string();
    for (fix, expected, tokens, notes) in [(false, twice, 5, 1), (true, once, 4, 0)] {
        let evaluation = run_with(&model, &tokenizer, &line, fix).unwrap();
        let record = &evaluation.records[0];
        assert!((record["loglikelihood"].as_f64().unwrap() - expected).abs() < 1e-4, "{record} is not {expected}");
        assert_eq!((&record["tokens"], &record["bytes"], evaluation.notes.len()), (&json!(tokens), &json!(4), notes));
    }
    let without = tokenizer.with_bos(crate::tokenizer::AddBos::Never).unwrap();
    let evaluation = run_with(&model, &without, &line, false).unwrap();
    assert!((evaluation.records[0]["loglikelihood"].as_f64().unwrap() - once).abs() < 1e-4);
    assert!(evaluation.notes.is_empty());
}

#[test]
fn a_choice_that_is_longer_than_the_context_is_refused() {
    let model = model();
    let (_dir, tokenizer) = tokenizer_with(&[], false);
    let row = json!({"ctx": "x", "endings": ["a".repeat(80), "b".to_owned()], "label": 0}).to_string();
    let error = run_with(&model, &tokenizer, &row, false).unwrap_err();
    assert!(
        error.to_string().ends_with("x.jsonl:1: a choice has 81 tokens, more than the model's context of 64"),
        "{error}"
    );
}
