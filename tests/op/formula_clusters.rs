//! Tests of clusters against a loop.

use crate::support::{Outcome, normal};
use occlude::op::k_means::{k_means, lloyd};
use tch::{Kind, Tensor};

crate::trials![clusters_match_lloyds_algorithm];

fn clusters_match_lloyds_algorithm() -> Outcome {
    let points = normal(1, &[300, 2]).to_kind(Kind::Double);
    let weights = (normal(2, &[300]).abs() * 3.0).round() + 1.0;
    let weights = weights.to_kind(Kind::Double);
    let start = points.narrow(0, 0, 8);
    let ours = lloyd(&points, &weights, &start, 100);
    let rows = |x: &Tensor| Vec::<Vec<f64>>::try_from(x).expect("rows");
    let plain_points = rows(&points);
    let plain_weights = Vec::<f64>::try_from(&weights)?;
    let mut centers = rows(&start);
    for _ in 0..ours.rounds {
        let mut sums = [[0.0; 3]; 8];
        for (point, weight) in plain_points.iter().zip(&plain_weights) {
            let square = |center: &Vec<f64>| (center[0] - point[0]).powi(2) + (center[1] - point[1]).powi(2);
            let nearest = (0..8).min_by(|&a, &b| square(&centers[a]).total_cmp(&square(&centers[b]))).expect("eight");
            for (sum, value) in sums[nearest].iter_mut().zip([point[0], point[1], 1.0]) {
                *sum += value * weight;
            }
        }
        centers = sums.iter().map(|[x, y, total]| vec![x / total, y / total]).collect();
    }
    for (ours, plain) in rows(&ours.centers).concat().iter().zip(centers.concat()) {
        assert!((ours - plain).abs() < 1e-12, "{ours} {plain}");
    }
    assert!(ours.rounds < 100, "it ends by itself");
    let more = k_means(&points, &weights, 40, 100, 3);
    assert!(more.distance < ours.distance, "more centers are nearer: {} {}", more.distance, ours.distance);
    Ok(())
}
