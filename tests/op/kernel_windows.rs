//! Tests of cosine attention within windows: the kernels against the formula in odd sizes, and all forms, with the
//! decoder made of them, against timm's Swin Transformer V2 (CR).

use crate::support::tolerance::{
    assert_near_reference, assert_within_tolerance, compare, forward_backward, kernel_devices, random_inputs,
};
use crate::support::{Outcome, Tensors, normal, oracle, read, write};
use occlude::grid::Grid;
use occlude::op::attention::{Windows, cosine, cosine_attention};
use occlude::part::decoder::Decode;
use occlude::part::decoder::windows::{Config, WindowDecoder, WindowDecoderOptions};
use occlude::part::encoder::vit::Shape;
use occlude::part::mask::Mask;
use occlude::part::params::{Init, ParamSpecs, Weights};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

crate::trials![
    cosine_attention_matches_with_and_without_shift,
    cosine_attention_is_stable_for_zero_rows_and_large_scales,
    cosine_attention_is_deterministic,
    cosine_attention_of_many_windows_sums_partial_results,
    cosine_attention_matches_timm,
    the_window_decoder_matches_timm_blocks,
    windows_are_never_larger_than_the_grid,
];

/// [grid, window, shift, heads, head width].
type Case = ([i64; 2], [i64; 2], [i64; 2], i64, i64);

fn windows(case: &Case, device: Device) -> &'static Windows {
    let (grid, size, shift, ..) = *case;
    Box::leak(Box::new(Windows::new(grid, size, shift, device).expect("windows that divide")))
}

/// Returns qkv [batch, N, 3 D], scales [H] and biases [H, T, T] of a case.
fn case_inputs(seed: u64, batch: i64, case: &Case, kind: Kind) -> Vec<Tensor> {
    let (grid, size, _, heads, width) = *case;
    let tokens = size[0] * size[1];
    let qkv = random_inputs(seed, &[&[batch, grid[0] * grid[1], 3 * heads * width]], kind).remove(0);
    let scale = (normal(seed + 1, &[heads]) * 2.0).exp().to_kind(kind);
    vec![qkv, scale, normal(seed + 2, &[heads, tokens, tokens]).to_kind(kind)]
}

fn kernel_agrees(label: &str, all: &[Tensor], case: Case) {
    for device in kernel_devices() {
        let windows = windows(&case, device);
        let heads = case.3;
        compare(
            &format!("{label} {case:?} on {device:?}"),
            &all.iter().map(|x| x.to_device(device)).collect::<Vec<_>>(),
            &move |x| cosine::kernel(&x[0], heads, windows, [&x[1], &x[2]]).expect("a launch"),
            &move |x| cosine::formula(&x[0], heads, windows, [&x[1], &x[2]]),
        );
    }
}

fn cosine_attention_matches_with_and_without_shift() -> Outcome {
    let cases: [Case; 6] = [
        ([8, 8], [4, 4], [0, 0], 3, 32),
        ([8, 8], [4, 4], [2, 0], 3, 32),
        ([6, 9], [2, 3], [1, 2], 5, 24),
        ([6, 6], [6, 6], [3, 3], 3, 64),
        ([5, 10], [5, 5], [0, 4], 3, 80),
        ([8, 4], [4, 4], [3, 1], 4, 80),
    ];
    for (i, case) in cases.into_iter().enumerate() {
        let kind = if i % 2 == 0 { Kind::BFloat16 } else { Kind::Half };
        kernel_agrees(&format!("{kind:?}"), &case_inputs(10, 3, &case, kind), case);
    }
    Ok(())
}

fn cosine_attention_is_stable_for_zero_rows_and_large_scales() -> Outcome {
    let case: Case = ([4, 8], [4, 4], [0, 2], 2, 32);
    let mut all = case_inputs(20, 1, &case, Kind::BFloat16);
    let _ = all[0].narrow(1, 5, 1).narrow(2, 0, 128).zero_(); // A query and a key without a direction.
    let _ = all[0].narrow(1, 9, 1).narrow(2, 64, 64).fill_(1e-3);
    all[1] = Tensor::from_slice(&[100f32, 0.1]).to_kind(Kind::BFloat16);
    for device in kernel_devices() {
        let windows = windows(&case, device);
        let all: Vec<Tensor> = all.iter().map(|x| x.to_device(device)).collect();
        let output =
            forward_backward(&all, &move |x| cosine::kernel(&x[0], 2, windows, [&x[1], &x[2]]).expect("a launch"));
        for (part, output) in output.iter().enumerate() {
            assert_eq!(output.isfinite().all().int64_value(&[]), 1, "part {part} is finite");
        }
        let exact = cosine::formula(&all[0].to_kind(Kind::Double), 2, windows, [&all[1], &all[2]]);
        let plain = cosine::formula(&all[0], 2, windows, [&all[1], &all[2]]);
        assert_within_tolerance("steep", &output[0], &plain, &exact);
    }
    Ok(())
}

fn cosine_attention_is_deterministic() -> Outcome {
    let case: Case = ([8, 4], [4, 4], [2, 0], 3, 32);
    for device in kernel_devices() {
        let windows = windows(&case, device);
        let all: Vec<Tensor> = case_inputs(30, 2, &case, Kind::BFloat16).iter().map(|x| x.to_device(device)).collect();
        let once =
            || forward_backward(&all, &move |x| cosine::kernel(&x[0], 3, windows, [&x[1], &x[2]]).expect("a launch"));
        assert_eq!(once(), once());
    }
    Ok(())
}

/// More sequences than runs, and the last run shorter than the others.
fn cosine_attention_of_many_windows_sums_partial_results() -> Outcome {
    let case: Case = ([3, 2], [1, 2], [0, 0], 4, 24);
    kernel_agrees("many", &case_inputs(40, 89, &case, Kind::BFloat16), case);
    Ok(())
}

/// Returns the outputs of timm for cases with these tensors.
fn query_timm(label: &str, tensors: &[(String, Tensor)], cases: &[Value]) -> Result<Tensors, libtest_mimic::Failed> {
    let token_grid = tempfile::tempdir()?;
    let [inputs, replies, request] =
        ["in.safetensors", "out.safetensors", "cases.json"].map(|name| token_grid.path().join(name));
    write(&inputs, tensors)?;
    std::fs::write(&request, json!(cases).to_string())?;
    let paths = [&inputs, &replies, &request].map(|path| path.to_str().expect("UTF-8"));
    oracle("swin_cosine.py", &[&[label][..], &paths].concat())?;
    read(&replies)
}

fn assert_close(reference: &Tensors, name: &str, ours: &Tensor) {
    assert_near_reference(reference, name, ours, 2e-5 * reference[name].norm().double_value(&[]));
}

fn cosine_attention_matches_timm() -> Outcome {
    let cases: [Case; 4] = [
        ([8, 8], [4, 4], [0, 0], 4, 32),
        ([16, 8], [4, 4], [2, 0], 4, 32),
        ([6, 10], [3, 5], [1, 2], 3, 24),
        ([8, 12], [4, 4], [2, 2], 3, 64),
    ];
    let names = ["qkv", "scale", "bias"];
    let all: Vec<Vec<Tensor>> =
        (0..).zip(&cases).map(|(i, case)| case_inputs(50 + 3 * i, 2, case, Kind::Half)).collect();
    let mut tensors = Vec::new();
    for (i, (all, (grid, _, _, heads, width))) in all.iter().zip(&cases).enumerate() {
        tensors.extend(names.iter().zip(all).map(|(name, x)| (format!("{name}.{i}"), x.shallow_clone())));
        // The upstream gradient of `tolerance::pass`.
        let upstream = normal(99, &[2, grid[0] * grid[1], heads * width]).to_kind(Kind::Half);
        tensors.push((format!("upstream.{i}"), upstream));
    }
    let list =
        cases.map(|(grid, size, shift, heads, _)| json!({"grid": grid, "size": size, "shift": shift, "heads": heads}));
    let reference = query_timm("attention", &tensors, &list)?;
    for (i, case) in cases.into_iter().enumerate() {
        let windows = windows(&case, Device::Cpu);
        let heads = case.3;
        let leaves: Vec<Tensor> = all[i].iter().map(|x| x.to_kind(Kind::Float).set_requires_grad(true)).collect();
        let out = cosine_attention(&leaves[0], heads, windows, [&leaves[1], &leaves[2]])?;
        (&out * &tensors[4 * i + 3].1).sum(Kind::Float).backward();
        let ours: Vec<Tensor> = std::iter::once(out.detach()).chain(leaves.iter().map(Tensor::grad)).collect();
        let kernels = forward_backward(&all[i], &move |x| {
            cosine::kernel(&x[0], heads, windows, [&x[1], &x[2]]).expect("a launch")
        });
        let plain = forward_backward(&all[i], &move |x| cosine::formula(&x[0], heads, windows, [&x[1], &x[2]]));
        for (part, name) in ["out", "gqkv", "gscale", "gbias"].into_iter().enumerate() {
            let key = format!("{name}.{i}");
            assert_close(&reference, &key, &ours[part]);
            let label = format!("{name} of {case:?}");
            assert_within_tolerance(&label, &kernels[part], &plain[part], &reference[&key]);
        }
    }
    Ok(())
}

fn decoder_weights(table: &ParamSpecs, heads: i64) -> Weights {
    let weights = table.specs().iter().zip(2..).map(|(spec, seed)| {
        if spec.name.ends_with("tau") {
            Tensor::from_slice(&[0.005f32, 0.05, 0.5][..heads as usize]).flip([0])
        } else {
            normal(seed, &spec.shape) * 0.3
        }
    });
    Weights::new(weights.map(|w| w.set_requires_grad(true)).collect())
}

fn the_window_decoder_matches_timm_blocks() -> Outcome {
    const INSIDE: i64 = 20; // the width of the encoder
    let cases = [([8, 8], [4, 4], [2, 0], 3, 3), ([6, 9], [2, 3], [1, 2], 2, 2), ([4, 4], [4, 4], [0, 0], 1, 1)];
    let mut tensors = Vec::new();
    let mut list = Vec::new();
    let mut output = Vec::new();
    for (i, (grid, size, shift, heads, depth)) in cases.into_iter().enumerate() {
        let token_grid = Grid { frames: 1, rows: grid[0], cols: grid[1], channels: 1, patch_frames: 1, patch: 3 };
        let shape = Shape { width: 16 * heads, depth, heads, mlp_ratio: 2 };
        let positions = normal(1, &[token_grid.tokens(), shape.width]);
        let options = WindowDecoderOptions {
            mask_token: Init::Normal(0.02),
            positions: positions.shallow_clone(),
            windows: Config { size, shift },
        };
        let mut table = ParamSpecs::default();
        let decoder = WindowDecoder::new(&mut table, "d", &token_grid, INSIDE, &shape, options)?;
        let weights = decoder_weights(&table, heads);
        let kept = token_grid.tokens() / 3;
        let order =
            Tensor::stack(&[normal(7, &[token_grid.tokens()]), normal(8, &[token_grid.tokens()])], 0).argsort(1, false);
        let mask = Mask::from_order(&order, kept);
        let features = normal(9, &[2, 1 + kept, INSIDE]).set_requires_grad(true);
        let out = decoder.forward(&weights, &features, &mask)?;
        let upstream = normal(10, &out.size());
        (&out * &upstream).sum(Kind::Float).backward();
        for (name, tensor) in [("features", &features), ("keep", &mask.keep), ("drop", &mask.drop)]
            .into_iter()
            .chain([("positions", &positions), ("upstream", &upstream)])
        {
            tensors.push((format!("{name}.{i}"), tensor.detach()));
        }
        let names: Vec<String> = table.specs().iter().map(|spec| spec.name["d.".len()..].to_owned()).collect();
        tensors.extend(names.iter().zip(&weights.0).map(|(name, w)| (format!("w.{i}.{name}"), w.detach())));
        list.push(json!({"grid": grid, "size": size, "shift": shift, "heads": heads, "depth": depth}));
        output.push((out.detach(), features.grad(), names, weights));
    }
    let reference = query_timm("decoder", &tensors, &list)?;
    for (i, (out, gfeatures, names, weights)) in output.iter().enumerate() {
        assert_close(&reference, &format!("out.{i}"), out);
        // The features of the class token are not read.
        assert_eq!(gfeatures.narrow(1, 0, 1).abs().max().double_value(&[]), 0.0);
        assert_close(&reference, &format!("gfeatures.{i}"), gfeatures);
        for (name, weight) in names.iter().zip(&weights.0) {
            let ours = weight.grad();
            let key = format!("gw.{i}.{name}");
            // A constant added to all scores of a head changes nothing, nor does a scale at its minimum.
            if reference[&key].abs().max().double_value(&[]) < 1e-12 {
                assert!(ours.abs().max().double_value(&[]) < 1e-5, "{name} of case {i}")
            } else {
                assert_close(&reference, &key, &ours)
            }
        }
    }
    Ok(())
}

fn windows_are_never_larger_than_the_grid() -> Outcome {
    let grid = Grid { frames: 1, rows: 6, cols: 2, channels: 1, patch_frames: 1, patch: 2 };
    let shape = Shape { width: 8, depth: 2, heads: 2, mlp_ratio: 1 };
    let options = |size| WindowDecoderOptions {
        mask_token: Init::Zero,
        positions: normal(1, &[12, 8]),
        windows: Config { size, shift: [1, 1] },
    };
    let mut table = ParamSpecs::default();
    let decoder = WindowDecoder::new(&mut table, "d", &grid, 4, &shape, options([3, 5]))?;
    let weights =
        Weights::new(table.specs().iter().zip(2..).map(|(spec, seed)| normal(seed, &spec.shape) * 0.5).collect());
    let x = normal(5, &[1, 12, 8]);
    let all = decoder.forward_blocks(&weights, x.shallow_clone(), None)?;
    // The rows of a window are 3, 0 .. 2 and 3 .. 5, then 1 .. 3 and 4, 5 and 0: row 0 does not reach row 4 through
    // them.
    let moved = &x
        + normal(6, &[1, 12, 8])
            * Tensor::from_slice(&[0f32; 12]).index_fill(0, &Tensor::from_slice(&[0i64, 1]), 1.0).view([1, 12, 1]);
    let near = decoder.forward_blocks(&weights, moved, None)?;
    let difference = (all - near).abs().amax([0i64, 2].as_slice(), false); // by token
    let by_row = Vec::<f32>::try_from(difference.view([6, 2]).amax([1i64].as_slice(), false))?;
    assert!(
        by_row[..4].iter().all(|&difference| difference > 0.0)
            && by_row[4..].iter().all(|&difference| difference == 0.0),
        "{by_row:?}"
    );
    let refused =
        WindowDecoder::new(&mut ParamSpecs::default(), "d", &grid, 4, &shape, options([4, 2])).err().expect("an error");
    assert!(refused.message.contains("windows of 4 rows"), "{refused}");
    Ok(())
}
