//! Tokens that were computed are used again.

use super::*;

fn scored(prompt: Vec<u32>, count: usize) -> Request {
    Request { logprobs: Some(3), ..Request::new("model", prompt, count) }
}

#[test]
fn a_conversation_computes_only_its_new_tokens() {
    for make in [dense, latent] {
        let model = make(1);
        let engine = Engine::start("model", model.clone(), options(2)).unwrap();
        let mut text = prompt(8, 1);
        let mut known = 0;
        for turn in 0..3 {
            let request = scored(text.clone(), 5);
            let answer = ask(&engine, request.clone());
            assert_eq!(answer.usage().reused_tokens, known, "turn {turn}");
            check(&model, &request, &answer);
            // The last token of an answer was not read, so it is computed with the next message.
            known = text.len() + answer.tokens.len() - 1;
            text.extend(answer.tokens);
            text.extend(prompt(3, 5 + turn));
        }
        let status = wait_idle(&engine);
        assert_eq!(status.prompt_tokens_reused, 12 + 20);
        assert_eq!(status.prompt_tokens_computed, 8 + 4 + 4);
        assert_eq!(status.tokens_generated, 15);
    }
}

#[test]
fn answers_to_one_prompt_share_its_prefill() {
    for make in [dense, latent] {
        let model = make(1);
        // The prompt takes several iterations, so that the others wait for it.
        let engine = Engine::start("model", model.clone(), EngineOptions { prefill_chunk: 8, ..options(4) }).unwrap();
        let request = |seed| Request {
            sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() },
            ..scored(prompt(40, 1), 6)
        };
        let events: Vec<Events> = (0..4).map(|seed| engine.submit(request(seed)).unwrap()).collect();
        let answers: Vec<Answer> = events.into_iter().map(read).collect();
        for (seed, answer) in answers.iter().enumerate() {
            check(&model, &request(seed as u64), answer);
        }
        let reused: Vec<usize> = answers.iter().map(|answer| answer.usage().reused_tokens).collect();
        assert_eq!(reused, [0, 39, 39, 39]);
        let status = wait_idle(&engine);
        assert_eq!((status.prompt_tokens_computed, status.prompt_tokens_reused), (40 + 3, 3 * 39));
    }
}

/// Whether rows stay in their slot or are copied to another, the continuation has the same bits.
#[test]
fn a_copied_prefix_gives_the_bits_of_one_that_stayed() {
    for make in [dense, latent] {
        let model = make(1);
        let first = || scored(prompt(24, 1), 1);
        let second: Vec<u32> = prompt(24, 1).into_iter().chain(prompt(6, 9)).collect();
        let stayed = Engine::start("model", model.clone(), options(1)).unwrap();
        ask(&stayed, first());
        let stayed = ask(&stayed, scored(second.clone(), 8));
        // Here a longer text keeps the slot, because less than half of it would be kept, and the prefix is copied to an empty one.
        let copied = Engine::start("model", model.clone(), options(2)).unwrap();
        let mut long = prompt(24, 1);
        let answer = ask(&copied, scored(long.clone(), 24));
        long.extend(answer.tokens);
        let half: Vec<u32> = long[..20].iter().copied().chain(prompt(6, 9)).collect();
        let copied = ask(&copied, scored(half.clone(), 8));
        assert_eq!(copied.usage().reused_tokens, 20);
        check(&model, &scored(half.clone(), 8), &copied);
        // The same with the text alone in its slot.
        let alone = Engine::start("model", model.clone(), options(1)).unwrap();
        ask(&alone, scored(long[..24].to_vec(), 24));
        let alone = ask(&alone, scored(half, 8));
        assert_eq!(alone, copied);
        check(&model, &scored(second, 8), &stayed);
        assert_eq!(stayed.usage().reused_tokens, 24);
    }
}

#[test]
fn a_text_that_was_cut_off_is_used_as_far_as_it_was_computed() {
    let model = dense(1);
    let engine = Engine::start("model", model.clone(), options(1)).unwrap();
    let mut events = engine.submit(scored(prompt(20, 1), 25)).unwrap();
    events.blocking_next().unwrap();
    drop(events);
    wait_idle(&engine);
    let request = scored(prompt(20, 1), 3);
    let answer = ask(&engine, request.clone());
    assert_eq!(answer.usage().reused_tokens, 19);
    check(&model, &request, &answer);
}
