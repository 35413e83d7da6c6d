//! Which expert each row of a batch belongs to, sorted so that each expert's rows lie together.

/// The dispatch of `tokens x k` chosen experts, sorted by expert and, within an expert, by token.
///
/// A *slot* is one (token, choice) pair, numbered `token * k + choice`; a *row* is the place of a slot after sorting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertPlan {
    /// `offsets[e]..offsets[e + 1]` are the rows of expert `e`; `experts + 1` numbers.
    pub offsets: Vec<usize>,
    /// The token that each row was copied from; `tokens * k` numbers.
    pub token_of_row: Vec<u32>,
    /// The row that each slot went to; `tokens * k` numbers.
    pub row_of_slot: Vec<u32>,
    /// Experts per token.
    pub k: usize,
}

impl ExpertPlan {
    /// Sorts the choices by expert (a counting sort, so stable): `choices` holds `tokens * k` expert numbers.
    ///
    /// # Panics
    ///
    /// When a choice is not below `experts`, or `choices` is not a multiple of `k` long: the router guarantees both.
    pub fn new(choices: &[u32], k: usize, experts: usize) -> Self {
        assert!(k > 0 && choices.len().is_multiple_of(k), "every token has k choices");
        let mut offsets = vec![0; experts + 1];
        for &expert in choices {
            offsets[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            offsets[expert + 1] += offsets[expert];
        }
        let mut next = offsets.clone();
        let mut token_of_row = vec![0; choices.len()];
        let mut row_of_slot = vec![0; choices.len()];
        for (slot, &expert) in choices.iter().enumerate() {
            let row = next[expert as usize];
            next[expert as usize] += 1;
            token_of_row[row] = (slot / k) as u32;
            row_of_slot[slot] = row as u32;
        }
        Self { offsets, token_of_row, row_of_slot, k }
    }

    /// A plan whose every group has `each` rows, one behind the other: products of a stack of matrices with a matrix each.
    pub fn even(groups: usize, each: usize) -> Self {
        let rows: Vec<u32> = (0..(groups * each) as u32).collect();
        let offsets = (0..=groups).map(|group| group * each).collect();
        Self { offsets, token_of_row: rows.clone(), row_of_slot: rows, k: 1 }
    }

    /// Number of routed experts.
    pub fn experts(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of rows: tokens times experts per token.
    pub fn rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.rows() / self.k
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_slots_find_them() {
        // Three tokens, two choices each, four experts of which number 2 gets nothing.
        let choices = [3, 0, 1, 3, 0, 1];
        let plan = ExpertPlan::new(&choices, 2, 4);
        assert_eq!(plan.offsets, [0, 2, 4, 4, 6]);
        assert_eq!(plan.token_of_row, [0, 2, 1, 2, 0, 1]);
        assert_eq!(plan.row_of_slot, [4, 0, 2, 5, 1, 3]);
        assert_eq!((plan.experts(), plan.rows(), plan.tokens()), (4, 6, 3));
    }
}
