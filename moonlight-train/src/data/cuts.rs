//! Dividing a range into parts.

/// The `parts + 1` bounds of the parts of `0..length`. Their lengths differ by at most 1, and the longer ones come first.
pub(super) fn even_cuts(length: usize, parts: usize) -> Vec<usize> {
    let (each, larger) = (length / parts, length % parts);
    (0..=parts).map(|part| part * each + part.min(larger)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_differ_by_at_most_one_and_the_longer_come_first() {
        assert_eq!(even_cuts(10, 4), [0, 3, 6, 8, 10]);
        assert_eq!(even_cuts(4, 4), [0, 1, 2, 3, 4]);
        assert_eq!(even_cuts(1, 3), [0, 1, 1, 1]);
    }
}
