//! Requests that come, go and are read in any order have the tokens that each would have alone.

use proptest::prelude::*;

use super::*;

/// What a client does.
#[derive(Debug, Clone)]
enum Action {
    /// Submits a request for a model.
    Submit { model: usize, request: Request },
    /// Drops the events of a request.
    Cancel(usize),
    /// Waits for some events of a request.
    Read { request: usize, events: usize },
    /// Replaces a model by another one.
    Replace(usize),
    /// Lets the engine work.
    Sleep,
}

fn request() -> impl Strategy<Value = Request> {
    // Few different beginnings, so that prompts share prefixes of many lengths.
    let prompts = (0..CONTEXT, 0..3u32, 0..6usize, 0..VOCAB).prop_map(|(length, seed, extra, token)| {
        let mut prompt = prompt(length, seed);
        prompt.extend((0..extra as u32).map(|index| (token + index * index) % VOCAB));
        prompt.truncate(CONTEXT);
        if prompt.is_empty() { vec![token] } else { prompt }
    });
    let sampling = prop_oneof![
        Just(Sampling::default()),
        (any::<u64>(), 0..5usize, 0.5..1.0f64).prop_map(|(seed, top_k, top_p)| Sampling {
            temperature: 1.0,
            top_k,
            top_p,
            seed
        }),
    ];
    let stops = prop::collection::vec(0..VOCAB, 0..3);
    (prompts, 0..12usize, sampling, stops, any::<bool>(), prop::option::of(0..4usize), prop::option::of(0..4usize))
        .prop_map(|(prompt, max_new_tokens, sampling, stop_tokens, ignore_eos, logprobs, prompt_logprobs)| Request {
            sampling,
            stop_tokens,
            ignore_eos,
            logprobs,
            prompt_logprobs: prompt_logprobs.filter(|&count| count == 1), // rarely
            ..Request::new("", prompt, max_new_tokens)
        })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => (0..2usize, request()).prop_map(|(model, request)| Action::Submit { model, request }),
        1 => any::<prop::sample::Index>().prop_map(|index| Action::Cancel(index.index(1000))),
        3 => (any::<prop::sample::Index>(), 1..6usize)
            .prop_map(|(index, events)| Action::Read { request: index.index(1000), events }),
        1 => (0..2usize).prop_map(Action::Replace),
        1 => Just(Action::Sleep),
    ]
}

/// A request of a schedule.
struct Submitted {
    request: Request,
    model: CausalLm,
    /// `None` after it was dropped.
    events: Option<Events>,
    answer: Answer,
}

/// Runs a schedule with models that fail when they read the token `fault`.
fn run_schedule(make: fn(u64) -> CausalLm, fault: Option<u32>, slots: usize, chunk: usize, actions: Vec<Action>) {
    let mut models = [make(1), make(2)];
    let names = ["first", "second"];
    let options = EngineOptions { prefill_chunk: slots + chunk, max_waiting: 1000, ..options(slots) };
    let engine = Engine::start(names[0], models[0].clone(), options).unwrap();
    engine.set_model(names[1], models[1].clone()).unwrap();
    let mut submitted: Vec<Submitted> = Vec::new();
    let mut replaced = 0;
    for action in actions {
        let count = submitted.len();
        match action {
            Action::Submit { model, request } => {
                let request = Request { model: names[model].into(), ..request };
                let events = Some(engine.submit(request.clone()).unwrap());
                let model = models[model].clone();
                submitted.push(Submitted { request, model, events, answer: Answer::default() });
            }
            Action::Cancel(index) if count > 0 => submitted[index % count].events = None,
            Action::Read { request, events } if count > 0 => {
                let Submitted { events: Some(receiver), answer, .. } = &mut submitted[request % count] else {
                    continue;
                };
                for _ in 0..events {
                    let Some(event) = receiver.blocking_next() else { break };
                    answer.add(event);
                }
            }
            Action::Replace(model) => {
                replaced += 1;
                models[model] = make(2 + replaced);
                engine.set_model(names[model], models[model].clone()).unwrap();
            }
            Action::Sleep => std::thread::sleep(Duration::from_millis(3)),
            Action::Cancel(_) | Action::Read { .. } => {}
        }
    }
    let (mut finished, count) = (0, submitted.len());
    for Submitted { request, model, events, mut answer } in submitted.drain(..) {
        let Some(mut events) = events else { continue };
        while let Some(event) = events.blocking_next() {
            answer.add(event);
        }
        check_all(&model, &request, &answer, fault);
        finished += 1;
    }
    let status = wait_idle(&engine);
    let EndCounts { eos, length, interrupted, cancelled, out_of_time, failed } = status.ended;
    assert!(eos + length + failed >= finished && out_of_time + interrupted == 0, "{status:?}");
    assert!(failed == 0 || fault.is_some(), "{status:?}");
    assert!(status.cached_tokens <= status.cache_capacity);
    // A request may end before it is cancelled.
    assert_eq!(eos + length + failed + cancelled, count as u64);
    assert_eq!(engine.handle.shared.lock().in_flight, 0);
}

/// [`check`], and the log-probabilities of the prompt.
fn check_all(model: &CausalLm, request: &Request, answer: &Answer, fault: Option<u32>) {
    assert!(answer.prompt.is_some() == request.prompt_logprobs.is_some() || answer.error.is_some());
    if let Some(scores) = &answer.prompt {
        // With a fault in the last token, which is predicted and not read, only those before it are compared.
        let readable = request.prompt.iter().position(|token| Some(*token) == fault).unwrap_or(CONTEXT);
        let expected = crate::score(model, &request.prompt[..request.prompt.len().min(readable)]).unwrap();
        let scores = &scores[..if readable < CONTEXT { expected.len() } else { scores.len() }];
        assert_eq!(scores.len(), expected.len());
        for (found, expected) in scores.iter().zip(expected) {
            let found = found.as_ref().map(|scores| scores.logprob);
            assert!(found.zip(expected).is_none_or(|(a, b)| (a - b).abs() < 2e-5), "{found:?} {expected:?}");
            assert_eq!(found.is_some(), expected.is_some());
        }
    }
    check_with_fault(model, request, answer, fault);
}

/// `PROPTEST_CASES` sets the number of schedules. They are not stored, because the same schedule may run differently the next time.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { 24 };
    ProptestConfig { cases, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_schedule_gives_the_tokens_of_each_request_alone(
        is_latent in any::<bool>(),
        slots in 1..6usize,
        chunk in 0..40usize,
        actions in prop::collection::vec(action(), 1..40),
    ) {
        run_schedule(if is_latent { latent } else { dense }, None, slots, chunk, actions);
    }

    /// Many prompts have the token that panics or damages the logits, and many texts generate it.
    #[test]
    fn faults_in_any_schedule_end_only_the_requests_that_cause_them(
        panics in any::<bool>(),
        slots in 1..6usize,
        chunk in 0..40usize,
        actions in prop::collection::vec(action(), 1..40),
    ) {
        // A request that causes a panic and is cancelled before it runs alone would count against the others.
        let actions = actions.into_iter().filter(|action| !panics || !matches!(action, Action::Cancel(_))).collect();
        let make = if panics { super::faults::panicking } else { super::faults::damaged };
        run_schedule(make, Some(VOCAB - 1), slots, chunk, actions);
    }
}

/// Everything at once: one slot after the other is taken, cancelled and taken again while prompts that share beginnings wait for each
/// other.
#[test]
fn waiting_for_a_cancelled_prefix_does_not_stall() {
    for make in [dense, latent] {
        let model = make(3);
        let options = EngineOptions { prefill_chunk: 4, ..options(4) };
        let engine = Engine::start("model", model.clone(), options).unwrap();
        for round in 0..20 {
            let long = prompt(CONTEXT - 4, round % 5);
            let request = Request::new("model", long, 3);
            // The others wait for the first, which goes away.
            let mut all: Vec<Events> = (0..6).map(|_| engine.submit(request.clone()).unwrap()).collect();
            if round % 2 == 0 {
                std::thread::sleep(Duration::from_micros(u64::from(round) * 200));
            }
            drop(all.remove(0));
            drop(all.remove(2));
            for events in all {
                check(&model, &request, &read(events));
            }
        }
        wait_idle(&engine);
    }
}

/// Logits depend on the other rows of a pass by rounding only.
#[test]
fn eight_sequences_have_the_tokens_of_each_alone() {
    for make in [dense, latent, wide] {
        let model = make(4);
        // Prompts of one token, so that no pass has more than eight tokens.
        let requests: Vec<Request> = (0..8)
            .map(|index| Request {
                logprobs: Some(5),
                sampling: Sampling { temperature: 1.0, seed: index, ..Sampling::default() },
                ..Request::new("model", vec![index as u32], 20 + index as usize)
            })
            .collect();
        let alone = Engine::start("model", model.clone(), options(1)).unwrap();
        let alone: Vec<Answer> = requests.iter().map(|request| ask(&alone, request.clone())).collect();
        let together = Engine::start("model", model, options(8)).unwrap();
        let events: Vec<Events> = requests.iter().map(|request| together.submit(request.clone()).unwrap()).collect();
        let together: Vec<Answer> = events.into_iter().map(read).collect();
        for (alone, together) in alone.iter().zip(&together) {
            assert_eq!(alone.tokens, together.tokens);
            for (alone, together) in alone.logprobs.iter().zip(&together.logprobs) {
                assert!((alone.logprob - together.logprob).abs() < 1e-4, "{alone:?} {together:?}");
            }
        }
    }
}
