//! Newton-Schulz in plain loops over `f64`: the reference that tests compare the kernels with.
//!
//! It is written to be read, not to be fast. It is public so that users can check another backend with it.

use crate::{NewtonSchulz, Preconditioning};

/// A row-major matrix of `f64`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// The number of rows.
    pub rows: usize,
    /// The number of columns.
    pub columns: usize,
    /// `rows * columns` values, row-major.
    pub values: Vec<f64>,
}

impl Matrix {
    /// A matrix from its values, row-major.
    ///
    /// # Panics
    ///
    /// If there are not `rows * columns` values.
    pub fn new(rows: usize, columns: usize, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), rows * columns, "a matrix of [{rows}, {columns}] has {} values", rows * columns);
        Self { rows, columns, values }
    }

    /// The transpose.
    pub fn transposed(&self) -> Matrix {
        let mut values = Vec::with_capacity(self.values.len());
        for column in 0..self.columns {
            for row in 0..self.rows {
                values.push(self.values[row * self.columns + column]);
            }
        }
        Matrix::new(self.columns, self.rows, values)
    }

    /// The Frobenius norm.
    pub fn norm(&self) -> f64 {
        // Divided by the largest value first, so that no square vanishes or overflows.
        let largest = self.values.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        if largest == 0.0 {
            return 0.0;
        }
        largest * self.values.iter().map(|value| (value / largest).powi(2)).sum::<f64>().sqrt()
    }

    /// The matrix product `self * other`.
    ///
    /// # Panics
    ///
    /// If the inner dimensions differ.
    pub fn times(&self, other: &Matrix) -> Matrix {
        assert_eq!(self.columns, other.rows, "the inner dimensions of a product agree");
        let mut values = vec![0.0; self.rows * other.columns];
        for row in 0..self.rows {
            for inner in 0..self.columns {
                let left = self.values[row * self.columns + inner];
                for column in 0..other.columns {
                    values[row * other.columns + column] += left * other.values[inner * other.columns + column];
                }
            }
        }
        Matrix::new(self.rows, other.columns, values)
    }

    /// `own * self + theirs * other`.
    fn combined(&self, own: f64, other: &Matrix, theirs: f64) -> Matrix {
        let values = self.values.iter().zip(&other.values).map(|(x, y)| own * x + theirs * y).collect();
        Matrix::new(self.rows, self.columns, values)
    }
}

/// Newton-Schulz as the report states it (2.1), one matrix at a time:
/// `X <- a X + b (X X^T) X + c (X X^T)^2 X` from `X = M / (||M|| + epsilon)`, a tall matrix transposed first.
pub fn newton_schulz(matrix: &Matrix, schedule: &[[f64; 3]], epsilon: f64) -> Matrix {
    let tall = matrix.rows > matrix.columns;
    let mut x = if tall { matrix.transposed() } else { matrix.clone() };
    let norm = x.norm() + epsilon;
    if norm > 0.0 {
        x.values.iter_mut().for_each(|value| *value /= norm);
    }
    x = iterated(x, schedule);
    if tall { x.transposed() } else { x }
}

/// [`NewtonSchulz::apply`] of one matrix: [`newton_schulz`] with the preconditioning of `iteration`. Dtype and form have no
/// effect.
pub fn orthogonalized(matrix: &Matrix, iteration: &NewtonSchulz) -> Matrix {
    if iteration.preconditioning == Preconditioning::Frobenius {
        return newton_schulz(matrix, &iteration.schedule, iteration.epsilon);
    }
    let tall = matrix.rows > matrix.columns;
    let x = if tall { matrix.transposed() } else { matrix.clone() };
    let x = iterated(almost_orthogonal(x), &iteration.schedule);
    if tall { x.transposed() } else { x }
}

/// AOL, the rescaling of almost orthogonal layers: row `i` is divided by `sqrt(sum_j |X X^T|_ij)`.
fn almost_orthogonal(mut x: Matrix) -> Matrix {
    let norm = x.norm();
    if norm > 0.0 {
        x.values.iter_mut().for_each(|value| *value /= norm);
    }
    let gram = x.times(&x.transposed());
    for (row, gram) in x.values.chunks_mut(x.columns).zip(gram.values.chunks(gram.columns)) {
        let sum: f64 = gram.iter().map(|value| value.abs()).sum();
        if sum > 0.0 {
            row.iter_mut().for_each(|value| *value /= sum.sqrt());
        }
    }
    x
}

fn iterated(mut x: Matrix, schedule: &[[f64; 3]]) -> Matrix {
    for &[a, b, c] in schedule {
        let gram = x.times(&x.transposed());
        let polynomial = gram.combined(b, &gram.times(&gram), c);
        x = x.combined(a, &polynomial.times(&x), 1.0);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn singular_values_of_a_diagonal_matrix_follow_the_polynomial() {
        let matrix = Matrix::new(2, 3, vec![3.0, 0.0, 0.0, 0.0, 4.0, 0.0]);
        let result = newton_schulz(&matrix, &[[2.0, -1.5, 0.5]], 0.0);
        let p = |x: f64| 2.0 * x - 1.5 * x.powi(3) + 0.5 * x.powi(5);
        let expected = [p(0.6), 0.0, 0.0, 0.0, p(0.8), 0.0];
        for (value, expected) in result.values.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-12);
        }
    }
}
