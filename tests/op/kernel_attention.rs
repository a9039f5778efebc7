//! Tests of the attention kernels against their formulas: values and gradients, in odd sizes.

use crate::support::tolerance::{
    assert_within_tolerance, compare, compare_kernel, forward_backward, kernel_devices, random_inputs, rms,
};
use crate::support::{Outcome, distance, normal, oracle, read, write};
use occlude::op::attention::{self, AttentionMask, Windows, class_row, cross};
use serde_json::json;
use tch::{Device, Kind};

crate::trials![
    attention_matches_in_odd_lengths,
    attention_matches_for_every_head_width,
    attention_of_requested_queries_matches,
    causal_attention_matches,
    cross_attention_matches,
    window_attention_matches_with_and_without_shift,
    window_attention_matches_timm,
    attention_is_stable_for_large_scores_and_odd_positions,
    attention_is_deterministic,
    class_token_attention_matches,
    long_sequences_fall_back_to_the_library,
];

/// [batch, tokens, heads, head width] of packed attention.
fn packed([batch, tokens, heads, width]: [i64; 4], kind: Kind, mask: AttentionMask<'static>, name: &str) {
    compare_kernel(
        &format!("{name}, {batch} × {tokens} tokens, {heads} heads of {width} in {kind:?}"),
        &random_inputs(10, &[&[batch, tokens, 3 * heads * width]], kind),
        &move |x| attention::kernel(&x[0], heads, mask).expect("a launch"),
        &move |x| attention::formula(&x[0], heads, mask),
    );
}

const ALL: AttentionMask = AttentionMask::Full { from: 0 };

fn attention_matches_in_odd_lengths() -> Outcome {
    for (tokens, width) in [(1, 32), (17, 64), (50, 64), (65, 80), (99, 24), (160, 32), (197, 32)] {
        packed([1, tokens, 1, width], Kind::BFloat16, ALL, "all");
    }
    packed([1, 320, 1, 24], Kind::Half, ALL, "all");
    Ok(())
}

fn attention_matches_for_every_head_width() -> Outcome {
    for width in [24, 32, 64, 80] {
        for (batch, heads) in [(3, 1), (1, 3), (2, 5)] {
            packed([batch, 19, heads, width], Kind::BFloat16, ALL, "all");
        }
    }
    packed([3, 19, 3, 64], Kind::Half, ALL, "all");
    Ok(())
}

fn attention_of_requested_queries_matches() -> Outcome {
    for (tokens, from, width) in [(2, 1, 24), (35, 1, 32), (50, 33, 64), (19, 18, 80)] {
        packed([2, tokens, 3, width], Kind::BFloat16, AttentionMask::Full { from }, &format!("from {from}"));
    }
    Ok(())
}

fn causal_attention_matches() -> Outcome {
    for (tokens, width) in [(1, 64), (16, 32), (17, 24), (50, 80), (99, 32)] {
        packed([2, tokens, 1, width], Kind::BFloat16, AttentionMask::Causal, "causal");
    }
    packed([1, 70, 2, 64], Kind::Half, AttentionMask::Causal, "causal");
    Ok(())
}

fn cross_attention_matches() -> Outcome {
    for (queries, keys, heads, width) in
        [(1, 17, 3, 32), (50, 7, 1, 64), (33, 65, 2, 24), (16, 1, 1, 80), (3, 99, 2, 80)]
    {
        compare_kernel(
            &format!("{queries} queries over {keys} keys, {heads} heads of {width}"),
            &random_inputs(20, &[&[2, queries, heads * width], &[2, keys, 2 * heads * width]], Kind::BFloat16),
            &move |x| cross::kernel(&x[0], &x[1], heads).expect("a launch"),
            &move |x| cross::formula(&x[0], &x[1], heads),
        );
    }
    Ok(())
}

fn window_attention_matches_with_and_without_shift() -> Outcome {
    let cases = [
        ([8, 8], [4, 4], [0, 0], 3, 32),
        ([8, 8], [4, 4], [2, 0], 3, 32),
        ([6, 9], [2, 3], [1, 2], 5, 24),
        ([6, 6], [6, 6], [3, 3], 1, 64),
        ([8, 4], [4, 4], [3, 1], 1, 80),
    ];
    for (grid, size, shift, heads, width) in cases {
        for device in kernel_devices() {
            let windows: &'static Windows = Box::leak(Box::new(Windows::new(grid, size, shift, device)?));
            let mask = AttentionMask::Windows(windows);
            let inputs = random_inputs(30, &[&[2, grid[0] * grid[1], 3 * heads * width]], Kind::Half);
            compare(
                &format!("windows of {size:?} of {grid:?} moved by {shift:?}, {heads} heads of {width} on {device:?}"),
                &inputs.iter().map(|x| x.to_device(device)).collect::<Vec<_>>(),
                &move |x| attention::kernel(&x[0], heads, mask).expect("a launch"),
                &move |x| attention::formula(&x[0], heads, mask),
            );
        }
    }
    Ok(())
}

fn attention_is_stable_for_large_scores_and_odd_positions() -> Outcome {
    // Scores far beyond the range of the plain exponential, in sequences longer than one block of the running maximum.
    for spread in [1e-3, 12.0] {
        compare_kernel(
            &format!("× {spread}"),
            &random_inputs(40, &[&[1, 90, 3 * 64]], Kind::BFloat16).iter().map(|x| x * spread).collect::<Vec<_>>(),
            &|x| attention::kernel(&x[0], 1, ALL).expect("a launch"),
            &|x| attention::formula(&x[0], 1, ALL),
        );
    }
    // Rows of a larger tensor, and a gradient with strides of 0.
    compare_kernel(
        "a part of a tensor",
        &random_inputs(41, &[&[3, 21, 3 * 32 + 1]], Kind::BFloat16),
        &|x| attention::kernel(&x[0].narrow(0, 1, 2).narrow(2, 1, 96), 1, ALL).expect("a launch").sum(Kind::Float),
        &|x| attention::formula(&x[0].narrow(0, 1, 2).narrow(2, 1, 96), 1, ALL).sum(Kind::Float),
    );
    Ok(())
}

fn attention_is_deterministic() -> Outcome {
    for device in kernel_devices() {
        let qkv = random_inputs(50, &[&[1, 50, 3 * 3 * 32]], Kind::BFloat16).remove(0).to_device(device);
        let once =
            || forward_backward(&[qkv.shallow_clone()], &|x| attention::kernel(&x[0], 3, ALL).expect("a launch"));
        assert_eq!(once(), once());
    }
    Ok(())
}

fn class_token_attention_matches() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for (batch, tokens, heads, width) in [(1, 1, 1, 32), (3, 50, 3, 64), (1, 197, 5, 24), (2, 17, 1, 80)] {
            for device in kernel_devices() {
                let qkv = random_inputs(60, &[&[batch, tokens, 3 * heads * width]], kind).remove(0).to_device(device);
                let exact = class_row::formula(&qkv.to_kind(Kind::Double), heads);
                let ours = class_row::kernel(&qkv, heads)?;
                let plain = class_row::formula(&qkv, heads);
                assert_within_tolerance(
                    &format!("{tokens} tokens, {heads} heads of {width} in {kind:?}"),
                    &ours,
                    &plain,
                    &exact,
                );
                let sums = ours.sum_dim_intlist([-1i64].as_slice(), false, Kind::Float) - 1;
                assert!(sums.abs().max().double_value(&[]) < 1e-5, "{tokens} tokens: probabilities sum to one");
            }
        }
    }
    Ok(())
}

fn long_sequences_fall_back_to_the_library() -> Outcome {
    let takes = |kind, width, tokens| attention::is_supported(kind, width, tokens, tokens);
    let half = Kind::BFloat16;
    for (width, longest) in [(24, 320), (32, 320), (64, 272), (80, 224)] {
        assert!(takes(half, width, longest) && !takes(half, width, longest + 1), "heads of {width}");
    }
    assert!(!takes(Kind::Float, 64, 50) && !takes(half, 48, 50));
    assert!(attention::is_supported(half, 80, 1, 320) && !attention::is_supported(half, 32, 1, 321));
    let refused = Windows::new([8, 8], [4, 3], [0, 0], Device::Cpu).err().expect("an error");
    assert!(refused.message.contains("windows of 3 columns"), "{refused}");
    assert!(Windows::new([8, 8], [4, 4], [4, 0], Device::Cpu).is_err());
    Ok(())
}

/// Windows as in timm's Swin Transformer: the library form in fp32 and our kernel in f16, values and gradients.
fn window_attention_matches_timm() -> Outcome {
    let cases = [
        ([8, 8], [4, 4], [0, 0], 2, 32),
        ([16, 8], [4, 4], [2, 0], 2, 32),
        ([8, 12], [4, 4], [2, 2], 1, 24),
        ([6, 10], [3, 5], [1, 2], 1, 64),
    ];
    let folder = tempfile::tempdir()?;
    let [inputs, replies, request] =
        ["in.safetensors", "out.safetensors", "cases.json"].map(|name| folder.path().join(name));
    let mut tensors = Vec::new();
    for (i, (grid, _, _, heads, width)) in cases.iter().enumerate() {
        let shape = |each: i64| [2, grid[0] * grid[1], each * heads * width];
        tensors.push((format!("qkv.{i}"), normal(70 + i as u64, &shape(3)).to_kind(Kind::Half)));
        // The upstream gradient of `tolerance::pass`.
        tensors.push((format!("upstream.{i}"), normal(99, &shape(1)).to_kind(Kind::Half)));
    }
    write(&inputs, &tensors)?;
    let list =
        cases.map(|(grid, size, shift, heads, _)| json!({"grid": grid, "size": size, "shift": shift, "heads": heads}));
    std::fs::write(&request, json!(list).to_string())?;
    let paths = [&inputs, &replies, &request].map(|path| path.to_str().expect("UTF-8"));
    oracle("swin_windows.py", &paths)?;
    let reference = read(&replies)?;
    for (i, (grid, size, shift, heads, _)) in cases.into_iter().enumerate() {
        let windows: &'static Windows = Box::leak(Box::new(Windows::new(grid, size, shift, Device::Cpu)?));
        let mask = AttentionMask::Windows(windows);
        let half = &tensors[2 * i].1;
        let leaf = half.to_kind(Kind::Float).set_requires_grad(true);
        let out = attention::windowed_attention(&leaf, heads, windows)?;
        (&out * &tensors[2 * i + 1].1).sum(Kind::Float).backward();
        let ours = [out.detach(), leaf.grad()];
        let kernels = forward_backward(&[half.shallow_clone()], &move |x| {
            attention::kernel(&x[0], heads, mask).expect("a launch")
        });
        let plain = forward_backward(&[half.shallow_clone()], &move |x| attention::formula(&x[0], heads, mask));
        for (part, name) in ["out", "gqkv"].into_iter().enumerate() {
            let label = format!("{name} of case {i}");
            let exact = &reference[&format!("{name}.{i}")];
            let difference = distance(&ours[part], exact) / rms(exact) / (exact.numel() as f64).sqrt();
            assert!(difference < 1e-5, "{label}: relative distance {difference:e} from timm");
            assert_within_tolerance(&label, &kernels[part], &plain[part], exact);
        }
    }
    Ok(())
}
