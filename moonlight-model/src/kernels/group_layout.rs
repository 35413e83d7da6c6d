//! [`GroupLayout`]: which rows of a matrix belong to which group. In a mixture of experts a group is an expert.

use std::ops::Range;
use std::sync::OnceLock;

use burn::tensor::{Int, Tensor};

use super::sort_choices;

/// Rows sorted by group. Each row is a copy of a token.
///
/// The rows of a *group* are multiplied by one matrix of a stack, that of an expert or of a head. Each token has `k` rows, one
/// for each of its choices. A *slot* is a (token, choice) pair with the index `token * k + choice`; a *row* is the position of a
/// slot after sorting by group.
///
/// ```
/// use moonlight_model::kernels::GroupLayout;
///
/// // Three tokens, k = 2, four groups: token 0 chooses groups 3 and 0, and so on.
/// let layout = GroupLayout::from_choices(&[3, 0, 1, 3, 0, 1], 2, 4);
/// assert_eq!(layout.offsets(), [0, 2, 4, 4, 6]); // group 2 has no rows
/// assert_eq!(layout.token_of_row(), [0, 2, 1, 2, 0, 1]);
/// ```
///
/// The layout of a router on a GPU is sorted there and stays there. The methods that return offsets or rows then wait for the device
/// once; kernels on that device do not.
///
/// Every constructor ensures these invariants, on which the `unsafe` code of the kernels relies:
///
/// - `offsets` begins with 0, never decreases, and ends with the number of rows;
/// - `row_of_slot` is a permutation of the rows, and `token_of_row[row_of_slot[slot]] == slot / k`;
/// - there is at least one group, `k` is not 0, and the number of rows fits in an `i32`, the type of index tensors.
#[derive(Debug, Clone)]
pub struct GroupLayout {
    groups: usize,
    rows: usize,
    k: usize,
    host: OnceLock<Sorted>,
    device: Option<Tensor<1, Int>>,
    /// Whether products are in f32 whatever [`super::F32Matmul`] allows.
    exact: bool,
}

/// The order of the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sorted {
    offsets: Vec<usize>,
    token_of_row: Vec<u32>,
    row_of_slot: Vec<u32>,
}

/// Rows of a tile of the grouped product on a GPU.
pub(super) const TILE_ROWS: usize = 64;

/// A part of the buffer in which a layout is on a device: `u32` values, one part after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    /// [`GroupLayout::offsets`].
    Offsets,
    /// [`GroupLayout::token_of_row`].
    TokenOfRow,
    /// [`GroupLayout::row_of_slot`].
    RowOfSlot,
    /// For each tile of at most [`TILE_ROWS`] rows of a group three values: the group, the first row of the tile, and the end of the
    /// group's rows. Tiles that are not needed have no rows: `[0, 0, 0]`.
    Tiles,
}

impl Section {
    /// The index of the first value of the section.
    pub(super) fn start(self, groups: usize, rows: usize) -> usize {
        match self {
            Self::Offsets => 0,
            Self::TokenOfRow => groups + 1,
            Self::RowOfSlot => groups + 1 + rows,
            Self::Tiles => groups + 1 + 2 * rows,
        }
    }
}

/// The largest number of tiles that rows of these groups can need.
pub(super) fn most_tiles(groups: usize, rows: usize) -> usize {
    rows / TILE_ROWS + groups.min(rows)
}

/// The number of values of a layout's buffer on a device.
#[cfg(any(test, feature = "cube"))]
pub(super) fn packed_len(groups: usize, rows: usize) -> usize {
    Section::Tiles.start(groups, rows) + 3 * most_tiles(groups, rows)
}

/// Why parts do not make a [`GroupLayout`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupLayoutError {
    /// Offsets have no group, do not begin with 0, decrease, or do not end with the number of rows.
    #[error("offset {at} is wrong: offsets begin with 0, never decrease and end with the number of rows, {rows}")]
    Offsets {
        /// The index of the first wrong offset, or the number of offsets if there are too few.
        at: usize,
        /// The number of rows.
        rows: usize,
    },
    /// `k` is 0, or the number of rows is not a multiple of it.
    #[error("{rows} rows are not a multiple of {k} rows a token")]
    RowsPerToken {
        /// The number of rows.
        rows: usize,
        /// Rows for each token.
        k: usize,
    },
    /// The two maps differ in length.
    #[error("`token_of_row` has {rows} entries, but `row_of_slot` has {slots}")]
    Lengths {
        /// Length of `token_of_row`.
        rows: usize,
        /// Length of `row_of_slot`.
        slots: usize,
    },
    /// The row of a slot is out of range, belongs to another slot, or to another token.
    #[error("slot {slot} maps to row {row}, which is out of range, used twice, or of another token")]
    Slot {
        /// The index of the slot.
        slot: usize,
        /// The row that it maps to.
        row: u32,
    },
    /// There are more rows than an `i32` can count; index tensors are `i32`.
    #[error("{rows} rows are more than an i32 can count")]
    TooManyRows {
        /// The number of rows.
        rows: usize,
    },
}

impl GroupLayout {
    /// Sorts rows by group and within a group by token. `choices[token * k + choice]` is a group.
    ///
    /// # Panics
    ///
    /// If a choice is not below `groups`, if `k` or `groups` is 0, if the length of `choices` is not a multiple of `k`, or if it
    /// exceeds `i32::MAX`.
    pub fn from_choices(choices: &[u32], k: usize, groups: usize) -> Self {
        assert!(
            k > 0 && choices.len().is_multiple_of(k),
            "{} choices are not a multiple of {k} a token",
            choices.len()
        );
        assert!(groups > 0, "a layout has at least one group");
        assert!(i32::try_from(choices.len()).is_ok(), "{} rows are more than an i32 can count", choices.len());
        // A counting sort is stable: rows of a group are in the order of tokens, which fixes the order of sums over them.
        let mut offsets = vec![0; groups + 1];
        for &group in choices {
            assert!((group as usize) < groups, "choice {group} is not one of {groups} groups");
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
        Self::sorted(offsets, token_of_row, row_of_slot, k)
    }

    fn sorted(offsets: Vec<usize>, token_of_row: Vec<u32>, row_of_slot: Vec<u32>, k: usize) -> Self {
        let (groups, rows) = (offsets.len() - 1, token_of_row.len());
        let host = OnceLock::from(Sorted { offsets, token_of_row, row_of_slot });
        Self { groups, rows, k, host, device: None, exact: false }
    }

    /// [`from_choices`](Self::from_choices) of `[tokens, k]` on their device, with `counts`, the number of rows of each group
    /// (`[1, groups]`). On a GPU it does not wait for it.
    pub(crate) fn from_choice_tensor(choices: Tensor<2, Int>, counts: Tensor<2, Int>) -> Self {
        let ([tokens, k], [_, groups]) = (choices.dims(), counts.dims());
        #[cfg(feature = "cpu")]
        if choices.device().inner() == burn::tensor::Device::flex() {
            let choices: Vec<u32> = choices.into_data().iter::<u32>().collect();
            return Self::from_choices(&choices, k, groups);
        }
        let device = Some(sort_choices(choices, counts));
        Self { groups, rows: tokens * k, k, host: OnceLock::new(), device, exact: false }
    }

    /// A layout of `groups` groups with `rows_per_group` rows each, in order, and `k` = 1: the grouped product is then a batched
    /// product.
    ///
    /// # Panics
    ///
    /// If `groups` is 0, or there are more than `i32::MAX` rows.
    pub fn uniform(groups: usize, rows_per_group: usize) -> Self {
        assert!(groups > 0, "a layout has at least one group");
        let rows = groups.checked_mul(rows_per_group).and_then(|rows| i32::try_from(rows).ok());
        let rows = rows.unwrap_or_else(|| panic!("{groups} x {rows_per_group} rows are more than an i32 can count"));
        let rows: Vec<u32> = (0..rows.unsigned_abs()).collect();
        let offsets = (0..=groups).map(|group| group * rows_per_group).collect();
        Self::sorted(offsets, rows.clone(), rows, 1)
    }

    /// The layout, with which f32 matrices are not rounded to TF32 on any device.
    #[must_use]
    pub(crate) fn exact(self) -> Self {
        Self { exact: true, ..self }
    }

    /// A layout that was sorted elsewhere, from `offsets` (`groups + 1` entries), the token of each row and the row of each slot
    /// (`tokens * k` entries each).
    ///
    /// # Errors
    ///
    /// [`GroupLayoutError`] if the parts break an invariant of [`GroupLayout`].
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
        let is_wrong = |at: usize| match at {
            0 => offsets[0] != 0,
            at => offsets[at] < offsets[at - 1] || offsets[at] > rows || (at == last && offsets[at] != rows),
        };
        if let Some(at) = (0..=last).find(|&at| is_wrong(at)) {
            return Err(GroupLayoutError::Offsets { at, rows });
        }
        let mut is_taken = vec![false; rows];
        for (slot, &row) in row_of_slot.iter().enumerate() {
            let index = row as usize;
            if index >= rows || is_taken[index] || token_of_row[index] as usize != slot / k {
                return Err(GroupLayoutError::Slot { slot, row });
            }
            is_taken[index] = true;
        }
        Ok(Self::sorted(offsets, token_of_row, row_of_slot, k))
    }

    /// The number of groups.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// The number of rows, `tokens * k`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.rows / self.k
    }

    /// The number of rows for each token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The first row of each group, followed by the number of rows: `groups + 1` entries.
    pub fn offsets(&self) -> &[usize] {
        &self.host().offsets
    }

    /// The rows of a group.
    ///
    /// # Panics
    ///
    /// If there is no such group.
    pub fn group(&self, group: usize) -> Range<usize> {
        let offsets = self.offsets();
        offsets[group]..offsets[group + 1]
    }

    /// The token that each row is a copy of: `tokens * k` entries below `tokens`.
    pub fn token_of_row(&self) -> &[u32] {
        &self.host().token_of_row
    }

    /// The row of each slot: a permutation of `tokens * k` rows.
    pub fn row_of_slot(&self) -> &[u32] {
        &self.host().row_of_slot
    }

    /// The buffer of the layout on the device where it was sorted, with the [`Section`]s one after the other; `None` for a layout that
    /// was sorted on the host.
    #[cfg(feature = "cube")]
    pub(super) fn on_device(&self) -> Option<&Tensor<1, Int>> {
        self.device.as_ref()
    }

    #[cfg(feature = "cube")]
    pub(super) fn is_exact(&self) -> bool {
        self.exact
    }

    /// The values of a section.
    pub(super) fn section(&self, section: Section) -> Vec<u32> {
        match section {
            Section::Offsets => self.offsets().iter().map(|&offset| offset as u32).collect(),
            Section::TokenOfRow => self.token_of_row().to_vec(),
            Section::RowOfSlot => self.row_of_slot().to_vec(),
            Section::Tiles => {
                let mut tiles = Vec::with_capacity(3 * most_tiles(self.groups, self.rows));
                for (group, range) in self.offsets().windows(2).enumerate() {
                    for first in (range[0]..range[1]).step_by(TILE_ROWS) {
                        tiles.extend([group as u32, first as u32, range[1] as u32]);
                    }
                }
                tiles.resize(3 * most_tiles(self.groups, self.rows), 0);
                tiles
            }
        }
    }

    /// All sections, as [`on_device`](Self::on_device) has them.
    pub(super) fn packed(&self) -> Vec<u32> {
        let sections = [Section::Offsets, Section::TokenOfRow, Section::RowOfSlot, Section::Tiles];
        sections.into_iter().flat_map(|section| self.section(section)).collect()
    }

    fn host(&self) -> &Sorted {
        self.host.get_or_init(|| {
            let packed = self.device.clone().expect("a layout is on the host or on a device");
            let packed: Vec<u32> = packed.into_data().iter::<u32>().collect();
            let part = |section: Section, len| packed[section.start(self.groups, self.rows)..][..len].to_vec();
            let offsets = part(Section::Offsets, self.groups + 1).into_iter().map(|offset| offset as usize).collect();
            let (token_of_row, row_of_slot) =
                (part(Section::TokenOfRow, self.rows), part(Section::RowOfSlot, self.rows));
            Sorted { offsets, token_of_row, row_of_slot }
        })
    }
}

impl PartialEq for GroupLayout {
    fn eq(&self, other: &Self) -> bool {
        (self.k, self.exact) == (other.k, other.exact) && self.host() == other.host()
    }
}

impl Eq for GroupLayout {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_group_and_slots_find_them() {
        // Three tokens with two choices each; group 2 gets no rows.
        let choices = [3, 0, 1, 3, 0, 1];
        let layout = GroupLayout::from_choices(&choices, 2, 4);
        assert_eq!(layout.offsets(), [0, 2, 4, 4, 6]);
        assert_eq!(layout.token_of_row(), [0, 2, 1, 2, 0, 1]);
        assert_eq!(layout.row_of_slot(), [4, 0, 2, 5, 1, 3]);
        assert_eq!((layout.groups(), layout.rows(), layout.tokens()), (4, 6, 3));
        assert_eq!((layout.group(1), layout.group(2)), (2..4, 4..4));
    }

    #[test]
    fn the_buffer_for_a_device_has_all_sections() {
        let layout = GroupLayout::from_choices(&[3, 0, 1, 3, 0, 1], 2, 4);
        // Three groups have rows, so three of at most four tiles are needed.
        let tiles = [0, 0, 2, 1, 2, 4, 3, 4, 6, 0, 0, 0];
        let expected = [&[0, 2, 4, 4, 6][..], &[0, 2, 1, 2, 0, 1], &[4, 0, 2, 5, 1, 3], &tiles].concat();
        assert_eq!(layout.packed(), expected);
        assert_eq!(layout.packed().len(), packed_len(4, 6));
        assert_eq!(Section::Tiles.start(4, 6), expected.len() - tiles.len());
        // As many tiles as there can be: 65 rows in two groups are 64 + 1 or, in the worst case, two tiles and one.
        let worst = GroupLayout::from_choices(&[&[0; 65][..], &[1; 63]].concat(), 1, 2);
        assert_eq!(worst.section(Section::Tiles), [0, 0, 65, 0, 64, 65, 1, 65, 128, 0, 0, 0]);
    }

    #[test]
    fn the_parts_of_a_layout_make_the_same_layout() {
        for layout in [GroupLayout::from_choices(&[3, 0, 1, 3, 0, 1], 2, 4), GroupLayout::uniform(3, 5)] {
            let Sorted { offsets, token_of_row, row_of_slot } = layout.host().clone();
            assert_eq!(GroupLayout::from_parts(offsets, token_of_row, row_of_slot, layout.k()), Ok(layout));
        }
    }

    #[test]
    fn parts_that_break_an_invariant_are_refused() {
        let parts = |offsets: &[usize], tokens: &[u32], slots: &[u32], k| {
            GroupLayout::from_parts(offsets.to_vec(), tokens.to_vec(), slots.to_vec(), k)
                .expect_err("an invariant is broken")
        };
        let identity: Vec<u32> = (0..20).collect();
        let offsets = |offsets: &[usize]| parts(offsets, &identity, &identity, 1);
        // Decreasing offsets would let two groups share rows, and a first offset above 0 would leave rows without a group.
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
        // Out of range, used twice, of another token, and with a token out of range.
        assert_eq!(parts(&[0, 2], &[0, 1], &[0, 2], 1), GroupLayoutError::Slot { slot: 1, row: 2 });
        assert_eq!(parts(&[0, 2], &[0, 0], &[0, 0], 2), GroupLayoutError::Slot { slot: 1, row: 0 });
        assert_eq!(parts(&[0, 2], &[0, 1], &[1, 0], 1), GroupLayoutError::Slot { slot: 0, row: 1 });
        assert_eq!(parts(&[0, 2], &[0, u32::MAX], &[0, 1], 1), GroupLayoutError::Slot { slot: 1, row: 1 });
    }

    #[test]
    #[should_panic(expected = "choice 4 is not one of 4 groups")]
    fn a_choice_beyond_the_groups_is_refused() {
        GroupLayout::from_choices(&[0, 4], 1, 4);
    }

    #[test]
    #[should_panic(expected = "more than an i32 can count")]
    fn more_rows_than_can_be_counted_are_refused() {
        GroupLayout::uniform(usize::MAX / 2, 3);
    }

    #[test]
    fn messages() {
        let examples = [
            GroupLayoutError::Offsets { at: 2, rows: 20 },
            GroupLayoutError::RowsPerToken { rows: 4, k: 3 },
            GroupLayoutError::Lengths { rows: 2, slots: 1 },
            GroupLayoutError::Slot { slot: 1, row: 2 },
            GroupLayoutError::TooManyRows { rows: 1 << 40 },
        ];
        let lines = examples.map(|error| {
            // The compiler asks for an example of a new variant here.
            match error {
                GroupLayoutError::Offsets { .. }
                | GroupLayoutError::RowsPerToken { .. }
                | GroupLayoutError::Lengths { .. }
                | GroupLayoutError::Slot { .. }
                | GroupLayoutError::TooManyRows { .. } => {}
            }
            format!("error: {error}")
        });
        insta::assert_snapshot!(lines.join("\n"));
    }
}
