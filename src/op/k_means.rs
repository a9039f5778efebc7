//! Clusters of weighted points (Lloyd's algorithm, 1982), in fp64 on the host. There is no kernel: it runs once, before
//! a training.

use super::sizes;
use crate::rng::{Philox, Purpose};
use tch::{Kind, Tensor};

/// Rows whose distances are held at a time.
const CHUNK: i64 = 8192;

/// The clusters of some points.
pub struct Clusters {
    /// fp64 [k, C].
    pub centers: Tensor,
    /// Mean squared distance of a point to its center.
    pub distance: f64,
    /// Rounds until no point changed its cluster, or the most that were allowed.
    pub rounds: usize,
}

/// points fp64 [n, C], all different, weights fp64 `[n]` above 0 → k ≤ n clusters. Centers begin at points drawn in
/// proportion to their weights; one that no point is nearest to stays where it is.
pub fn k_means(points: &Tensor, weights: &Tensor, k: i64, max_rounds: usize, seed: u64) -> Clusters {
    lloyd(points, weights, &draw(points, weights, k, seed), max_rounds)
}

/// The same from given centers fp64 [k, C].
pub fn lloyd(points: &Tensor, weights: &Tensor, centers: &Tensor, max_rounds: usize) -> Clusters {
    let mut centers = centers.copy();
    let [k, _] = sizes(&centers);
    let mut assigned = Tensor::full([points.size()[0]], -1, (Kind::Int64, points.device()));
    let weighted = points * weights.unsqueeze(-1);
    let mut rounds = 0;
    loop {
        let (nearest, squares) = nearest(points, &centers);
        if nearest.equal(&assigned) || rounds == max_rounds {
            let distance = (squares * weights).sum(Kind::Double) / weights.sum(Kind::Double);
            return Clusters { centers, distance: distance.double_value(&[]), rounds };
        }
        let sums = centers.zeros_like().index_add(0, &nearest, &weighted);
        let totals = weights.new_zeros([k], (Kind::Double, points.device())).index_add(0, &nearest, weights);
        let totals = totals.unsqueeze(-1);
        centers = (sums / &totals).where_self(&totals.gt(0.0), &centers);
        assigned = nearest;
        rounds += 1;
    }
}

/// Draws k different points: each has the key ln(u) / weight, and the largest keys win (Efraimidis and Spirakis, 2006).
fn draw(points: &Tensor, weights: &Tensor, k: i64, seed: u64) -> Tensor {
    let mut rng = Philox::new(seed, 0, 0, Purpose::Cluster, 0);
    let logs: Vec<f64> = (0..points.size()[0]).map(|_| (1.0 - rng.uniform()).ln()).collect();
    let keys = Tensor::from_slice(&logs) / weights;
    points.index_select(0, &keys.argsort(0, true).narrow(0, 0, k))
}

/// points [n, C] and centers [k, C], of one kind → the nearest center of each, the first of several, int64 `[n]`, and
/// the squared distance to it `[n]`. A point's result does not depend on the others.
pub fn nearest(points: &Tensor, centers: &Tensor) -> (Tensor, Tensor) {
    let chunks = points.split(CHUNK, 0).into_iter().map(|points| {
        let squares = points
            .unbind(1)
            .iter()
            .zip(centers.unbind(1))
            .map(|(x, c)| (x.unsqueeze(1) - c.unsqueeze(0)).square_()) // [n, k]
            .reduce(|mut sum, square| sum.g_add_(&square))
            .expect("a coordinate");
        squares.min_dim(1, false)
    });
    let (squares, indices): (Vec<Tensor>, Vec<Tensor>) = chunks.unzip();
    (Tensor::cat(&indices, 0), Tensor::cat(&squares, 0))
}
