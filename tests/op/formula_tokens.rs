//! Tests of the plain formulas over tokens and patches: assembly of the token sequence, patches and shuffles.

use crate::support::{Outcome, normal};
use occlude::grid::Grid;
use occlude::op::patch::{ChannelStats, gather, gather_patches, patchify, unpatchify};
use occlude::op::shuffle::{SampleKey, shuffle};
use occlude::op::tokens;
use tch::{Device, Kind, Tensor};

crate::trials![
    token_assembly_puts_every_token_in_place,
    token_assembly_puts_the_class_token_first,
    token_assembly_works_without_a_class_token,
    token_assembly_sends_gradients_to_mask_and_visible_tokens,
    patches_have_the_official_order,
    pixels_are_the_inverse_of_patches,
    patch_reads_bytes_like_normalized_floats,
    the_shuffle_of_a_sample_depends_only_on_its_key,
];

/// Returns visible tokens [2, 1 + 3, 5], mask token [5], positions [7, 5], keep [2, 3], drop [2, 4].
fn sequence() -> [Tensor; 5] {
    let order = Tensor::from_slice2(&[[4i64, 0, 6, 1, 5, 2, 3], [2, 3, 1, 0, 6, 5, 4]]);
    let keep = order.narrow(1, 0, 3);
    let drop = order.narrow(1, 3, 4);
    [normal(17, &[2, 4, 5]), normal(18, &[5]), normal(19, &[7, 5]), keep, drop]
}

fn assemble(visible: &Tensor, token: &Tensor, positions: &Tensor, keep: &Tensor, drop: &Tensor) -> Tensor {
    let ranges = tokens::TokenLayout { positions, keep, hidden: Some((token, drop)) };
    tokens::assemble_tokens(visible, None, ranges).expect("on a CPU")
}

/// Two frames per token, a grid that is not square, two channels.
pub const GRID: Grid = Grid { frames: 2, rows: 3, cols: 5, channels: 2, patch_frames: 2, patch: 3 };

pub fn bytes(batch: i64) -> Tensor {
    let [c, t, y, x] = GRID.pixel_shape();
    let n = batch * c * t * y * x;
    (Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 37 + 11)
        .remainder(251)
        .to_kind(Kind::Uint8)
        .view([batch, c, t, y, x])
}

fn token_assembly_puts_every_token_in_place() -> Outcome {
    let [visible, token, positions, keep, drop] = sequence();
    let all = assemble(&visible, &token, &positions, &keep, &drop);
    assert_eq!(all.size(), [2, 8, 5]);
    for b in 0..2 {
        for s in 0..8 {
            for d in 0..5 {
                let position = |index: &Tensor, at: i64| positions.double_value(&[index.int64_value(&[b, at]), d]);
                let expected = match s {
                    0 => visible.double_value(&[b, 0, d]),
                    1..=3 => visible.double_value(&[b, s, d]) + position(&keep, s - 1),
                    _ => token.double_value(&[d]) + position(&drop, s - 4),
                };
                let ours = all.double_value(&[b, s, d]);
                assert!(
                    (ours - expected).abs() <= 1e-6,
                    "sample {b}, token {s}, channel {d}: {ours} against {expected}"
                );
            }
        }
    }
    Ok(())
}

fn token_assembly_puts_the_class_token_first() -> Outcome {
    let [found, token, positions, keep, drop] = sequence();
    let all = assemble(&found, &token, &positions, &keep, &drop);
    let class = found.get(0).get(0);
    let visible = found.narrow(1, 1, 3);
    for hidden in [None, Some((&token, &drop))] {
        let apart = tokens::assemble_tokens(
            &visible,
            Some(&class),
            tokens::TokenLayout { positions: &positions, keep: &keep, hidden },
        )?;
        assert_eq!(apart.size()[1], if hidden.is_some() { 8 } else { 4 });
        for b in 0..2 {
            assert!(apart.get(b).get(0).equal(&class), "sample {b}");
            let tokens = apart.size()[1] - 1;
            assert!(apart.get(b).narrow(0, 1, tokens).equal(&all.get(b).narrow(0, 1, tokens)), "sample {b}");
        }
    }
    Ok(())
}

fn token_assembly_works_without_a_class_token() -> Outcome {
    let [visible, token, positions, keep, drop] = sequence();
    let with = assemble(&visible, &token, &positions, &keep, &drop);
    let without = assemble(&visible.narrow(1, 1, 3), &token, &positions, &keep, &drop);
    assert!(without.equal(&with.narrow(1, 1, 7)), "the other tokens are the same");
    Ok(())
}

fn token_assembly_sends_gradients_to_mask_and_visible_tokens() -> Outcome {
    let [visible, token, positions, keep, drop] = sequence();
    let visible = visible.set_requires_grad(true);
    let token = token.set_requires_grad(true);
    let upstream = normal(20, &[2, 8, 5]);
    (assemble(&visible, &token, &positions, &keep, &drop) * &upstream).sum(Kind::Float).backward();
    assert!(visible.grad().equal(&upstream.narrow(1, 0, 4)), "visible tokens come first, with the class token");
    let expected = upstream.narrow(1, 4, 4).sum_dim_intlist([0i64, 1].as_slice(), false, Kind::Float);
    let difference = (token.grad() - expected).abs().max().double_value(&[]);
    assert!(difference <= 1e-6, "the gradient of the mask token is off by {difference:e}");
    Ok(())
}

fn patches_have_the_official_order() -> Outcome {
    let x = bytes(2);
    let rows = patchify(&x, &GRID);
    assert_eq!((rows.size(), rows.kind()), (vec![2, GRID.tokens(), GRID.patch_values()], Kind::Uint8));
    let Grid { rows: high, cols: compute_kind, channels, patch_frames, patch, .. } = GRID;
    for token in 0..GRID.tokens() {
        let frame = token / (high * compute_kind);
        let row = token / compute_kind % high;
        let col = token % compute_kind;
        for value in 0..GRID.patch_values() {
            let c = value % channels;
            let px = value / channels % patch;
            let py = value / channels / patch % patch;
            let f = value / channels / patch / patch;
            let at = [1, c, frame * patch_frames + f, row * patch + py, col * patch + px];
            let ours = rows.int64_value(&[1, token, value]);
            let expected = x.int64_value(&at);
            assert_eq!(ours, expected, "token {token}, value {value}");
        }
    }
    Ok(())
}

fn pixels_are_the_inverse_of_patches() -> Outcome {
    let x = bytes(3);
    assert!(unpatchify(&patchify(&x, &GRID), &GRID).equal(&x), "bytes");
    let x = normal(21, &x.size());
    assert!(unpatchify(&patchify(&x, &GRID), &GRID).equal(&x), "floats");
    Ok(())
}

fn patch_reads_bytes_like_normalized_floats() -> Outcome {
    let scale = ChannelStats { mean: vec![0.2, 0.7], std: vec![0.3, 0.11] };
    let x = bytes(2);
    let index = Tensor::from_slice2(&[[29i64, 0, 7, 7], [3, 28, 1, 14]]);
    let ours = gather_patches(&x, &GRID, &scale, &index, Kind::Float)?;
    assert_eq!((ours.size(), ours.kind()), (vec![2, 4, GRID.patch_values()], Kind::Float));
    let constants = |values: &[f64]| Tensor::from_slice(values).view([1, -1, 1, 1, 1]);
    let exact = (x.to_kind(Kind::Double) / 255.0 - constants(&scale.mean)) / constants(&scale.std);
    let difference = (&ours - gather_patches(&exact.to_kind(Kind::Float), &GRID, &scale, &index, Kind::Float)?)
        .abs()
        .max()
        .double_value(&[]);
    assert!(difference <= 2e-6, "off by {difference:e} where values reach 7");
    for (b, k) in [(0, 0), (0, 3), (1, 1)] {
        let row = patchify(&exact, &GRID).get(b).get(index.int64_value(&[b, k]));
        let difference = (ours.get(b).get(k) - row).abs().max().double_value(&[]);
        assert!(difference <= 2e-6, "row {k} of sample {b} is not the requested one");
    }
    // And back, for images.
    let unit = scale.denormalize(&exact.to_kind(Kind::Float)) * 255.0;
    let difference = (unit - x.to_kind(Kind::Float)).abs().max().double_value(&[]);
    assert!(difference <= 1e-3, "restored pixels are off by {difference}");
    assert_eq!(gather(&patchify(&x, &GRID), &index).kind(), Kind::Uint8, "gathered before it is converted");
    Ok(())
}

fn the_shuffle_of_a_sample_depends_only_on_its_key() -> Outcome {
    let origin = |id, epoch, repeat| SampleKey { id, epoch, repeat };
    let draw = |seed, samples: &[SampleKey]| shuffle(seed, samples, 30, Device::Cpu);
    let a = origin(5, 0, 0);
    let b = origin(u64::MAX, 3, 0);
    let c = origin(9, 1, 2);
    let all = draw(1, &[a, b, c]);
    assert_eq!((all.size(), all.kind()), (vec![3, 30], Kind::Int64));
    let (sorted, _) = all.sort(1, false);
    assert!(sorted.equal(&Tensor::arange(30, (Kind::Int64, Device::Cpu)).expand([3, 30], false)), "permutations");
    for (batch, row, full) in [(vec![a], 0, 0), (vec![c, a], 0, 2), (vec![b, b, b, a], 3, 0), (vec![c, b], 1, 1)] {
        assert!(draw(1, &batch).get(row).equal(&all.get(full)), "the order depends on the batch");
    }
    for other in [draw(2, &[a]), draw(1, &[origin(6, 0, 0)]), draw(1, &[origin(5, 1, 0)]), draw(1, &[origin(5, 0, 1)])]
    {
        assert!(!other.get(0).equal(&all.get(0)), "seed, sample, epoch and repeat each change the order");
    }
    Ok(())
}
