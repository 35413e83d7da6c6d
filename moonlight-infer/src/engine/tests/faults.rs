//! Panics and non-finite logits in a forward pass end the requests concerned, and nothing else.

use burn::tensor::Tensor;

use super::*;

/// A model that panics when it reads the last token of the vocabulary: the embedding has no row for it.
pub(super) fn panicking(seed: u64) -> CausalLm {
    let mut model = dense(seed);
    model.embed_tokens.weight = model.embed_tokens.weight.map(|weight| weight.slice_dim(0, 0..VOCAB as usize - 1));
    model
}

/// A model whose logits are NaN after the last token of the vocabulary.
pub(super) fn damaged(seed: u64) -> CausalLm {
    let mut model = dense(seed);
    model.embed_tokens.weight = model.embed_tokens.weight.map(|weight| {
        let [rows, width] = weight.dims();
        let damaged = Tensor::full([1, width], f32::NAN, &weight.device());
        weight.slice_assign([rows - 1..rows, 0..width], damaged)
    });
    model
}

/// Never generates the last token of the vocabulary.
fn without_last(request: Request) -> Request {
    let penalties = Penalties { logit_bias: vec![(VOCAB - 1, -100.0)], ..Penalties::default() };
    Request { penalties, ..request }
}

fn good(seed: u32) -> Request {
    let prompt = prompt(20, seed).into_iter().map(|token| token % (VOCAB - 1)).collect();
    without_last(Request::new("model", prompt, 12))
}

fn poisoned() -> Request {
    let mut request = good(9);
    request.prompt[17] = VOCAB - 1;
    request
}

#[test]
fn a_panic_ends_only_the_request_that_causes_it() {
    let model = panicking(1);
    let engine = Engine::start("model", model.clone(), options(4)).unwrap();
    engine.set_model("other", dense(2)).unwrap();
    let alone: Vec<Answer> = (0..3).map(|seed| ask(&engine, good(seed))).collect();
    for round in 0..3 {
        let others: Vec<Events> = (0..3).map(|seed| engine.submit(good(seed)).unwrap()).collect();
        let other =
            engine.submit(Request { prompt_logprobs: Some(1), ..Request::new("other", prompt(20, 1), 12) }).unwrap();
        let poisoned = read(engine.submit(poisoned()).unwrap());
        assert!(matches!(poisoned.error, Some(EngineError::Panicked(_))), "{round}: {poisoned:?}");
        for (events, alone) in others.into_iter().zip(&alone) {
            assert_eq!(read(events).tokens, alone.tokens);
        }
        let other = read(other);
        assert_eq!((other.usage().new_tokens, other.prompt.unwrap().len()), (12, 20));
    }
    let status = wait_idle(&engine);
    assert_eq!((status.ended.failed, status.health), (3, Health::Ready));
}

#[test]
fn an_engine_whose_passes_all_panic_reports_it_until_one_succeeds() {
    let mut broken = dense(1);
    broken.norm.weight = broken.norm.weight.map(|weight| weight.slice_dim(0, 0..3));
    let engine = Engine::start("model", broken, options(2)).unwrap();
    let request = || Request::new("model", prompt(5, 1), 3);
    for _ in 0..3 {
        assert!(matches!(ask(&engine, request()).error, Some(EngineError::Panicked(_))));
    }
    assert_eq!(wait_idle(&engine).health, Health::Failing);
    engine.set_model("model", dense(1)).unwrap();
    assert_eq!(ask(&engine, request()).usage().new_tokens, 3);
    assert_eq!(wait_idle(&engine).health, Health::Ready);
}

#[test]
fn non_finite_logits_end_only_the_requests_that_have_them() {
    let engine = Engine::start("model", damaged(1), options(3)).unwrap();
    let alone: Vec<Answer> = (0..2).map(|seed| ask(&engine, good(seed))).collect();
    for _ in 0..3 {
        let others: Vec<Events> = (0..2).map(|seed| engine.submit(good(seed)).unwrap()).collect();
        for request in [poisoned(), Request { prompt_logprobs: Some(2), ..poisoned() }] {
            let answer = ask(&engine, request);
            assert!(matches!(answer.error, Some(EngineError::NonFinite { .. })), "{answer:?}");
            assert_eq!((answer.tokens.len(), answer.prompt), (0, None));
        }
        for (events, alone) in others.into_iter().zip(&alone) {
            assert_eq!(read(events).tokens, alone.tokens);
        }
    }
    // Prompts that are computed in one pass with a damaged one.
    for _ in 0..10 {
        let requests = [good(0), poisoned(), good(1)];
        let events: Vec<Events> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
        let [first, poisoned, second] =
            <[Answer; 3]>::try_from(events.into_iter().map(read).collect::<Vec<_>>()).unwrap();
        assert_eq!([first.tokens, second.tokens], [alone[0].tokens.clone(), alone[1].tokens.clone()]);
        assert!(matches!(poisoned.error, Some(EngineError::NonFinite { .. })), "{poisoned:?}");
    }
    // A prompt that begins like the damaged one does not use its keys and values.
    let mut request = poisoned();
    request.prompt.truncate(17);
    request.prompt.extend([1, 2]);
    assert_eq!(ask(&engine, request).usage().new_tokens, 12);
    let status = wait_idle(&engine);
    assert_eq!((status.ended.failed, status.health), (16, Health::Ready));
}
