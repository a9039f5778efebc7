//! Tests of the order of samples.

use crate::support::Outcome;
use occlude::data::order::{SampleOrder, max_rank_blocks, rank_block_rows, rank_rows};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::BTreeSet;

crate::trials![
    every_epoch_is_a_different_permutation,
    ranks_together_read_the_global_batch,
    blocks_are_equal_on_any_number_of_ranks,
    resuming_repeats_and_skips_no_sample,
    the_order_does_not_depend_on_earlier_queries,
    a_shuffle_window_stays_within_its_shards,
    samples_are_well_shuffled,
];

fn sizes() -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::vec(0u64..40, 1..12).prop_filter("at least one sample", |sizes| sizes.iter().sum::<u64>() > 0)
}

fn bounded<S: Strategy>(strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) -> Outcome {
    let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
    TestRunner::new(config).run(&strategy, test).map_err(|error| error.to_string().into())
}

fn every_epoch_is_a_different_permutation() -> Outcome {
    bounded((sizes(), any::<u64>(), 1usize..5), |(sizes, seed, open)| {
        let order = SampleOrder::new(&sizes, seed, open);
        let n = order.sample_count();
        let epoch = |e: u64| -> Vec<u64> { (e * n..(e + 1) * n).map(|p| order.epoch_and_sample(p).1).collect() };
        for e in 0..3 {
            prop_assert_eq!(epoch(e).into_iter().collect::<BTreeSet<_>>(), (0..n).collect());
            prop_assert_eq!(order.epoch_and_sample(e * n).0, e);
        }
        // 12! orders: two epochs agree by chance less than once in 10⁸.
        prop_assert!(n < 12 || epoch(0) != epoch(1), "two epochs in one order");
        Ok(())
    })
}

fn ranks_together_read_the_global_batch() -> Outcome {
    bounded((0u64..5000, 1usize..40), |(batch, world)| {
        let all: Vec<u64> = (0..world).flat_map(|rank| rank_rows(batch, rank, world)).collect();
        prop_assert_eq!(all, (0..batch).collect::<Vec<_>>());
        let max = (0..world).map(|rank| rank_rows(batch, rank, world).count()).max();
        prop_assert_eq!(max, Some(batch.div_ceil(world as u64) as usize), "the load of ranks is balanced");
        Ok(())
    })
}

fn blocks_are_equal_on_any_number_of_ranks() -> Outcome {
    bounded((1u64..400, 1u64..20, 1usize..6), |(samples, block, world)| {
        let parts: Vec<_> = (0..world).map(|rank| rank_block_rows(samples, block, rank, world)).collect();
        let all: Vec<u64> = parts.iter().cloned().flatten().collect();
        prop_assert_eq!(all, (0..samples).collect::<Vec<_>>());
        prop_assert!(parts.iter().all(|part| part.is_empty() || part.start.is_multiple_of(block)));
        let blocks = parts.iter().map(|part| (part.end - part.start).div_ceil(block)).max();
        prop_assert_eq!(blocks, Some(max_rank_blocks(samples, block, world)));
        Ok(())
    })
}

fn resuming_repeats_and_skips_no_sample() -> Outcome {
    let strategy = (sizes(), 1u64..20, 1usize..6, 1usize..6, 0u64..30);
    bounded(strategy, |(sizes, batch, before, after, stop)| {
        let read = |steps: std::ops::Range<u64>, world: usize| -> Vec<(u64, u64)> {
            let order = SampleOrder::new(&sizes, 5, 2);
            let positions = steps.flat_map(|step| {
                (0..world).flat_map(move |rank| rank_rows(batch, rank, world)).map(move |row| step * batch + row)
            });
            positions.map(|position| order.epoch_and_sample(position)).collect()
        };
        let mut broken = read(0..stop, before);
        broken.extend(read(stop..40, after));
        prop_assert_eq!(broken, read(0..40, 1));
        Ok(())
    })
}

fn the_order_does_not_depend_on_earlier_queries() -> Outcome {
    bounded((sizes(), proptest::collection::vec(0u64..2000, 1..40)), |(sizes, positions)| {
        let used = SampleOrder::new(&sizes, 9, 3);
        for position in positions {
            prop_assert_eq!(used.epoch_and_sample(position), SampleOrder::new(&sizes, 9, 3).epoch_and_sample(position));
        }
        Ok(())
    })
}

fn a_shuffle_window_stays_within_its_shards() -> Outcome {
    let shards = 24;
    let each = 50;
    let open = 4;
    let order = SampleOrder::new(&[each; 24], 3, open);
    let mut visible = BTreeSet::new();
    for window in 0..shards / open as u64 {
        let size = each * open as u64;
        let touched: BTreeSet<u64> =
            (window * size..(window + 1) * size).map(|p| order.epoch_and_sample(p).1 / each).collect();
        assert_eq!(touched.len(), open, "window {window} reads {touched:?}");
        assert!(visible.is_disjoint(&touched), "a shard is read in two windows");
        visible.extend(touched);
    }
    Ok(())
}

fn samples_are_well_shuffled() -> Outcome {
    let order = SampleOrder::new(&[250; 16], 1, 16);
    let n = order.sample_count();
    let positions: Vec<f64> = (0..n).map(|p| order.epoch_and_sample(p).1 as f64).collect();
    let mean = (n - 1) as f64 / 2.0;
    let covariance: f64 = positions.iter().enumerate().map(|(p, &s)| (p as f64 - mean) * (s - mean)).sum();
    let variance: f64 = (0..n).map(|p| (p as f64 - mean).powi(2)).sum();
    // The rank correlation of a random order has a standard deviation of 1/√(n−1) = 0.016.
    assert!((covariance / variance).abs() < 0.064, "rank correlation {}", covariance / variance);
    let same = positions.windows(2).filter(|pair| (pair[0] / 250.0) as u64 == (pair[1] / 250.0) as u64).count();
    let fraction = same as f64 / (n - 1) as f64;
    assert!(
        (fraction - 1.0 / 16.0).abs() < 0.02,
        "{fraction} of neighbors come from one shard, 0.0625 would be random"
    );
    Ok(())
}
