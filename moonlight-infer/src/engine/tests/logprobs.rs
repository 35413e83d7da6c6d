//! Log-probabilities of prompts and new tokens.

use super::*;
use crate::score::score;

fn close(found: &[Option<TokenLogprobs>], expected: &[Option<f32>]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let found = found.as_ref().map(|scores| scores.logprob);
        let differs = found.zip(*expected).is_some_and(|(a, b)| (a - b).abs() > 2e-5);
        assert!(!differs && found.is_some() == expected.is_some(), "{found:?} {expected:?}");
    }
}

#[test]
fn a_prompt_is_scored_as_by_score_even_after_its_prefix_was_computed() {
    for make in [dense, latent] {
        let model = make(5);
        let engine = Engine::start("model", model.clone(), options(2)).unwrap();
        let text = prompt(40, 3);
        let expected = score(&model, &text).unwrap();
        for (count, max_new_tokens) in [(0, 0), (3, 1), (20, 4), (2, 0)] {
            // Computed before, so that there is a prefix that must not be used.
            ask(&engine, Request::new("model", text[..30].to_vec(), 2));
            let request = Request {
                prompt_logprobs: Some(count),
                logprobs: Some(count),
                ..Request::new("model", text.clone(), max_new_tokens)
            };
            let answer = ask(&engine, request.clone());
            let scores = answer.prompt.as_ref().unwrap();
            close(scores, &expected);
            assert_eq!(answer.usage().reused_tokens, 0);
            for (scores, token) in scores.iter().zip(&text).skip(1) {
                let scores = scores.as_ref().unwrap();
                assert_eq!((scores.token, scores.top.len()), (*token, count));
                assert!(scores.top.is_sorted_by(|a, b| a.1 >= b.1));
                let among = scores.top.iter().find(|(other, _)| other == token);
                assert!(among.is_none_or(|(_, logprob)| *logprob == scores.logprob));
                assert!(scores.top.last().is_none_or(|last| among.is_some() || last.1 >= scores.logprob));
            }
            check(&model, &request, &answer);
            // The scores of the continuation are those of the text with it, too.
            let whole: Vec<u32> = text.iter().chain(&answer.tokens).copied().collect();
            let all: Vec<_> = scores.iter().cloned().chain(answer.logprobs.iter().cloned().map(Some)).collect();
            close(&all, &score(&model, &whole).unwrap());
        }
        // What a scored prompt computed is used by others.
        let after = ask(&engine, Request::new("model", text.clone(), 1));
        assert_eq!(after.usage().reused_tokens, 39);
    }
}

#[test]
fn a_text_of_one_token_more_than_the_context_is_scored() {
    let model = dense(5);
    let engine = Engine::start("model", model.clone(), options(1)).unwrap();
    let text = prompt(CONTEXT + 1, 2);
    let request = Request { prompt_logprobs: Some(1), ..Request::new("model", text.clone(), 0) };
    let scores = ask(&engine, request).prompt.unwrap();
    let expected = crate::score::score_batch(&model, &[&text]).unwrap().remove(0);
    close(&scores[1..], &expected.iter().map(|score| Some(score.logprob)).collect::<Vec<_>>());
    // A single token has nothing before it.
    let single = ask(&engine, Request { prompt_logprobs: Some(1), ..Request::new("model", vec![3], 0) });
    assert_eq!((single.prompt.clone(), single.usage().new_tokens), (Some(vec![None]), 0));
    let single = ask(&engine, Request { prompt_logprobs: Some(1), ..Request::new("model", vec![3], 2) });
    assert_eq!((single.prompt.clone(), single.usage().new_tokens), (Some(vec![None]), 2));
}

#[test]
fn penalties_and_temperature_do_not_change_log_probabilities() {
    let model = dense(5);
    let engine = Engine::start("model", model.clone(), options(1)).unwrap();
    let penalties =
        Penalties { presence: 1.0, frequency: 0.5, repetition: 1.3, logit_bias: vec![(7, 100.0), (9, -100.0)] };
    let sampling = Sampling { temperature: 0.5, ..Sampling::default() };
    let request = Request { penalties, sampling, logprobs: Some(2), ..Request::new("model", prompt(5, 1), 8) };
    let answer = ask(&engine, request);
    assert_eq!(answer.tokens, [7; 8], "a bias of 100 outweighs the penalties");
    let text: Vec<u32> = prompt(5, 1).into_iter().chain(answer.tokens.clone()).collect();
    let scores: Vec<_> = answer.logprobs.into_iter().map(Some).collect();
    close(&scores, &score(&model, &text).unwrap()[5..]);
}

/// With a penalty that outweighs all differences between logits, no token comes twice.
#[test]
fn presence_and_repetition_prevent_repetition() {
    let mut model = dense(5);
    model.norm.weight = model.norm.weight.map(|weight| weight * 0.1); // small logits
    let engine = Engine::start("model", model, options(1)).unwrap();
    let request = |penalties| Request { penalties, ..Request::new("model", vec![1, 2], 20) };
    let distinct = |answer: Answer| {
        let mut tokens = answer.tokens;
        tokens.sort_unstable();
        tokens.dedup();
        tokens.len()
    };
    let free = distinct(ask(&engine, request(Penalties::default())));
    let presence = distinct(ask(&engine, request(Penalties { presence: 2.0, ..Penalties::default() })));
    assert!(free < 20 && presence == 20, "{free} {presence}");
}
