//! Which slot a request gets, and which known tokens it uses again.

/// What the choice depends on, for one slot.
#[derive(Debug, Clone)]
pub(super) struct SlotView<'a> {
    /// Whether a request has the slot.
    pub(super) busy: bool,
    /// Whether its keys and values are of the version of the model that the new request uses.
    pub(super) same_model: bool,
    /// Whether any later request can use its keys and values: not if the version of the model was replaced.
    pub(super) reusable: bool,
    /// The tokens of the sequence, those that are not computed yet included.
    pub(super) tokens: &'a [u32],
    /// How many of them are in the cache.
    pub(super) cached: usize,
    /// When a request had it last; 0 for never.
    pub(super) last_used: u64,
}

/// A slot for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) slot: usize,
    /// The number of tokens of the slot that the prompt begins with.
    pub(super) keep: usize,
    /// Another sequence that the prompt begins like.
    pub(super) source: Option<PrefixSource>,
}

/// A sequence whose first tokens are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PrefixSource {
    pub(super) slot: usize,
    /// The number of tokens that both begin with. Some of them may not be computed yet.
    pub(super) length: usize,
}

/// A request waits for tokens that another one is about to compute if they are at least this many, or half of what it needs. For
/// fewer it is faster to compute them in the same pass.
const WORTH_WAITING: usize = 64;

/// Chooses a free slot for a prompt, if there is one.
///
/// A slot whose tokens mostly are the beginning of the prompt continues as it is: a conversation with one more message. Otherwise
/// the least recently used slot is overwritten, and the longest common beginning is copied to it from any other slot, so that the
/// conversation there stays known.
pub(super) fn choose_slot(prompt: &[u32], slots: &[SlotView<'_>]) -> Option<Placement> {
    // The last token of a prompt is computed even if it is known, because its logits are needed.
    let usable = &prompt[..prompt.len() - 1];
    let common: Vec<usize> =
        slots.iter().map(|slot| if slot.same_model { common_prefix(usable, slot.tokens) } else { 0 }).collect();
    let cached = |index: usize| common[index].min(slots[index].cached);
    let free = || (0..slots.len()).filter(|&index| !slots[index].busy);

    let longest = free().max_by_key(|&index| (cached(index), std::cmp::Reverse(index)))?;
    let continues = cached(longest) > 0 && 2 * cached(longest) >= slots[longest].cached;
    let oldest = free().min_by_key(|&index| if slots[index].reusable { slots[index].last_used } else { 0 })?;
    let slot = if continues { longest } else { oldest };
    let keep = cached(slot);

    let others = || (0..slots.len()).filter(|&index| index != slot);
    let known = others().max_by_key(|&index| (cached(index), std::cmp::Reverse(index)));
    let known = known.map(|index| PrefixSource { slot: index, length: cached(index) }).filter(|it| it.length > keep);
    let best = known.map_or(keep, |known| known.length);
    // Tokens that a running request will have computed soon.
    let soon =
        others().filter(|&index| slots[index].busy).max_by_key(|&index| (common[index], std::cmp::Reverse(index)));
    let soon = soon.map(|index| PrefixSource { slot: index, length: common[index] }).filter(|it| {
        let gain = it.length.saturating_sub(best);
        gain >= WORTH_WAITING || (gain > 0 && 2 * gain >= prompt.len() - best)
    });
    Some(Placement { slot, keep, source: soon.or(known) })
}

/// Chooses a free slot for a prompt that is computed in full.
pub(super) fn choose_empty(slots: &[SlotView<'_>]) -> Option<Placement> {
    let free = (0..slots.len()).filter(|&index| !slots[index].busy);
    let oldest = free.min_by_key(|&index| if slots[index].reusable { slots[index].last_used } else { 0 })?;
    Some(Placement { slot: oldest, keep: 0, source: None })
}

/// The number of tokens that both begin with.
pub(super) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Divides `budget` tokens among prompts that need `needs[i]` tokens each: equally, and what a short prompt leaves goes to the others,
/// so that a short prompt is not held up by a long one, and a long one not by many short ones.
pub(super) fn share_budget(needs: &[usize], budget: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..needs.len()).filter(|&index| needs[index] > 0).collect();
    order.sort_by_key(|&index| needs[index]);
    let (mut shares, mut left) = (vec![0; needs.len()], budget);
    for (done, &index) in order.iter().enumerate() {
        // Rounded up, so that the budget is used even if it has fewer tokens than there are prompts.
        shares[index] = needs[index].min(left.div_ceil(order.len() - done));
        left -= shares[index];
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(tokens: &[u32], last_used: u64) -> SlotView<'_> {
        SlotView { busy: false, same_model: true, reusable: true, tokens, cached: tokens.len(), last_used }
    }

    fn place(prompt: &[u32], slots: &[SlotView<'_>]) -> (usize, usize, Option<(usize, usize)>) {
        let Placement { slot, keep, source } = choose_slot(prompt, slots).unwrap();
        (slot, keep, source.map(|source| (source.slot, source.length)))
    }

    #[test]
    fn a_conversation_continues_in_its_slot() {
        let slots = [slot(&[1, 2, 9], 1), slot(&[1, 2, 3, 4], 3), slot(&[], 0)];
        assert_eq!(place(&[1, 2, 3, 4, 5, 6], &slots), (1, 4, None));
        // The last token of the prompt is computed again.
        assert_eq!(place(&[1, 2, 3, 4], &slots), (1, 3, None));
    }

    #[test]
    fn a_text_that_only_begins_alike_is_copied_and_kept() {
        let slots = [slot(&[1, 2, 3, 4, 5, 6], 5), slot(&[8, 8], 2), slot(&[1, 7], 3)];
        assert_eq!(place(&[1, 2, 9, 9], &slots), (1, 0, Some((0, 2))));
        // If no other slot is free, it is overwritten, and what it begins with is kept.
        let mut busy = slots.clone();
        (busy[1].busy, busy[2].busy) = (true, true);
        assert_eq!(place(&[1, 2, 9, 9], &busy), (0, 2, None));
    }

    #[test]
    fn the_least_recently_used_slot_is_overwritten() {
        let slots = [slot(&[1, 2], 5), slot(&[3], 2), slot(&[4], 3)];
        assert_eq!(place(&[9, 9], &slots), (1, 0, None));
        // Slots of a replaced model come first: no request can use their tokens.
        let mut replaced = slots.clone();
        (replaced[2].reusable, replaced[2].same_model) = (false, false);
        assert_eq!(place(&[9, 9], &replaced), (2, 0, None));
        assert_eq!(choose_empty(&replaced), Some(Placement { slot: 2, keep: 0, source: None }));
        let busy = slots.map(|slot| SlotView { busy: true, ..slot });
        assert_eq!((choose_slot(&[1], &busy), choose_empty(&busy)), (None, None));
    }

    #[test]
    fn another_model_shares_nothing() {
        let mut slots = [slot(&[1, 2, 3], 1), slot(&[], 0)];
        slots[0].same_model = false;
        assert_eq!(place(&[1, 2, 3, 4], &slots), (1, 0, None));
    }

    #[test]
    fn a_request_waits_for_a_prompt_that_is_being_computed() {
        let prompt: Vec<u32> = (0..200).collect();
        let running = SlotView { busy: true, cached: 10, ..slot(&prompt, 9) };
        let slots = [running, slot(&[], 0)];
        assert_eq!(place(&prompt, &slots), (1, 0, Some((0, 199))));
        // For a short common beginning it copies what is known and does not wait.
        let other: Vec<u32> = (0..20).chain(300..400).collect();
        assert_eq!(place(&other, &slots), (1, 0, Some((0, 10))));
        let short = [0, 1, 2, 3];
        let slots = [SlotView { busy: true, cached: 0, ..slot(&short, 9) }, slot(&[], 0)];
        assert_eq!(place(&short, &slots), (1, 0, Some((0, 3))));
        assert_eq!(place(&[0, 9, 9, 9], &slots), (1, 0, None));
    }

    #[test]
    fn prompts_share_a_budget_and_the_shortest_end_first() {
        assert_eq!(share_budget(&[1000, 0, 10, 300], 310), [150, 0, 10, 150]);
        assert_eq!(share_budget(&[1000, 20], 512), [492, 20]);
        assert_eq!(share_budget(&[5, 5, 5], 2), [1, 1, 0]);
        assert_eq!(share_budget(&[], 7), [] as [usize; 0]);
        for budget in 0..40 {
            let needs = [3, 0, 17, 9, 1];
            let shares = share_budget(&needs, budget);
            assert!(shares.iter().zip(needs).all(|(share, need)| *share <= need));
            assert_eq!(shares.iter().sum::<usize>(), budget.min(30));
        }
    }
}
