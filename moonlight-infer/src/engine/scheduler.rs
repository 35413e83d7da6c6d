//! [`Scheduler`]: the loop of an engine's thread. It decides which tokens go through which model next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Tensor;
use moonlight_model::KvCache;

use super::active::{Active, AwaitedPrefix, Ending};
use super::error::EngineError;
use super::model_version::ModelVersion;
use super::pass::{PassInput, catch, pieces, run_head, run_layers};
use super::placement::{Placement, SlotView, choose_empty, choose_slot, share_budget};
use super::shared::{Job, Shared, State};
use crate::generate::StopReason;

/// After this many panics in a row an engine is [`Health::Failing`](super::Health::Failing), and a request that took part in as
/// many ends.
const MAX_PANICS: u32 = 3;

/// A sequence of the cache, and the request that has it.
#[derive(Default)]
struct Slot {
    active: Option<Active>,
    /// Of the model that computed what the cache has of the sequence.
    version: u64,
    /// The tokens of the sequence. While a request runs, some are not computed yet: those after the first `cache.lengths()[slot]`.
    tokens: Vec<u32>,
    /// When a request had it last; 0 for never.
    last_used: u64,
}

/// Makes an empty cache with this number of tokens for each slot.
pub(super) type NewCache = Box<dyn Fn(usize) -> KvCache + Send>;

/// The state of an engine's thread.
pub(super) struct Scheduler {
    shared: Arc<Shared>,
    cache: KvCache,
    new_cache: NewCache,
    slots: Vec<Slot>,
    /// The number of requests that got a slot so far.
    orders: u64,
    tokens_generated: u64,
    prompt_tokens_reused: u64,
    panics_in_a_row: u32,
}

impl Scheduler {
    pub(super) fn new(shared: Arc<Shared>, new_cache: NewCache) -> Self {
        let slots = (0..shared.options.slots).map(|_| Slot::default()).collect();
        Self {
            cache: new_cache(shared.capacity),
            shared,
            new_cache,
            slots,
            orders: 0,
            tokens_generated: 0,
            prompt_tokens_reused: 0,
            panics_in_a_row: 0,
        }
    }

    /// Runs until the engine closes and every accepted request has ended.
    pub(super) fn run(&mut self) {
        let shared = self.shared.clone();
        loop {
            if self.slots.iter().all(|slot| slot.active.is_none()) {
                let state = shared.wait_for_work();
                if state.queue.is_empty() {
                    return; // closing
                }
            }
            let start = Instant::now();
            self.end_cancelled_and_late(start);
            self.admit(start);
            self.copy_awaited();
            self.pass();
            let mut state = shared.lock();
            state.status.longest_iteration = state.status.longest_iteration.max(start.elapsed());
            self.report(&mut state);
        }
    }

    /// Ends running requests without a receiver or without time.
    fn end_cancelled_and_late(&mut self, now: Instant) {
        for index in 0..self.slots.len() {
            let Some(active) = &self.slots[index].active else { continue };
            if active.events.is_closed() {
                let ending = active.receiver_ending();
                self.end(index, ending);
            } else if active.deadline.is_some_and(|deadline| deadline <= now) {
                self.end(index, Ending::Failed(self.out_of_time()));
            }
        }
    }

    fn out_of_time(&self) -> EngineError {
        EngineError::OutOfTime { limit: self.shared.options.max_time.unwrap_or_default() }
    }

    /// Gives free slots to waiting requests, in order of arrival.
    fn admit(&mut self, now: Instant) {
        let free = self.slots.iter().filter(|slot| slot.active.is_none()).count();
        let mut state = self.shared.lock();
        // Requests that ended while they waited leave the queue wherever they are, so that they hold no place in it.
        let (mut ended, mut waiting) = (Vec::new(), VecDeque::new());
        for job in std::mem::take(&mut state.queue) {
            let ending = if job.events.is_closed() {
                job.receiver_ending()
            } else if job.deadline.is_some_and(|deadline| deadline <= now) {
                Ending::Failed(self.out_of_time())
            } else if needs_no_pass(&job) {
                Ending::Done { reason: StopReason::Length, stop_token: None }
            } else {
                waiting.push_back(job);
                continue;
            };
            count_end(&mut state, &ending);
            ended.push((job, ending));
        }
        let admitted: Vec<Job> = waiting.drain(..free.min(waiting.len())).collect();
        state.queue = waiting;
        state.status.busy += admitted.len();
        let current: Vec<u64> = state.models.values().map(|model| model.id).collect();
        drop(state);
        ended.into_iter().for_each(|(job, ending)| Active::new(job, 0).0.finish(ending));
        // Without the lock, because a prefix may be copied.
        admitted.into_iter().for_each(|job| self.place(job, &current));
    }

    /// Gives a free slot to a request; there must be one. `current` has the versions of models that later requests may use.
    fn place(&mut self, job: Job, current: &[u64]) {
        self.orders += 1;
        let version = job.version.id;
        let slots = self.slots.iter().zip(self.cache.lengths());
        let views: Vec<SlotView<'_>> = slots
            .map(|(slot, &cached)| SlotView {
                busy: slot.active.is_some(),
                same_model: slot.version == version,
                reusable: current.contains(&slot.version),
                tokens: &slot.tokens,
                cached,
                last_used: slot.last_used,
            })
            .collect();
        // The logits of every token of a scored prompt are needed, so it uses nothing that is known.
        let placement = match job.request.prompt_logprobs {
            Some(_) => choose_empty(&views),
            None => choose_slot(&job.request.prompt, &views),
        };
        let Placement { slot: index, keep, source } = placement.expect("a request is admitted for each free slot");
        let capacity = self.shared.capacity.min(job.version.model.config().max_position_embeddings);
        let (mut active, prompt) = Active::new(job, capacity);
        self.cache.truncate(index, keep);
        active.usage.reused_tokens = keep;
        if let Some(source) = source {
            if self.cache.lengths()[source.slot] >= source.length {
                self.copy_prefix(source.slot, index, source.length);
                active.usage.reused_tokens = self.cache.lengths()[index];
            } else {
                let last_used = self.slots[source.slot].last_used;
                active.awaited = Some(AwaitedPrefix { slot: source.slot, last_used, length: source.length });
            }
        }
        self.prompt_tokens_reused += active.usage.reused_tokens as u64;
        self.slots[index] = Slot { active: Some(active), version, tokens: prompt, last_used: self.orders };
    }

    /// Copies tokens that requests wait for, if they are computed; ends the wait if they never will be.
    fn copy_awaited(&mut self) {
        for index in 0..self.slots.len() {
            let Some(active) = &self.slots[index].active else { continue };
            let Some(AwaitedPrefix { slot: from, last_used, length }) = active.awaited else { continue };
            let source = &self.slots[from];
            // A slot's tokens begin with the awaited ones until another request gets it.
            let (same, runs) = (source.last_used == last_used, source.active.is_some());
            let known = if same { length.min(self.cache.lengths()[from]) } else { 0 };
            if same && runs && known < length {
                continue;
            }
            let own = self.cache.lengths()[index];
            if known > own {
                self.copy_prefix(from, index, known);
            }
            let gained = self.cache.lengths()[index].saturating_sub(own);
            let active = self.slots[index].active.as_mut().expect("it is active, as matched above");
            active.awaited = None;
            active.usage.reused_tokens += gained;
            self.prompt_tokens_reused += gained as u64;
        }
    }

    /// [`KvCache::copy_prefix`]. If it panics, for example because memory ran out, everything is computed again.
    fn copy_prefix(&mut self, from: usize, to: usize, length: usize) {
        if let Err(problem) = catch(|| self.cache.copy_prefix(from, to, length)) {
            self.recover(&problem, &vec![0; self.slots.len()]);
        }
    }

    /// The number of tokens of each slot in the next pass.
    fn plan(&self) -> Vec<usize> {
        let needs: Vec<usize> = (0..self.slots.len()).map(|index| self.need(index)).collect();
        // A request that may be the reason for a panic runs alone, so that others do not fail with it.
        let suspects = (0..needs.len()).filter(|&index| needs[index] > 0 && self.is_suspect(index));
        if let Some(suspect) = suspects.min_by_key(|&index| self.slots[index].last_used) {
            let count = needs[suspect].min(self.shared.options.prefill_chunk);
            return (0..needs.len()).map(|index| if index == suspect { count } else { 0 }).collect();
        }
        // Slots that need a single token are those that generate: each gets it in every pass.
        let single = |need: &usize| *need == 1;
        let budget = self.shared.options.prefill_chunk - needs.iter().filter(|need| single(need)).count();
        let prompts: Vec<usize> = needs.iter().map(|need| if single(need) { 0 } else { *need }).collect();
        let shares = share_budget(&prompts, budget);
        needs.iter().zip(shares).map(|(need, share)| if single(need) { 1 } else { share }).collect()
    }

    /// The number of tokens that a slot's request has to compute before its next event, if it does not wait for another request.
    fn need(&self, index: usize) -> usize {
        let slot = &self.slots[index];
        match &slot.active {
            Some(active) if active.awaited.is_none() => {
                let end = slot.tokens.len() - usize::from(!active.generates());
                end - self.cache.lengths()[index]
            }
            _ => 0,
        }
    }

    fn is_suspect(&self, index: usize) -> bool {
        self.slots[index].active.as_ref().is_some_and(|active| active.is_suspect)
    }

    /// Runs the next tokens of all slots, those of each model together.
    fn pass(&mut self) {
        let plan = self.plan();
        let mut models: BTreeMap<u64, Arc<ModelVersion>> = BTreeMap::new();
        for (slot, count) in self.slots.iter().zip(&plan) {
            if let (Some(active), 1..) = (&slot.active, count) {
                models.entry(slot.version).or_insert_with(|| active.version.clone());
            }
        }
        for (id, version) in models {
            let counts: Vec<usize> =
                self.slots.iter().zip(&plan).map(|(slot, &count)| if slot.version == id { count } else { 0 }).collect();
            self.pass_of_model(&version, &counts);
        }
    }

    fn pass_of_model(&mut self, version: &ModelVersion, counts: &[usize]) {
        let start = Instant::now();
        let mut inputs = Vec::with_capacity(self.slots.len());
        let mut rows = Vec::new(); // slot and position of each token with logits
        let mut prompt_tokens = 0;
        for (index, (slot, &count)) in self.slots.iter().zip(counts).enumerate() {
            let first = self.cache.lengths()[index];
            let end = first + count;
            let wanted = match &slot.active {
                Some(active) if active.scores_prompt() => count,
                Some(active) => usize::from(count > 0 && active.generates() && end == slot.tokens.len()),
                None => 0,
            };
            let prompt = slot.active.as_ref().map_or(0, |active| active.usage.prompt_tokens);
            prompt_tokens += prompt.min(end).saturating_sub(first);
            rows.extend((end - wanted..end).map(|position| (index, position)));
            inputs.push(PassInput { tokens: &slot.tokens[first..end], wanted });
        }
        // A suspect has a pass for itself.
        let suspect = (0..counts.len()).find(|&index| counts[index] > 0 && self.is_suspect(index));
        let hidden = run_layers(version, &inputs, &mut self.cache);
        let result = hidden.and_then(|hidden| self.take_rows(version, hidden, &rows, suspect));
        let mut state = self.shared.lock();
        state.status.passes += 1;
        state.status.pass_time += start.elapsed();
        match result {
            Ok(()) => {
                state.status.prompt_tokens_computed += prompt_tokens as u64;
                drop(state);
                self.panics_in_a_row = 0;
            }
            Err(problem) => {
                drop(state);
                self.recover(&problem, counts);
            }
        }
    }

    /// Computes the logits of `rows` (slot and position), whose hidden states are those of `hidden`, and passes them to the requests.
    /// `suspect` is the slot of a request that was computed alone from its first token.
    fn take_rows(
        &mut self,
        version: &ModelVersion,
        hidden: Option<Tensor<2>>,
        rows: &[(usize, usize)],
        suspect: Option<usize>,
    ) -> Result<(), String> {
        let Some(hidden) = hidden else { return Ok(()) };
        let vocab_size = version.model.config().vocab_size;
        for piece in pieces(rows.len(), vocab_size) {
            let mut logits = run_head(version, &hidden, piece.clone())?;
            for (&(index, position), logits) in rows[piece].iter().zip(logits.chunks_exact_mut(vocab_size)) {
                let Slot { active, tokens, .. } = &mut self.slots[index];
                // A request that ended at an earlier row, or is computed again, has no use for the rest.
                let is_alone = suspect == Some(index);
                let Some(active) = active.as_mut().filter(|active| is_alone || !active.is_suspect) else { continue };
                let before = active.usage.new_tokens;
                let ending = active.take_logits(position, tokens, logits);
                self.tokens_generated += (active.usage.new_tokens - before) as u64;
                match ending {
                    Some(Ending::Failed(EngineError::NonFinite { .. })) if !is_alone => self.compute_alone(index),
                    Some(ending) => self.end(index, ending),
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// Starts a request with non-finite logits again, alone. A kernel that multiplies masked values by 0 carries NaN from one sequence
    /// to others in the same pass, so the reason may be another request in this pass, in an earlier one, or in one whose tokens were
    /// used again.
    fn compute_alone(&mut self, index: usize) {
        self.forget_ended(self.slots[index].version);
        self.cache.truncate(index, 0);
        let active = self.slots[index].active.as_mut().expect("the request runs");
        active.restart();
        active.is_suspect = true;
    }

    /// Drops what the cache has of ended requests of a model with non-finite logits, because it may be non-finite, too.
    fn forget_ended(&mut self, version: u64) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.active.is_none() && slot.version == version {
                slot.tokens.clear();
                self.cache.truncate(index, 0);
            }
        }
    }

    /// Frees a slot and sends the last event of its request. What the cache has of the sequence may be used again.
    fn end(&mut self, index: usize, ending: Ending) {
        let slot = &mut self.slots[index];
        let active = slot.active.take().expect("only a running request ends");
        slot.tokens.truncate(self.cache.lengths()[index]);
        if matches!(ending, Ending::Failed(EngineError::NonFinite { .. })) {
            let version = slot.version;
            self.forget_ended(version);
        }
        count_end(&mut self.shared.lock(), &ending);
        active.finish(ending);
    }

    /// Continues after a panic. `counts` has the numbers of tokens of the slots in the pass.
    ///
    /// The cache may be in any state, so everything is computed again from the tokens. If a request was alone in the pass, it is the
    /// reason; otherwise each of them runs alone next. A request that took part in several panics without being the reason of any
    /// ends, too, because the reason may be the number of requests (memory that runs out).
    fn recover(&mut self, problem: &str, counts: &[usize]) {
        tracing::error!("a forward pass was interrupted: {problem}");
        self.panics_in_a_row += 1;
        // The old cache is freed first, so that there are never two.
        self.cache = (self.new_cache)(1);
        self.cache = (self.new_cache)(self.shared.capacity);
        let alone = is_alone(counts);
        if alone {
            self.slots.iter_mut().flat_map(|slot| &mut slot.active).for_each(|active| active.panics = 0);
        }
        for (index, &count) in counts.iter().enumerate() {
            let slot = &mut self.slots[index];
            let Some(active) = &mut slot.active else {
                slot.tokens.clear();
                continue;
            };
            active.restart();
            if count > 0 {
                active.panics += 1;
                active.is_suspect = true;
                if alone || active.panics == MAX_PANICS {
                    self.end(index, Ending::Failed(EngineError::Panicked(problem.into())));
                }
            }
        }
    }

    fn report(&self, state: &mut State) {
        let status = &mut state.status;
        status.busy = self.slots.iter().filter(|slot| slot.active.is_some()).count();
        status.cached_tokens = self.cache.lengths().iter().sum();
        status.tokens_generated = self.tokens_generated;
        status.prompt_tokens_reused = self.prompt_tokens_reused;
        state.is_failing = self.panics_in_a_row >= MAX_PANICS;
    }
}

/// Whether one slot has all tokens of a pass.
fn is_alone(counts: &[usize]) -> bool {
    counts.iter().filter(|&&count| count > 0).count() == 1
}

/// Counts a request that ended.
fn count_end(state: &mut State, ending: &Ending) {
    state.in_flight -= 1;
    let ended = &mut state.status.ended;
    *match ending {
        Ending::Done { reason: StopReason::Eos, .. } => &mut ended.eos,
        Ending::Done { reason: StopReason::Interrupted, .. } => &mut ended.interrupted,
        Ending::Done { .. } => &mut ended.length,
        Ending::Cancelled => &mut ended.cancelled,
        Ending::Failed(EngineError::OutOfTime { .. }) => &mut ended.out_of_time,
        Ending::Failed(_) => &mut ended.failed,
    } += 1;
}

/// Whether a request asks for nothing that a forward pass computes: no new token, and no log-probability except that of the first
/// token of a prompt, which has none.
fn needs_no_pass(job: &Job) -> bool {
    job.request.max_new_tokens == 0 && (job.request.prompt_logprobs.is_none() || job.request.prompt.len() == 1)
}
