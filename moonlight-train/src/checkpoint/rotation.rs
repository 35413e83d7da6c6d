//! Which old checkpoints of a run are removed.

use std::collections::BTreeSet;

/// The steps whose checkpoints are removed, of the `complete` ones: all except the `keep` newest (0 keeps all) and the
/// `protected` ones of any age.
pub(super) fn steps_to_remove(complete: &BTreeSet<u64>, keep: usize, protected: &[u64]) -> Vec<u64> {
    if keep == 0 {
        return Vec::new();
    }
    complete.iter().rev().skip(keep).copied().filter(|step| !protected.contains(step)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_newest_and_the_protected_checkpoints_stay_and_no_others(
            complete in btree_set(0u64..40, 0..12),
            keep in 0usize..6,
            protected in vec(0u64..40, 0..4),
        ) {
            let removed = steps_to_remove(&complete, keep, &protected);
            let left: BTreeSet<u64> = complete.iter().copied().filter(|step| !removed.contains(step)).collect();
            prop_assert!(removed.iter().all(|step| complete.contains(step)));
            prop_assert!(protected.iter().all(|step| !removed.contains(step)));
            let wanted = if keep == 0 { complete.len() } else { keep.min(complete.len()) };
            for newest in complete.iter().rev().take(wanted) {
                prop_assert!(left.contains(newest));
            }
            let most = wanted + protected.iter().collect::<BTreeSet<_>>().len();
            prop_assert!(left.len() <= most);
            prop_assert!(complete.is_empty() || !left.is_empty());
        }
    }
}
