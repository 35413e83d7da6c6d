//! Limits on the queue, on time, on memory, and the end of an engine.

use super::*;

fn slow_request() -> Request {
    Request::new("model", prompt(4, 1), CONTEXT)
}

/// Requests that hold all slots of an engine until they are dropped: the model is large enough for them to take long.
fn busy_engine(options: EngineOptions) -> (Engine, Vec<Events>) {
    let mut config = ModelConfig::preset("bench-small").unwrap();
    config.num_hidden_layers = 1;
    let model = config.init(&Device::flex());
    let options = EngineOptions { context: 4096, ..options };
    let engine = Engine::start("model", model, options).unwrap();
    let events = (0..options.slots)
        .map(|slot| engine.submit(Request::new("model", vec![slot as u32 + 1, 2, 3], 4000)).unwrap())
        .collect();
    wait_until(&engine, |status| status.busy == options.slots);
    (engine, events)
}

#[test]
fn a_full_queue_refuses_and_a_cancelled_request_makes_room() {
    let (engine, mut running) = busy_engine(EngineOptions { max_waiting: 2, ..options(2) });
    let mut waiting: Vec<Events> = (0..2).map(|_| engine.submit(slow_request()).unwrap()).collect();
    let refused = engine.submit(slow_request()).unwrap_err();
    assert_eq!(refused, EngineError::QueueFull { waiting: 2 });
    assert_eq!((engine.status().waiting, engine.status().refused), (2, 1));
    // One that waits goes away, then one that runs.
    drop(waiting.pop());
    wait_until(&engine, |status| status.waiting == 1 && status.ended.cancelled == 1);
    let more = engine.submit(slow_request()).unwrap();
    assert!(engine.submit(slow_request()).is_err());
    drop(running.pop());
    let status = wait_until(&engine, |status| status.ended.length == 2);
    assert_eq!(status.ended.cancelled, 2);
    for events in waiting.into_iter().chain([more]) {
        assert_eq!(read(events).usage().new_tokens, CONTEXT);
    }
    drop(running);
    let status = wait_idle(&engine);
    assert_eq!(status.ended, EndCounts { length: 2, cancelled: 3, ..EndCounts::default() });
}

#[test]
fn a_complete_text_is_not_a_cancelled_request() {
    let (engine, mut running) = busy_engine(options(2));
    let mut events = running.remove(0);
    events.blocking_next().unwrap();
    events.complete();
    drop(running);
    let status = wait_idle(&engine);
    assert_eq!(status.ended, EndCounts { interrupted: 1, cancelled: 1, ..EndCounts::default() });
}

#[test]
fn a_request_ends_after_its_time_running_or_waiting() {
    let limit = Duration::from_millis(150);
    let (engine, running) = busy_engine(EngineOptions { max_time: Some(limit), ..options(1) });
    let waiting = engine.submit(slow_request()).unwrap();
    let start = Instant::now();
    for events in running.into_iter().chain([waiting]) {
        assert_eq!(read(events).error, Some(EngineError::OutOfTime { limit }));
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(wait_idle(&engine).ended.out_of_time, 2);
    // The next one has its own time.
    assert_eq!(ask(&engine, Request::new("model", vec![1], 2)).usage().new_tokens, 2);
}

#[test]
fn shutting_down_finishes_what_was_accepted() {
    let engine = Engine::start("model", dense(1), options(2)).unwrap();
    let accepted: Vec<Events> = (0..6).map(|_| engine.submit(slow_request()).unwrap()).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let other = engine.clone();
    runtime.block_on(async { tokio::join!(engine.shut_down(), other.shut_down()) });
    assert_eq!(engine.status().health, Health::Stopped);
    assert_eq!(engine.submit(slow_request()).unwrap_err(), EngineError::UnknownModel("model".into()));
    for events in accepted {
        assert_eq!(read(events).usage().new_tokens, CONTEXT + 1 - 4);
    }
    runtime.block_on(engine.shut_down()); // a second time
}

#[test]
fn an_engine_that_shuts_down_takes_nothing_new() {
    let (engine, running) = busy_engine(options(1));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let closing = runtime.block_on(async { tokio::time::timeout(Duration::from_millis(20), engine.shut_down()).await });
    assert!(closing.is_err(), "a request still runs");
    assert_eq!(engine.submit(slow_request()).unwrap_err(), EngineError::ShuttingDown);
    assert_eq!(engine.status().health, Health::ShuttingDown);
    drop(running);
    runtime.block_on(engine.shut_down());
    assert_eq!(engine.status().health, Health::Stopped);
}

#[test]
fn a_dropped_engine_finishes_what_runs() {
    let model = dense(1);
    let engine = Engine::start("model", model.clone(), options(1)).unwrap();
    let events: Vec<Events> = (0..3).map(|_| engine.submit(slow_request()).unwrap()).collect();
    drop(engine);
    for events in events {
        check(&model, &slow_request(), &read(events));
    }
}

#[test]
fn a_slow_reader_holds_up_nothing() {
    let engine = Engine::start("model", dense(1), options(1)).unwrap();
    let unread = engine.submit(slow_request()).unwrap();
    // It ends although nothing is read, and its slot is free for others.
    for _ in 0..3 {
        assert!(ask(&engine, slow_request()).end.is_some());
    }
    assert_eq!(read(unread).usage().new_tokens, CONTEXT + 1 - 4);
}

#[test]
fn invalid_requests_are_refused() {
    let engine = Engine::start("model", dense(1), options(1)).unwrap();
    let valid = slow_request();
    let refuse = |request: Request| engine.submit(request).unwrap_err();
    let long = |count| vec![1; count];
    assert_eq!(refuse(Request { model: "other".into(), ..valid.clone() }), EngineError::UnknownModel("other".into()));
    assert_eq!(refuse(Request::new("model", vec![], 3)), EngineError::EmptyPrompt);
    let too_long = EngineError::PromptTooLong { tokens: CONTEXT + 1, context: CONTEXT };
    assert_eq!(refuse(Request::new("model", long(CONTEXT + 1), 3)), too_long);
    let unknown = EngineError::UnknownToken { token: VOCAB, vocab_size: VOCAB as usize };
    assert_eq!(refuse(Request::new("model", vec![VOCAB], 3)), unknown);
    let sampling = |temperature, top_p| Sampling { temperature, top_p, ..Sampling::default() };
    for invalid in [
        Request { sampling: sampling(-0.1, 1.0), ..valid.clone() },
        Request { sampling: sampling(f64::NAN, 1.0), ..valid.clone() },
        Request { sampling: sampling(f64::INFINITY, 1.0), ..valid.clone() },
        Request { sampling: sampling(1.0, 1.5), ..valid.clone() },
        Request { sampling: sampling(1.0, f64::NAN), ..valid.clone() },
        Request { logprobs: Some(21), ..valid.clone() },
        Request { prompt_logprobs: Some(usize::MAX), ..valid.clone() },
        Request { penalties: Penalties { presence: 3.0, ..Penalties::default() }, ..valid.clone() },
        Request { stop_tokens: vec![0; 1000], ..valid.clone() },
    ] {
        assert!(matches!(refuse(invalid.clone()), EngineError::OutOfRange { .. }), "{invalid:?}");
    }
    assert_eq!(engine.status().refused, 13);
    // At the limits.
    let full = ask(&engine, Request::new("model", long(CONTEXT), usize::MAX));
    assert_eq!(full.usage().new_tokens, 1);
    assert_eq!(ask(&engine, Request::new("model", vec![1], usize::MAX)).usage().new_tokens, CONTEXT);
    let empty = ask(&engine, Request::new("model", long(CONTEXT + 1), 0));
    assert_eq!((empty.usage().new_tokens, empty.tokens), (0, vec![]));
}

#[test]
fn impossible_options_are_refused() {
    let start = |options| Engine::start("model", dense(1), options).unwrap_err();
    assert!(matches!(start(options(0)), EngineError::Options(_)));
    let huge = EngineOptions { slots: usize::MAX / 2, prefill_chunk: usize::MAX, ..options(1) };
    assert!(matches!(start(huge), EngineError::Options(_)));
}

/// Memory of the process in KiB.
#[cfg(target_os = "linux")]
fn resident() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_flat_over_two_thousand_requests() {
    let engine = Engine::start("model", dense(1), options(4)).unwrap();
    let run = |count: u32| {
        for first in (0..count).step_by(8) {
            let events: Vec<Events> = (first..first + 8)
                .map(|index| {
                    let request = Request::new("model", prompt(1 + index as usize % 30, index), index as usize % 5);
                    let logprobs = (index % 3 == 0).then_some(5);
                    engine.submit(Request { logprobs, prompt_logprobs: logprobs, ..request }).unwrap()
                })
                .collect();
            // Some clients go away.
            let read_all = events.into_iter().enumerate().filter(|(index, _)| index % 5 != 4);
            read_all.for_each(|(_, events)| assert!(read(events).end.is_some()));
        }
    };
    run(400);
    let before = resident();
    run(2000);
    let grown = resident() - before;
    println!("{grown} KiB more after 2000 requests");
    // Other tests of this process run at the same time, so this only finds a leak of a few KiB in each request.
    assert!(grown < 64 << 10, "{grown} KiB more after 2000 requests");
}
