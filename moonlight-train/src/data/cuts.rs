//! A range divided into parts.

/// Where `parts` parts of `0..length` begin and the last one ends, as even as can be, the larger ones first.
pub(super) fn even_cuts(length: usize, parts: usize) -> Vec<usize> {
    let (each, larger) = (length / parts, length % parts);
    (0..=parts).map(|part| part * each + part.min(larger)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_differ_by_one_at_most_and_the_larger_come_first() {
        assert_eq!(even_cuts(10, 4), [0, 3, 6, 8, 10]);
        assert_eq!(even_cuts(4, 4), [0, 1, 2, 3, 4]);
        assert_eq!(even_cuts(1, 3), [0, 1, 1, 1]);
    }
}
