//! Which rows of a matrix belong to which group: for a mixture of experts, which expert each row was sent to.

use std::ops::Range;

/// Rows sorted by group, and how they map to the tokens that they were copied from.
///
/// A *group* shares one matrix of a stack: an expert, or a head. Each token has `k` rows, one for each of its choices. A
/// *slot* is one (token, choice) pair, numbered `token * k + choice`; a *row* is the place of a slot after sorting by group.
///
/// Every layout is valid, whichever constructor made it, and the kernels rely on that:
///
/// - `offsets` begins with 0, never decreases, and ends with the number of rows;
/// - `row_of_slot` is a permutation of the rows, and `token_of_row[row_of_slot[slot]] == slot / k`;
/// - there is at least one group, `k` is not 0, and rows can be counted in an `i32`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLayout {
    offsets: Vec<usize>,
    token_of_row: Vec<u32>,
    row_of_slot: Vec<u32>,
    k: usize,
}

/// Why parts are no [`GroupLayout`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupLayoutError {
    /// Offsets have no group, do not begin with 0, decrease, or do not end with the number of rows.
    #[error("offsets must begin with 0, never decrease and end with the number of rows, {rows}: entry {at} does not")]
    Offsets {
        /// The first entry that is wrong, or the number of entries where there is one too few.
        at: usize,
        /// The number of rows.
        rows: usize,
    },
    /// `k` is 0, or tokens do not have `k` rows each.
    #[error("{rows} rows do not divide into {k} for each token")]
    RowsPerToken {
        /// The number of rows.
        rows: usize,
        /// Rows a token.
        k: usize,
    },
    /// The two maps differ in length.
    #[error("{rows} rows have a token, and {slots} slots have a row")]
    Lengths {
        /// Length of `token_of_row`.
        rows: usize,
        /// Length of `row_of_slot`.
        slots: usize,
    },
    /// A slot's row is out of range, another slot's, or another token's.
    #[error("slot {slot} maps to row {row}, which is out of range, taken, or of another token")]
    Slot {
        /// The slot.
        slot: usize,
        /// Its row.
        row: u32,
    },
    /// There are more rows than an `i32` counts.
    #[error("{rows} rows are more than an i32 counts")]
    TooManyRows {
        /// The number of rows.
        rows: usize,
    },
}

impl GroupLayout {
    /// Sorts rows by group and, within a group, by token (a counting sort): `choices[token * k + choice]` is a group.
    ///
    /// # Panics
    ///
    /// If a choice is not below `groups`, `k` or `groups` is 0, `choices` is not a multiple of `k` long, or it is longer
    /// than an `i32` counts.
    pub fn from_choices(choices: &[u32], k: usize, groups: usize) -> Self {
        assert!(k > 0 && choices.len().is_multiple_of(k), "{} choices are not {k} for each token", choices.len());
        assert!(groups > 0, "a layout has at least one group");
        assert!(i32::try_from(choices.len()).is_ok(), "{} rows are more than an i32 counts", choices.len());
        let mut offsets = vec![0; groups + 1];
        for &group in choices {
            assert!((group as usize) < groups, "choice {group} is none of {groups} groups");
            offsets[group as usize + 1] += 1;
        }
        for group in 0..groups {
            offsets[group + 1] += offsets[group];
        }
        let mut next = offsets.clone();
        let mut token_of_row = vec![0; choices.len()];
        let mut row_of_slot = vec![0; choices.len()];
        for (slot, &group) in choices.iter().enumerate() {
            let row = next[group as usize];
            next[group as usize] += 1;
            token_of_row[row] = (slot / k) as u32;
            row_of_slot[slot] = row as u32;
        }
        Self { offsets, token_of_row, row_of_slot, k }
    }

    /// A layout of `groups` groups of `each` rows, one group after the other, with `k` = 1: products of a stack of matrices
    /// with a matrix each.
    ///
    /// # Panics
    ///
    /// If `groups` is 0, or there are more rows than an `i32` counts.
    pub fn uniform(groups: usize, each: usize) -> Self {
        assert!(groups > 0, "a layout has at least one group");
        let rows = groups.checked_mul(each).and_then(|rows| i32::try_from(rows).ok());
        let rows = rows.unwrap_or_else(|| panic!("{groups} x {each} rows are more than an i32 counts"));
        let rows: Vec<u32> = (0..rows.unsigned_abs()).collect();
        let offsets = (0..=groups).map(|group| group * each).collect();
        Self { offsets, token_of_row: rows.clone(), row_of_slot: rows, k: 1 }
    }

    /// A layout that was sorted elsewhere: `offsets` of `groups + 1` entries, and for each row its token and for each slot
    /// its row, `tokens * k` entries each.
    ///
    /// # Errors
    ///
    /// If the parts break a rule of [`GroupLayout`].
    pub fn from_parts(
        offsets: Vec<usize>,
        token_of_row: Vec<u32>,
        row_of_slot: Vec<u32>,
        k: usize,
    ) -> Result<Self, GroupLayoutError> {
        let rows = token_of_row.len();
        if i32::try_from(rows).is_err() {
            return Err(GroupLayoutError::TooManyRows { rows });
        }
        if k == 0 || !rows.is_multiple_of(k) {
            return Err(GroupLayoutError::RowsPerToken { rows, k });
        }
        if row_of_slot.len() != rows {
            return Err(GroupLayoutError::Lengths { rows, slots: row_of_slot.len() });
        }
        if offsets.len() < 2 {
            return Err(GroupLayoutError::Offsets { at: offsets.len(), rows });
        }
        let last = offsets.len() - 1;
        let wrong = |at: usize| match at {
            0 => offsets[0] != 0,
            at => offsets[at] < offsets[at - 1] || offsets[at] > rows || (at == last && offsets[at] != rows),
        };
        if let Some(at) = (0..=last).find(|&at| wrong(at)) {
            return Err(GroupLayoutError::Offsets { at, rows });
        }
        let mut taken = vec![false; rows];
        for (slot, &row) in row_of_slot.iter().enumerate() {
            let index = row as usize;
            if index >= rows || taken[index] || token_of_row[index] as usize != slot / k {
                return Err(GroupLayoutError::Slot { slot, row });
            }
            taken[index] = true;
        }
        Ok(Self { offsets, token_of_row, row_of_slot, k })
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of rows: tokens times rows a token.
    pub fn rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.rows() / self.k
    }

    /// Rows a token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Where each group's rows begin, and after the last group the number of rows: `groups + 1` entries.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The rows of a group.
    ///
    /// # Panics
    ///
    /// If there is no such group.
    pub fn group(&self, group: usize) -> Range<usize> {
        self.offsets[group]..self.offsets[group + 1]
    }

    /// The token that each row was copied from, below `tokens`; `tokens * k` entries.
    pub fn token_of_row(&self) -> &[u32] {
        &self.token_of_row
    }

    /// The row that each slot was sorted to; a permutation of `tokens * k` entries.
    pub fn row_of_slot(&self) -> &[u32] {
        &self.row_of_slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_group_and_slots_find_them() {
        // Three tokens, two choices each, four experts of which number 2 gets nothing.
        let choices = [3, 0, 1, 3, 0, 1];
        let layout = GroupLayout::from_choices(&choices, 2, 4);
        assert_eq!(layout.offsets, [0, 2, 4, 4, 6]);
        assert_eq!(layout.token_of_row, [0, 2, 1, 2, 0, 1]);
        assert_eq!(layout.row_of_slot, [4, 0, 2, 5, 1, 3]);
        assert_eq!((layout.groups(), layout.rows(), layout.tokens()), (4, 6, 3));
        assert_eq!((layout.group(1), layout.group(2)), (2..4, 4..4));
    }

    #[test]
    fn the_parts_of_a_layout_are_one_again() {
        for layout in [GroupLayout::from_choices(&[3, 0, 1, 3, 0, 1], 2, 4), GroupLayout::uniform(3, 5)] {
            let GroupLayout { offsets, token_of_row, row_of_slot, k } = layout.clone();
            assert_eq!(GroupLayout::from_parts(offsets, token_of_row, row_of_slot, k), Ok(layout));
        }
    }

    #[test]
    fn parts_that_break_a_rule_are_refused() {
        let parts = |offsets: &[usize], tokens: &[u32], slots: &[u32], k| {
            GroupLayout::from_parts(offsets.to_vec(), tokens.to_vec(), slots.to_vec(), k).expect_err("a rule is broken")
        };
        let identity: Vec<u32> = (0..20).collect();
        let offsets = |offsets: &[usize]| parts(offsets, &identity, &identity, 1);
        // Two groups would share rows, and rows would be nobody's.
        assert_eq!(offsets(&[0, 12, 4, 20]), GroupLayoutError::Offsets { at: 2, rows: 20 });
        assert_eq!(offsets(&[4, 20]), GroupLayoutError::Offsets { at: 0, rows: 20 });
        assert_eq!(offsets(&[0, 21]), GroupLayoutError::Offsets { at: 1, rows: 20 });
        assert_eq!(offsets(&[0, 21, 20]), GroupLayoutError::Offsets { at: 1, rows: 20 });
        assert_eq!(offsets(&[0, 19]), GroupLayoutError::Offsets { at: 1, rows: 20 });
        assert_eq!(offsets(&[0]), GroupLayoutError::Offsets { at: 1, rows: 20 });
        assert_eq!(offsets(&[]), GroupLayoutError::Offsets { at: 0, rows: 20 });
        assert_eq!(parts(&[0, 4], &[0, 1, 0, 1], &[0, 2, 1, 3], 3), GroupLayoutError::RowsPerToken { rows: 4, k: 3 });
        assert_eq!(parts(&[0, 0], &[], &[], 0), GroupLayoutError::RowsPerToken { rows: 0, k: 0 });
        assert_eq!(parts(&[0, 2], &[0, 1], &[0], 1), GroupLayoutError::Lengths { rows: 2, slots: 1 });
        // Out of range, twice, and of another token.
        assert_eq!(parts(&[0, 2], &[0, 1], &[0, 2], 1), GroupLayoutError::Slot { slot: 1, row: 2 });
        assert_eq!(parts(&[0, 2], &[0, 0], &[0, 0], 2), GroupLayoutError::Slot { slot: 1, row: 0 });
        assert_eq!(parts(&[0, 2], &[0, 1], &[1, 0], 1), GroupLayoutError::Slot { slot: 0, row: 1 });
        assert_eq!(parts(&[0, 2], &[0, u32::MAX], &[0, 1], 1), GroupLayoutError::Slot { slot: 1, row: 1 });
    }

    #[test]
    #[should_panic(expected = "choice 4 is none of 4 groups")]
    fn a_choice_beyond_the_groups_is_refused() {
        GroupLayout::from_choices(&[0, 4], 1, 4);
    }

    #[test]
    #[should_panic(expected = "more than an i32 counts")]
    fn more_rows_than_can_be_counted_are_refused() {
        GroupLayout::uniform(usize::MAX / 2, 3);
    }
}
