//! The loss of a bigram model: a model with a lower loss has learned more than which token follows which.

use std::collections::HashMap;

/// The largest vocabulary whose counts are a table, of 32 MiB at most; a larger one has a hash map.
const TABLE_VOCABULARY: usize = 2048;

/// The loss, in nats per token, on the documents `valid` of a bigram model counted on the documents `train`; `None` if `valid`
/// has nothing to predict.
///
/// A document is its tokens with their weights. A token of weight 0 is neither counted nor predicted, and the mean is
/// weighted. Each token except a document's first is predicted from the one before it:
/// `p(b | a) = (n(a, b) + p(b)) / (n(a) + 1)` with `p(b) = (n(b) + 1) / (n + vocab_size)`, where `n` counts predicted tokens
/// of `train`. The single pseudo-count is distributed like the tokens: the rarer the second token of an unseen pair, the higher
/// its loss. That is a stronger baseline than add-one smoothing.
pub fn bigram_loss<D: Iterator<Item = (u32, f32)>>(
    train: impl Iterator<Item = D>,
    valid: impl Iterator<Item = D>,
    vocab_size: usize,
) -> Option<f64> {
    let mut counts = Counts::new(vocab_size);
    each_pair(train, |first, second, _| counts.add(first, second));
    let (mut nats, mut predicted) = (0.0, 0.0);
    each_pair(valid, |first, second, weight| {
        nats -= weight * counts.probability(first, second).ln();
        predicted += weight;
    });
    (predicted > 0.0).then(|| nats / predicted)
}

fn each_pair<D: Iterator<Item = (u32, f32)>>(documents: impl Iterator<Item = D>, mut visit: impl FnMut(u32, u32, f64)) {
    for mut document in documents {
        let Some((mut first, _)) = document.next() else { continue };
        for (second, weight) in document {
            if weight > 0.0 {
                visit(first, second, weight.into());
            }
            first = second;
        }
    }
}

struct Counts {
    vocab_size: usize,
    pairs: Pairs,
    /// Pairs that begin with each token.
    first: Vec<u64>,
    /// Pairs that end with each token.
    second: Vec<u64>,
    total: u64,
}

enum Pairs {
    Table(Vec<u64>),
    Map(HashMap<(u32, u32), u64>),
}

impl Counts {
    fn new(vocab_size: usize) -> Self {
        let pairs = if vocab_size <= TABLE_VOCABULARY {
            Pairs::Table(vec![0; vocab_size * vocab_size])
        } else {
            Pairs::Map(HashMap::new())
        };
        Self { vocab_size, pairs, first: vec![0; vocab_size], second: vec![0; vocab_size], total: 0 }
    }

    fn add(&mut self, first: u32, second: u32) {
        match &mut self.pairs {
            Pairs::Table(table) => table[first as usize * self.vocab_size + second as usize] += 1,
            Pairs::Map(map) => *map.entry((first, second)).or_default() += 1,
        }
        self.first[first as usize] += 1;
        self.second[second as usize] += 1;
        self.total += 1;
    }

    fn probability(&self, first: u32, second: u32) -> f64 {
        let pair = match &self.pairs {
            Pairs::Table(table) => table[first as usize * self.vocab_size + second as usize],
            Pairs::Map(map) => map.get(&(first, second)).copied().unwrap_or(0),
        };
        let alone = (self.second[second as usize] + 1) as f64 / (self.total + self.vocab_size as u64) as f64;
        (pair as f64 + alone) / (self.first[first as usize] + 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(all: &[&[u32]]) -> Vec<std::vec::IntoIter<(u32, f32)>> {
        let weighted = |document: &[u32]| document.iter().map(|&token| (token, 1.0)).collect::<Vec<_>>();
        all.iter().map(|document| weighted(document).into_iter()).collect()
    }

    fn loss(train: &[&[u32]], valid: &[&[u32]], vocab_size: usize) -> Option<f64> {
        bigram_loss(documents(train).into_iter(), documents(valid).into_iter(), vocab_size)
    }

    #[test]
    fn counted_by_hand() {
        // Pairs: 01 10 01 12; ends: 1 twice, 0 once, 2 once; of 4, with a vocabulary of 4.
        let train: &[&[u32]] = &[&[0, 1, 0, 1, 2]];
        let one = (2.0 + 3.0 / 8.0) / 3.0; // 1 after 0
        let unseen = (0.0 + 2.0 / 8.0) / 3.0; // 2 after 0
        let expected = -(f64::ln(one) + f64::ln(unseen)) / 2.0;
        let got = loss(train, &[&[0, 1], &[0, 2], &[3], &[]], 4).unwrap();
        assert!((got - expected).abs() < 1e-12, "{got} is not {expected}");
        assert_eq!(loss(train, &[&[3], &[]], 4), None);
    }

    #[test]
    fn tokens_of_weight_zero_are_neither_counted_nor_predicted() {
        let of = |document: &'static [(u32, f32)]| std::iter::once(document.iter().copied());
        let train = &[(0, 0.0), (1, 1.0), (0, 0.0), (1, 1.0), (2, 1.0)];
        // Counted: 01 01 12, with a vocabulary of 4.
        let probability = |pair: f64, alone: f64, first: f64| (pair + alone / 7.0) / (first + 1.0);
        let (one, two) = (probability(2.0, 3.0, 2.0), probability(1.0, 2.0, 1.0));
        let valid = &[(0, 1.0), (1, 1.0), (0, 0.0), (1, 0.0), (2, 0.5)];
        let got = bigram_loss(of(train), of(valid), 4).unwrap();
        let expected = -(f64::ln(one) + 0.5 * f64::ln(two)) / 1.5;
        assert!((got - expected).abs() < 1e-12, "{got} is not {expected}");
    }

    #[test]
    fn probabilities_sum_to_one_in_table_and_map() {
        for vocab_size in [7, TABLE_VOCABULARY + 1] {
            let mut counts = Counts::new(vocab_size);
            for (first, second) in [(0, 1), (0, 1), (0, 2), (6, 6)] {
                counts.add(first, second);
            }
            for first in [0, 1, 6] {
                let sum: f64 = (0..vocab_size as u32).map(|second| counts.probability(first, second)).sum();
                assert!((sum - 1.0).abs() < 1e-9, "{sum}");
            }
        }
    }
}
