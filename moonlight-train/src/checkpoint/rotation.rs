//! Which checkpoints of a run are removed.

use std::collections::BTreeSet;

/// The steps of the checkpoints to remove, of the whole ones at `whole`: all but the `keep` newest (0 keeps all) and those
/// that are `protected`, whatever their age.
pub(super) fn steps_to_remove(whole: &BTreeSet<u64>, keep: usize, protected: &[u64]) -> Vec<u64> {
    if keep == 0 {
        return Vec::new();
    }
    whole.iter().rev().skip(keep).copied().filter(|step| !protected.contains(step)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_written_resumed_from_or_best_stays_and_so_do_the_newest(
            whole in btree_set(0u64..40, 0..12),
            keep in 0usize..6,
            protected in vec(0u64..40, 0..4),
        ) {
            let removed = steps_to_remove(&whole, keep, &protected);
            let left: BTreeSet<u64> = whole.iter().copied().filter(|step| !removed.contains(step)).collect();
            prop_assert!(removed.iter().all(|step| whole.contains(step)));
            prop_assert!(protected.iter().all(|step| !removed.contains(step)));
            let wanted = if keep == 0 { whole.len() } else { keep.min(whole.len()) };
            for newest in whole.iter().rev().take(wanted) {
                prop_assert!(left.contains(newest));
            }
            // And no more than that is left.
            let most = wanted + protected.iter().collect::<BTreeSet<_>>().len();
            prop_assert!(left.len() <= most);
            prop_assert!(whole.is_empty() || !left.is_empty());
        }
    }
}
