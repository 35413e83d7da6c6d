//! Several models over one cache, and models that are replaced while requests run.

use std::sync::Weak;

use super::*;
use crate::engine::model_version::ModelVersion;

fn version(engine: &Engine, name: &str) -> Weak<ModelVersion> {
    Arc::downgrade(&engine.handle.shared.lock().models[name])
}

#[test]
fn several_models_run_next_to_each_other() {
    for make in [dense, latent] {
        let models: Vec<CausalLm> = (1..4).map(make).collect();
        let names = ["a", "b", "c"];
        let engine = Engine::start(names[0], models[0].clone(), options(4)).unwrap();
        engine.set_model(names[1], models[1].clone()).unwrap();
        engine.set_model(names[2], models[2].clone()).unwrap();
        assert_eq!(engine.models(), names);
        let request = |index: usize| Request::new(names[index % 3], prompt(12, 1 + index as u32 % 2), 10);
        let events: Vec<Events> = (0..12).map(|index| engine.submit(request(index)).unwrap()).collect();
        for (index, events) in events.into_iter().enumerate() {
            check(&models[index % 3], &request(index), &read(events));
        }
    }
}

#[test]
fn a_replaced_model_finishes_its_requests_and_is_freed() {
    for make in [dense, latent] {
        let (old, new) = (make(1), make(2));
        let engine = Engine::start("model", old.clone(), options(2)).unwrap();
        let request = Request::new("model", prompt(10, 1), 30);
        let mut running = engine.submit(request.clone()).unwrap();
        let mut answer = Answer::default();
        answer.add(running.blocking_next().unwrap());
        let first = version(&engine, "model");
        engine.set_model("model", new.clone()).unwrap();
        // A later request has the same prompt and none of the old keys and values.
        let later = ask(&engine, request.clone());
        assert_eq!(later.usage().reused_tokens, 0);
        check(&new, &request, &later);
        while let Some(event) = running.blocking_next() {
            answer.add(event);
        }
        check(&old, &request, &answer);
        wait_idle(&engine);
        assert_eq!(first.strong_count(), 0, "the old version is freed");
        // Its slots have tokens that no request can use.
        assert_eq!(ask(&engine, request).usage().reused_tokens, 9);
    }
}

#[test]
fn a_removed_model_finishes_its_requests() {
    let models = [dense(1), dense(2)];
    let engine = Engine::start("base", models[0].clone(), options(2)).unwrap();
    engine.set_model("other", models[1].clone()).unwrap();
    let request = Request::new("other", prompt(10, 1), 30);
    let events = engine.submit(request.clone()).unwrap();
    engine.remove_model("other").unwrap();
    assert_eq!(engine.remove_model("other"), Err(EngineError::UnknownModel("other".into())));
    assert_eq!(engine.submit(request.clone()).unwrap_err(), EngineError::UnknownModel("other".into()));
    assert_eq!(engine.models(), ["base"]);
    check(&models[1], &request, &read(events));
}

#[test]
fn a_model_that_does_not_fit_the_cache_is_refused() {
    let engine = Engine::start("base", dense(1), options(1)).unwrap();
    let error = engine.set_model("other", latent(1)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model `other` does not fit the engine: it caches 1 x 12 values for each token and layer, not 2 x 16 values"
    );
    let mut config = dense(1).config().clone();
    config.num_hidden_layers = 3;
    let error = engine.set_model("deep", config.init(&Device::flex())).unwrap_err();
    assert_eq!(error.to_string(), "model `deep` does not fit the engine: it has 3 layers, not 2");
    assert_eq!(engine.models(), ["base"]);
}

/// A model of an engine with a shorter context than the first.
#[test]
fn each_model_has_its_own_context() {
    let engine = Engine::start("base", dense(1), options(1)).unwrap();
    let mut config = dense(1).config().clone();
    config.max_position_embeddings = 20;
    engine.set_model("short", config.init(&Device::flex())).unwrap();
    let error = engine.submit(Request::new("short", prompt(21, 1), 3)).unwrap_err();
    assert_eq!(error, EngineError::PromptTooLong { tokens: 21, context: 20 });
    assert_eq!(ask(&engine, Request::new("short", prompt(5, 1), 99)).usage().new_tokens, 16);
    assert_eq!(ask(&engine, Request::new("base", prompt(5, 1), 99)).usage().new_tokens, CONTEXT - 4);
}
