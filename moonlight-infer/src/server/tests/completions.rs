//! `/v1/completions`.

use super::*;

#[tokio::test]
async fn an_answer_has_the_fields_of_openai() {
    let server = TestServer::new();
    let answer = server.complete(json!({})).await.json();
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(answer["model"], "tiny");
    assert!(answer["system_fingerprint"].is_string());
    let choice = &answer["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["logprobs"], Value::Null);
    assert_eq!(choice["finish_reason"], "length");
    let usage = &answer["usage"];
    let counts = ["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| usage[name].as_u64().unwrap());
    assert_eq!(counts, [4, 8, 12]);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    // The first four tokens are still in the cache; the last token of a prompt is computed always.
    let again = server.complete(json!({})).await.json();
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    assert_eq!(again["choices"], answer["choices"]);
}

#[tokio::test]
async fn a_stream_has_the_same_text_as_one_answer() {
    let server = TestServer::new();
    for seed in 0..6 {
        let more =
            json!({"temperature": 1.0, "seed": seed, "max_tokens": 40, "n": 2, "logprobs": 2, "echo": seed % 2 == 0});
        let whole = server.complete(more.clone()).await.json();
        let mut streamed = more.clone();
        streamed["stream"] = true.into();
        streamed["stream_options"] = json!({"include_usage": true});
        let events = server.complete(streamed).await.events();
        let (last, chunks) = events.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
        for index in 0..2 {
            let of_choice = chunks.iter().map(|chunk| {
                assert_eq!(chunk["usage"], Value::Null);
                &chunk["choices"][0]
            });
            let of_choice: Vec<&Value> = of_choice.filter(|choice| choice["index"] == index).collect();
            let text: String = of_choice.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
            let expected = &whole["choices"][index];
            assert_eq!(text, expected["text"].as_str().unwrap());
            assert_eq!(of_choice.last().unwrap()["finish_reason"], expected["finish_reason"]);
            for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
                let items = of_choice.iter().filter_map(|choice| choice["logprobs"][list].as_array()).flatten();
                let items: Vec<&Value> = items.collect();
                let expected: Vec<&Value> = expected["logprobs"][list].as_array().unwrap().iter().collect();
                match list {
                    // The passes of the two requests may have had other rows, which changes the last bits.
                    "token_logprobs" => {
                        let close = |(a, b): (&&Value, &&Value)| match (a.as_f64(), b.as_f64()) {
                            (Some(a), Some(b)) => (a - b).abs() < 1e-4,
                            (a, b) => a == b,
                        };
                        assert!(items.len() == expected.len() && items.iter().zip(&expected).all(close));
                    }
                    "top_logprobs" => assert_eq!(items.len(), expected.len()),
                    _ => assert_eq!(items, expected, "{list}"),
                }
            }
        }
        assert_ne!(whole["choices"][0]["text"], whole["choices"][1]["text"], "each answer has its own seed");
    }
}

#[tokio::test]
async fn prompts_are_texts_or_tokens_one_or_many() {
    let server = TestServer::new();
    let text = server.complete(json!({"prompt": "Hi"})).await.json()["choices"][0]["text"].clone();
    let tokens = json!([72, 105]);
    for (prompt, count) in
        [(tokens.clone(), 1), (json!([tokens, tokens, tokens]), 3), (json!(["Hi", "Hi"]), 2), (json!(["Hi"]), 1)]
    {
        let answer = server.complete(json!({"prompt": prompt})).await.json();
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), count);
        assert_eq!(answer["usage"]["prompt_tokens"], 2 * count);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!((&choice["text"], choice["index"].as_u64()), (&text, Some(index as u64)));
        }
    }
    // Far more than slots and queue have room for.
    let many: Vec<&str> = vec!["Hi"; 40];
    let answer = server.complete(json!({"prompt": many, "max_tokens": 2})).await.json();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 40);
}

/// The requests of lm-evaluation-harness for log-likelihoods.
#[tokio::test]
async fn echo_returns_the_log_probabilities_of_the_prompt() {
    let server = TestServer::new();
    for (prompt, max_tokens) in [(json!("Héy"), 1), (json!([72, 195, 169, 121]), 1), (json!([[72, 195, 169, 121]]), 0)]
    {
        let more = json!({"prompt": prompt, "max_tokens": max_tokens, "echo": true, "logprobs": 1, "seed": 1234});
        let answer = server.complete(more).await.json();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "length");
        let logprobs = &choice["logprobs"];
        let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
        let lengths = lists.map(|list| logprobs[list].as_array().unwrap().len());
        assert_eq!(lengths, [4 + max_tokens; 4]);
        assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
        assert_eq!(logprobs["text_offset"].as_array().unwrap()[..4], [json!(0), json!(1), json!(1), json!(2)]);
        assert!(choice["text"].as_str().unwrap().starts_with("Héy"));
        for index in 1..4 {
            let value = logprobs["token_logprobs"][index].as_f64().unwrap();
            let top = logprobs["top_logprobs"][index].as_object().unwrap();
            let best = top.values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
            // The harness calls a token greedy if the two are equal.
            assert!(value < 0.0 && value <= best && top.len() == 1);
        }
    }
    // A special token in a prompt is a part of its text.
    let request = json!({"prompt": "a<|im_end|>b", "max_tokens": 0, "echo": true, "logprobs": 0});
    let logprobs = &server.complete(request).await.json()["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "<|im_end|>", "b"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 11]));
    // They are those of the model.
    let answer =
        server.complete(json!({"prompt": [72, 105], "max_tokens": 0, "echo": true, "logprobs": 0})).await.json();
    let found = answer["choices"][0]["logprobs"]["token_logprobs"][1].as_f64().unwrap();
    let expected = crate::score::score(&random_model(), &[72, 105]).unwrap();
    let expected = f64::from(expected[1].unwrap());
    assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    assert_eq!(
        server.complete(json!({"prompt": "Hi", "echo": true, "max_tokens": 0})).await.json()["choices"][0]["text"],
        "Hi"
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() {
    let words = ["One", " tw", "o thr", "ee", " four"];
    let server = scripted::server("{{ messages }}", &words);
    for stream in [false, true] {
        for (stop, expected, finish, new) in [
            (json!("two"), "One ", "stop", 3),
            (json!(["three", "o t"]), "One tw", "stop", 3),
            (json!(" five"), "One two three four", "stop", 5),
            (json!("One"), "", "stop", 1),
        ] {
            let more = json!({"prompt": "x", "stop": stop, "stream": stream, "max_tokens": 20});
            let answer = server.complete(more).await;
            if stream {
                let events = answer.events();
                let pieces: Vec<&str> =
                    events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
                assert_eq!(pieces.concat(), expected);
                assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], finish);
            } else {
                let answer = answer.json();
                assert_eq!(answer["choices"][0]["text"], expected);
                assert_eq!(answer["choices"][0]["finish_reason"], finish);
                assert_eq!(answer["usage"]["completion_tokens"], new);
            }
        }
    }
    // Their slots are free again.
    for _ in 0..200 {
        if server.engine.status().busy == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // They count as complete: by the stop string, or by the engine if it was faster.
    let status = server.engine.status();
    assert_eq!((status.busy, status.ended.cancelled, status.ended.length), (0, 0, 0));
}

#[tokio::test]
async fn biases_and_penalties_change_the_tokens() {
    let server = TestServer::new();
    let biased = server.complete(json!({"logit_bias": {"65": 100}, "max_tokens": 4})).await.json();
    assert_eq!(biased["choices"][0]["text"], "AAAA");
    let banned = json!({"logit_bias": {"65": 100, "66": 99}, "frequency_penalty": 2, "max_tokens": 16});
    let text = server.complete(banned).await.json()["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.contains('A') && text.contains('B') && text.chars().all(|letter| "AB".contains(letter)), "{text}");
}

#[tokio::test]
async fn a_full_queue_is_reported() {
    let server = TestServer::new();
    // Two slots and four places; the texts are long, because nothing ends them.
    let long = || server.complete(json!({"max_tokens": 180, "ignore_eos": true, "prompt": "abc"}));
    let answers = futures_util::future::join_all((0..12).map(|_| long())).await;
    let refused: Vec<&Answer> = answers.iter().filter(|answer| answer.status.as_u16() == 429).collect();
    assert!(!refused.is_empty() && answers.iter().filter(|answer| answer.status.is_success()).count() >= 6);
    assert_eq!(refused[0].headers["retry-after"], "1");
    assert_eq!(refused[0].json()["error"]["type"], "rate_limit_error");
}
