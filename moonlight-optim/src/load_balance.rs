//! Load balancing: whole matrices divided among ranks by their cost.

use serde::{Deserialize, Serialize};

/// An assignment of matrices to ranks, made by [`balance`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    /// The rank of each matrix, in the order of the costs.
    pub rank_of: Vec<usize>,
    /// The sum of the costs of each rank, in the unit of the costs.
    pub loads: Vec<f64>,
}

impl Balance {
    /// The largest load divided by the mean load; 1 is perfect. 1 if all costs are 0.
    pub fn imbalance(&self) -> f64 {
        let sum: f64 = self.loads.iter().sum();
        if sum == 0.0 {
            return 1.0;
        }
        let largest = self.loads.iter().copied().fold(0.0, f64::max);
        largest * self.loads.len() as f64 / sum
    }
}

/// Divides matrices among `world_size` ranks by their costs, such as [`NewtonSchulz::flops`](crate::NewtonSchulz::flops). A
/// stack `[experts, in, out]` is `experts` matrices.
///
/// The method is longest processing time first: matrices in descending order of cost, each to the rank with the least load so
/// far. Its largest load is at most `4/3 - 1/(3 world_size)` times the optimum (Graham 1969). Ties go to the earlier matrix
/// and the lower rank, so that all ranks compute the same result from the same costs.
///
/// For the 5,207 matrices that Muon has in Moonlight-16B, the largest load is 0.01 % above the mean on 8 ranks, and 0.6 % on 64.
///
/// # Panics
///
/// If `world_size` is 0, or a cost is NaN.
///
/// ```
/// use moonlight_optim::distributed::balance;
///
/// let balance = balance(&[1.0, 5.0, 3.0, 3.0, 2.0], 2);
/// assert_eq!(balance.rank_of, [1, 0, 1, 1, 0]);
/// assert_eq!(balance.imbalance(), 1.0);
/// ```
pub fn balance(costs: &[f64], world_size: usize) -> Balance {
    assert!(world_size > 0, "a group has at least one rank");
    assert!(costs.iter().all(|cost| !cost.is_nan()), "no cost is NaN");
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&one, &other| costs[other].total_cmp(&costs[one]).then(one.cmp(&other)));
    let mut balance = Balance { rank_of: vec![0; costs.len()], loads: vec![0.0; world_size] };
    for matrix in order {
        let mut least = 0;
        for rank in 1..world_size {
            // Strictly less: ties go to the lower rank.
            if balance.loads[rank] < balance.loads[least] {
                least = rank;
            }
        }
        balance.rank_of[matrix] = least;
        balance.loads[least] += costs[matrix];
    }
    balance
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Coefficients, NewtonSchulz};

    #[test]
    fn the_most_costly_matrix_goes_first_and_to_the_least_loaded_rank() {
        let balanced = balance(&[1.0, 5.0, 3.0, 3.0, 2.0], 2);
        assert_eq!(balanced.rank_of, [1, 0, 1, 1, 0]);
        assert_eq!((balanced.loads.as_slice(), balanced.imbalance()), ([7.0, 7.0].as_slice(), 1.0));
        // The optimum would be [6, 6]: the method does not always find it.
        let balanced = balance(&[3.0, 3.0, 2.0, 2.0, 2.0], 2);
        assert_eq!(balanced.loads, [7.0, 5.0]);
        assert!((balanced.imbalance() - 7.0 / 6.0).abs() < 1e-12);
        assert_eq!(balance(&[], 3).imbalance(), 1.0);
    }

    /// The matrices that Muon has in Moonlight-16B, `[rows, columns]`, those of each expert separately.
    fn moonlight() -> Vec<[usize; 2]> {
        let mut shapes = Vec::new();
        for layer in 0..27 {
            shapes.extend([[2048, 3072], [2048, 576], [512, 4096], [2048, 2048]]);
            if layer == 0 {
                shapes.extend([[2048, 11264], [2048, 11264], [11264, 2048]]);
                continue;
            }
            shapes.push([2048, 64]);
            shapes.extend([[2048, 2816], [2048, 2816], [2816, 2048]]);
            for _ in 0..64 {
                shapes.extend([[2048, 1408], [2048, 1408], [1408, 2048]]);
            }
        }
        shapes
    }

    #[test]
    fn moonlight_is_divided_evenly_among_8_and_64_ranks() {
        let shapes = moonlight();
        // All of the model except embedding, head, norms and the router's biases.
        let elements: usize = shapes.iter().map(|[rows, columns]| rows * columns).sum();
        assert_eq!(elements, 15_960_110_208 - 2 * 335_544_320 - (27 * (2048 * 2 + 512) + 2048) - 26 * 64);
        let iteration = NewtonSchulz::new(&Coefficients::Report, 5);
        let costs: Vec<f64> = shapes.iter().map(|&[rows, columns]| iteration.flops(rows, columns, true)).collect();
        let total: f64 = costs.iter().sum();
        println!("{} matrices, {:.1} TFLOP a step", shapes.len(), total / 1e12);
        for (ranks, bound) in [(8, 1.0001), (64, 1.006)] {
            let balanced = balance(&costs, ranks);
            println!("{ranks} ranks: largest over mean {:.5}", balanced.imbalance());
            assert!(balanced.imbalance() < bound, "{ranks}: {}", balanced.imbalance());
            assert!((balanced.loads.iter().sum::<f64>() / total - 1.0).abs() < 1e-9);
        }
    }
}
