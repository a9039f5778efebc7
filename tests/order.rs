//! The order of samples.

use crate::support::Outcome;
use occlude::data::order::{Order, rows};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::BTreeSet;

crate::trials![
    every_epoch_is_another_permutation,
    ranks_together_read_the_global_batch,
    a_resume_repeats_none_and_skips_none,
    what_was_asked_before_changes_nothing,
    a_window_keeps_to_its_shards,
    samples_are_well_mixed,
];

fn sizes() -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::vec(0u64..40, 1..12).prop_filter("at least one sample", |sizes| sizes.iter().sum::<u64>() > 0)
}

fn bounded<S: Strategy>(strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) -> Outcome {
    let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
    TestRunner::new(config).run(&strategy, test).map_err(|error| error.to_string().into())
}

fn every_epoch_is_another_permutation() -> Outcome {
    bounded((sizes(), any::<u64>(), 1usize..5), |(sizes, seed, open)| {
        let order = Order::new(&sizes, seed, open);
        let n = order.samples();
        let epoch = |e: u64| -> Vec<u64> { (e * n..(e + 1) * n).map(|p| order.at(p).1).collect() };
        for e in 0..3 {
            prop_assert_eq!(epoch(e).into_iter().collect::<BTreeSet<_>>(), (0..n).collect());
            prop_assert_eq!(order.at(e * n).0, e);
        }
        // 12! orders: two epochs agree by chance less than once in 10⁸.
        prop_assert!(n < 12 || epoch(0) != epoch(1), "two epochs in one order");
        Ok(())
    })
}

fn ranks_together_read_the_global_batch() -> Outcome {
    bounded((0u64..5000, 1usize..40), |(batch, world)| {
        let all: Vec<u64> = (0..world).flat_map(|rank| rows(batch, rank, world)).collect();
        prop_assert_eq!(all, (0..batch).collect::<Vec<_>>());
        let most = (0..world).map(|rank| rows(batch, rank, world).count()).max();
        prop_assert_eq!(most, Some(batch.div_ceil(world as u64) as usize), "ranks are loaded evenly");
        Ok(())
    })
}

fn a_resume_repeats_none_and_skips_none() -> Outcome {
    let strategy = (sizes(), 1u64..20, 1usize..6, 1usize..6, 0u64..30);
    bounded(strategy, |(sizes, batch, before, after, stop)| {
        let read = |steps: std::ops::Range<u64>, world: usize| -> Vec<(u64, u64)> {
            let order = Order::new(&sizes, 5, 2);
            let positions = steps.flat_map(|step| {
                (0..world).flat_map(move |rank| rows(batch, rank, world)).map(move |row| step * batch + row)
            });
            positions.map(|position| order.at(position)).collect()
        };
        let mut broken = read(0..stop, before);
        broken.extend(read(stop..40, after));
        prop_assert_eq!(broken, read(0..40, 1));
        Ok(())
    })
}

fn what_was_asked_before_changes_nothing() -> Outcome {
    bounded((sizes(), proptest::collection::vec(0u64..2000, 1..40)), |(sizes, positions)| {
        let used = Order::new(&sizes, 9, 3);
        for position in positions {
            prop_assert_eq!(used.at(position), Order::new(&sizes, 9, 3).at(position));
        }
        Ok(())
    })
}

fn a_window_keeps_to_its_shards() -> Outcome {
    let (shards, each, open) = (24, 50, 4);
    let order = Order::new(&[each; 24], 3, open);
    let mut seen = BTreeSet::new();
    for window in 0..shards / open as u64 {
        let size = each * open as u64;
        let touched: BTreeSet<u64> = (window * size..(window + 1) * size).map(|p| order.at(p).1 / each).collect();
        assert_eq!(touched.len(), open, "window {window} reads {touched:?}");
        assert!(seen.is_disjoint(&touched), "a shard is read in two windows");
        seen.extend(touched);
    }
    Ok(())
}

fn samples_are_well_mixed() -> Outcome {
    let order = Order::new(&[250; 16], 1, 16);
    let n = order.samples();
    let places: Vec<f64> = (0..n).map(|p| order.at(p).1 as f64).collect();
    let mean = (n - 1) as f64 / 2.0;
    let covariance: f64 = places.iter().enumerate().map(|(p, &s)| (p as f64 - mean) * (s - mean)).sum();
    let variance: f64 = (0..n).map(|p| (p as f64 - mean).powi(2)).sum();
    // The rank correlation of a random order has a standard deviation of 1/√(n−1) = 0.016.
    assert!((covariance / variance).abs() < 0.064, "rank correlation {}", covariance / variance);
    let same = places.windows(2).filter(|pair| (pair[0] / 250.0) as u64 == (pair[1] / 250.0) as u64).count();
    let share = same as f64 / (n - 1) as f64;
    assert!((share - 1.0 / 16.0).abs() < 0.02, "{share} of neighbours come from one shard, 0.0625 would be random");
    Ok(())
}
