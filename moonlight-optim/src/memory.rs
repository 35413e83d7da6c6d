//! The batches of a step of [`MuonAdamW`](crate::MuonAdamW), for estimates of its peak memory.

/// The most elements that are stepped together. A larger batch gains little speed, and the workspace of Newton-Schulz is a few
/// times the size of the batch. A larger parameter forms its own batch.
const BATCH_ELEMENTS: usize = 1 << 24;

/// The batches in which [`MuonAdamW`](crate::MuonAdamW) steps matrices. The parameters of a batch are `equal` (in shape, dtype
/// and settings) and keep their order. Together they have at most 2^24 elements, except that a batch has at least one
/// parameter. `elements` returns the number of elements of a parameter.
///
/// During a step, memory holds the gradients and the momentum of the whole module, and for one batch at a time the new
/// parameters and the workspace of Newton-Schulz.
pub fn step_batches<T>(
    parameters: Vec<T>,
    elements: impl Fn(&T) -> usize,
    equal: impl Fn(&T, &T) -> bool,
) -> Vec<Vec<T>> {
    let mut open: Vec<(usize, Vec<T>)> = Vec::new(); // how many more parameters fit, members
    for one in parameters {
        match open.iter_mut().find(|(room, members)| *room > 0 && equal(&members[0], &one)) {
            Some((room, members)) => {
                *room -= 1;
                members.push(one);
            }
            None => open.push(((BATCH_ELEMENTS / elements(&one).max(1)).saturating_sub(1), vec![one])),
        }
    }
    open.into_iter().map(|(_, members)| members).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parameters_share_batches_of_2_24_elements() {
        let shapes = [(1 << 22, 'a'), (1 << 22, 'b'), (1 << 22, 'a'), (1 << 25, 'c'), (1 << 25, 'c')];
        let more = shapes.into_iter().chain([(1 << 22, 'a'); 4]).collect();
        let batches = step_batches(more, |(elements, _)| *elements, |one, other| one == other);
        let sizes: Vec<(char, usize)> = batches.iter().map(|batch| (batch[0].1, batch.len())).collect();
        assert_eq!(sizes, [('a', 4), ('b', 1), ('c', 1), ('c', 1), ('a', 2)]);
    }
}
