use moonlight_model::ModelConfig;

use super::*;

/// A model of bytes without a thought: fresh weights, but a head that a test can compute by hand.
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
    let tokenizer = Tokenizer::bytes_chat();
    evaluate(Reader { model, tokenizer: &tokenizer, dir: None }, &task)
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
fn examples_stand_before_the_question() {
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
    // A context beyond the model's 64 loses its beginning.
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
fn texts_are_predicted_in_windows() {
    let model = model();
    let texts = ["hello world", &"abc def ".repeat(20), "x"];
    let lines: String = texts.iter().map(|text| format!("{}\n", json!({"text": text}))).collect();
    let evaluation = run(&model, "x.jsonl", &lines, |_| {}).unwrap();
    let (mut sum, mut bytes, mut words) = (0.0, 0.0, 0.0);
    for text in texts {
        // The harness's windows of a model with 64 positions: `<|bos|>` and 64 tokens, then 64 more each, the last one
        // after as much as fits.
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

#[test]
fn words_are_pythons() {
    for (text, words) in [("", 1), (" ", 2), ("a", 1), ("a  b\nc", 3), (" a ", 3)] {
        assert_eq!(words_of(text), words, "{text:?}");
    }
}

#[test]
fn answers_are_exact_where_greedy_decoding_gives_them() {
    let model = model();
    let tokenizer = Tokenizer::bytes_chat();
    let encoder = ChatEncoder::new(ChatTemplate::of_tokenizer(&tokenizer).unwrap(), tokenizer.clone());
    let turns = |answer: &str| {
        json!({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer}]})
    };
    // Each conversation's loss by hand.
    let line = turns("yes").to_string();
    let conversation = encoder.parse(line.as_bytes()).unwrap();
    let read = encoder.weighted(&conversation).unwrap();
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
    // A greedy byte is found for what the model would say first; with it alone the end marker decides.
    let prompt = encoder.tokens(&conversation.messages()[..2], true).unwrap();
    let sampling = crate::generate::Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    let said = crate::generate::generate(&model, &prompt, 3, sampling, &[], |_| {}).unwrap().tokens;
    let scored = score_batch(&model, &[&[&prompt[..], &said[..]].concat()]).unwrap().remove(0);
    assert!(scored[prompt.len() - 1..].iter().all(|scored| scored.greedy));
    let wrong: Vec<u32> = said.iter().map(|token| (token + 1) % 259).collect();
    let scored = score_batch(&model, &[&[&prompt[..], &wrong[..1]].concat()]).unwrap().remove(0);
    assert!(!scored[prompt.len() - 1].greedy);
    assert_eq!(value(&evaluation, "exact_match").value, 0.0);
}

#[test]
fn what_is_wrong_is_named_by_line() {
    let model = model();
    let fault = |lines: &str, change: fn(&mut Task)| {
        let error = run(&model, "x.jsonl", lines, change).unwrap_err();
        error.to_string().split("x.jsonl").last().unwrap().to_owned()
    };
    assert_eq!(fault("{}\n", |_| {}), ":1: the row has the keys of no format");
    assert_eq!(fault("{\"text\": \"a\"}\n{\"text\": 3}\n", |_| {}), ":2: the row has no `text`");
    assert_eq!(fault("{\"text\": \"a\"}\n\n{\n", |_| {}), ":3:1: the record is not JSON: EOF while parsing an object");
    assert_eq!(fault("\n", |_| {}), "` has no rows");
    assert_eq!(fault("{\"messages\": []}\n", |_| {}), ":1: the conversation has no assistant message");
    let as_arc: fn(&mut Task) = |task| task.format = Some(TaskFormat::Arc);
    assert_eq!(fault("{\"text\": \"a\"}\n", as_arc), ":1: the row has no `choices`");
    let long = json!({"instruction": "x".repeat(100), "output": "y"}).to_string();
    assert!(fault(&long, |_| {}).contains("are more than the model's context of 64"));
    assert!(fault("{\"text\": \"a\"}\n", |task| task.shots = 1).contains("examples do not go with rows of perplexity"));
}
