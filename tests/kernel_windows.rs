//! Cosine attention within windows: the kernels against the formula in odd sizes, and all forms, with the decoder that is
//! made of them, against timm's Swin Transformer V2 (CR).

use crate::bar::{compare, grounds, inputs, judge, pass, rms};
use crate::support::{Outcome, Tensors, distance, normal, oracle, read, write};
use occlude::grid::Grid;
use occlude::op::attention::{Windows, cosine};
use occlude::part::decoder::Decode;
use occlude::part::decoder::windows::{Config, Decoder, Make};
use occlude::part::encoder::vit::Shape;
use occlude::part::mask::Mask;
use occlude::part::weights::{Init, Table, Weights};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

crate::trials![
    cosine_attention_agrees_shifted_or_not,
    cosine_attention_holds_out_against_rows_of_nothing_and_steep_scales,
    cosine_attention_is_the_same_to_the_bit_every_time,
    cosine_attention_of_many_windows_sums_up_in_runs,
    cosine_attention_is_timms,
    a_decoder_of_windows_is_timms_blocks,
    a_window_is_never_larger_than_the_grid,
];

/// [grid, window, shift, heads, width of a head].
type Case = ([i64; 2], [i64; 2], [i64; 2], i64, i64);

fn windows(case: &Case, ground: Device) -> &'static Windows {
    let (grid, size, shift, ..) = *case;
    Box::leak(Box::new(Windows::new(grid, size, shift, ground).expect("windows that divide")))
}

/// qkv [batch, N, 3 D], scales [H] and biases [H, T, T] of a case.
fn given(seed: u64, batch: i64, case: &Case, kind: Kind) -> Vec<Tensor> {
    let (grid, size, _, heads, width) = *case;
    let tokens = size[0] * size[1];
    let qkv = inputs(seed, &[&[batch, grid[0] * grid[1], 3 * heads * width]], kind).remove(0);
    let scale = (normal(seed + 1, &[heads]) * 2.0).exp().to_kind(kind);
    vec![qkv, scale, normal(seed + 2, &[heads, tokens, tokens]).to_kind(kind)]
}

fn kernel_agrees(what: &str, all: &[Tensor], case: Case) {
    for ground in grounds() {
        let windows = windows(&case, ground);
        let heads = case.3;
        compare(
            &format!("{what} {case:?} on {ground:?}"),
            &all.iter().map(|x| x.to_device(ground)).collect::<Vec<_>>(),
            &move |x| cosine::kernel(&x[0], heads, windows, [&x[1], &x[2]]).expect("a launch"),
            &move |x| cosine::formula(&x[0], heads, windows, [&x[1], &x[2]]),
        );
    }
}

fn cosine_attention_agrees_shifted_or_not() -> Outcome {
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
        kernel_agrees(&format!("{kind:?}"), &given(10, 3, &case, kind), case);
    }
    Ok(())
}

fn cosine_attention_holds_out_against_rows_of_nothing_and_steep_scales() -> Outcome {
    let case: Case = ([4, 8], [4, 4], [0, 2], 2, 32);
    let mut all = given(20, 1, &case, Kind::BFloat16);
    let _ = all[0].narrow(1, 5, 1).narrow(2, 0, 128).zero_(); // A query and a key without a direction.
    let _ = all[0].narrow(1, 9, 1).narrow(2, 64, 64).fill_(1e-3);
    all[1] = Tensor::from_slice(&[100f32, 0.1]).to_kind(Kind::BFloat16);
    for ground in grounds() {
        let windows = windows(&case, ground);
        let all: Vec<Tensor> = all.iter().map(|x| x.to_device(ground)).collect();
        let made = pass(&all, &move |x| cosine::kernel(&x[0], 2, windows, [&x[1], &x[2]]).expect("a launch"));
        for (part, made) in made.iter().enumerate() {
            assert_eq!(made.isfinite().all().int64_value(&[]), 1, "part {part} is finite");
        }
        let exact = cosine::formula(&all[0].to_kind(Kind::Double), 2, windows, [&all[1], &all[2]]);
        let plain = cosine::formula(&all[0], 2, windows, [&all[1], &all[2]]);
        judge("steep", &made[0], &plain, &exact);
    }
    Ok(())
}

fn cosine_attention_is_the_same_to_the_bit_every_time() -> Outcome {
    let case: Case = ([8, 4], [4, 4], [2, 0], 3, 32);
    for ground in grounds() {
        let windows = windows(&case, ground);
        let all: Vec<Tensor> = given(30, 2, &case, Kind::BFloat16).iter().map(|x| x.to_device(ground)).collect();
        let once = || pass(&all, &move |x| cosine::kernel(&x[0], 3, windows, [&x[1], &x[2]]).expect("a launch"));
        assert_eq!(once(), once());
    }
    Ok(())
}

/// More sequences than there are runs, and the last run shorter than the others.
fn cosine_attention_of_many_windows_sums_up_in_runs() -> Outcome {
    let case: Case = ([3, 2], [1, 2], [0, 0], 4, 24);
    kernel_agrees("many", &given(40, 89, &case, Kind::BFloat16), case);
    Ok(())
}

/// timm's answers to cases, whose tensors are `tensors`.
fn ask(what: &str, tensors: &[(String, Tensor)], cases: &[Value]) -> Result<Tensors, libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let [given, answers, asked] =
        ["in.safetensors", "out.safetensors", "cases.json"].map(|name| folder.path().join(name));
    write(&given, tensors)?;
    std::fs::write(&asked, json!(cases).to_string())?;
    let paths = [&given, &answers, &asked].map(|path| path.to_str().expect("UTF-8"));
    oracle("swin_cosine.py", &[&[what][..], &paths].concat())?;
    read(&answers)
}

fn near(what: &str, ours: &Tensor, exact: &Tensor) {
    let size = rms(exact) * (exact.numel() as f64).sqrt();
    let off = distance(&ours.to_kind(Kind::Double), exact);
    assert!(off <= 2e-5 * size, "{what}: {off:e} from timm's, whose norm is {size:e}");
}

fn cosine_attention_is_timms() -> Outcome {
    let cases: [Case; 4] = [
        ([8, 8], [4, 4], [0, 0], 4, 32),
        ([16, 8], [4, 4], [2, 0], 4, 32),
        ([6, 10], [3, 5], [1, 2], 3, 24),
        ([8, 12], [4, 4], [2, 2], 3, 64),
    ];
    let names = ["qkv", "scale", "bias"];
    let all: Vec<Vec<Tensor>> = (0..).zip(&cases).map(|(i, case)| given(50 + 3 * i, 2, case, Kind::Half)).collect();
    let mut tensors = Vec::new();
    for (i, (all, (grid, _, _, heads, width))) in all.iter().zip(&cases).enumerate() {
        tensors.extend(names.iter().zip(all).map(|(name, x)| (format!("{name}.{i}"), x.shallow_clone())));
        // The upstream gradient of `bar::pass`.
        let upstream = normal(99, &[2, grid[0] * grid[1], heads * width]).to_kind(Kind::Half);
        tensors.push((format!("upstream.{i}"), upstream));
    }
    let list =
        cases.map(|(grid, size, shift, heads, _)| json!({"grid": grid, "size": size, "shift": shift, "heads": heads}));
    let theirs = ask("attention", &tensors, &list)?;
    for (i, case) in cases.into_iter().enumerate() {
        let (windows, heads) = (windows(&case, Device::Cpu), case.3);
        let leaves: Vec<Tensor> = all[i].iter().map(|x| x.to_kind(Kind::Float).set_requires_grad(true)).collect();
        let out = cosine(&leaves[0], heads, windows, [&leaves[1], &leaves[2]])?;
        (&out * &tensors[4 * i + 3].1).sum(Kind::Float).backward();
        let ours: Vec<Tensor> = std::iter::once(out.detach()).chain(leaves.iter().map(Tensor::grad)).collect();
        let kernels = pass(&all[i], &move |x| cosine::kernel(&x[0], heads, windows, [&x[1], &x[2]]).expect("a launch"));
        let plain = pass(&all[i], &move |x| cosine::formula(&x[0], heads, windows, [&x[1], &x[2]]));
        for (part, name) in ["out", "gqkv", "gscale", "gbias"].into_iter().enumerate() {
            let (what, exact) = (format!("{name} of {case:?}"), &theirs[&format!("{name}.{i}")]);
            near(&what, &ours[part], exact);
            judge(&what, &kernels[part], &plain[part], exact);
        }
    }
    Ok(())
}

fn a_decoder_of_windows_is_timms_blocks() -> Outcome {
    const INSIDE: i64 = 20; // the encoder's width
    let cases = [([8, 8], [4, 4], [2, 0], 3, 3), ([6, 9], [2, 3], [1, 2], 2, 2), ([4, 4], [4, 4], [0, 0], 1, 1)];
    let (mut tensors, mut list, mut made) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (grid, size, shift, heads, depth)) in cases.into_iter().enumerate() {
        let place = Grid { frames: 1, rows: grid[0], cols: grid[1], channels: 1, patch_frames: 1, patch: 3 };
        let shape = Shape { width: 16 * heads, depth, heads, mlp_ratio: 2 };
        let positions = normal(1, &[place.tokens(), shape.width]);
        let make =
            Make { token: Init::Normal(0.02), positions: positions.shallow_clone(), windows: Config { size, shift } };
        let mut table = Table::default();
        let decoder = Decoder::new(&mut table, "d", &place, INSIDE, &shape, make)?;
        let weights = table.specs().iter().zip(2..).map(|(spec, seed)| match spec.name.ends_with("tau") {
            // One that is held at its least, the others between.
            true => Tensor::from_slice(&[0.005f32, 0.05, 0.5][..heads as usize]).flip([0]),
            false => normal(seed, &spec.shape) * 0.3,
        });
        let weights = Weights::new(weights.map(|w| w.set_requires_grad(true)).collect());
        let kept = place.tokens() / 3;
        let order = Tensor::stack(&[normal(7, &[place.tokens()]), normal(8, &[place.tokens()])], 0).argsort(1, false);
        let mask = Mask::from_order(&order, kept);
        let features = normal(9, &[2, 1 + kept, INSIDE]).set_requires_grad(true);
        let out = decoder.guess(&weights, &features, &mask)?;
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
        made.push((out.detach(), features.grad(), names, weights));
    }
    let theirs = ask("decoder", &tensors, &list)?;
    for (i, (out, gfeatures, names, weights)) in made.iter().enumerate() {
        near(&format!("guesses of case {i}"), out, &theirs[&format!("out.{i}")]);
        // The class token's features are not read.
        assert_eq!(gfeatures.narrow(1, 0, 1).abs().max().double_value(&[]), 0.0);
        near(&format!("features' gradient of case {i}"), gfeatures, &theirs[&format!("gfeatures.{i}")]);
        for (name, weight) in names.iter().zip(&weights.0) {
            let (ours, exact) = (weight.grad(), &theirs[&format!("gw.{i}.{name}")]);
            // What is added to all scores of a head changes nothing, nor does what is held at its least.
            match exact.abs().max().double_value(&[]) < 1e-12 {
                true => assert!(ours.abs().max().double_value(&[]) < 1e-5, "{name} of case {i}"),
                false => near(&format!("gradient of {name} of case {i}"), &ours.view_as(exact), exact),
            }
        }
    }
    Ok(())
}

fn a_window_is_never_larger_than_the_grid() -> Outcome {
    let grid = Grid { frames: 1, rows: 6, cols: 2, channels: 1, patch_frames: 1, patch: 2 };
    let shape = Shape { width: 8, depth: 2, heads: 2, mlp_ratio: 1 };
    let make =
        |size| Make { token: Init::Zero, positions: normal(1, &[12, 8]), windows: Config { size, shift: [1, 1] } };
    let mut table = Table::default();
    let decoder = Decoder::new(&mut table, "d", &grid, 4, &shape, make([3, 5]))?;
    let weights =
        Weights::new(table.specs().iter().zip(2..).map(|(spec, seed)| normal(seed, &spec.shape) * 0.5).collect());
    let x = normal(5, &[1, 12, 8]);
    let all = decoder.transform(&weights, x.shallow_clone(), None)?;
    // The rows of a window are 3, 0 .. 2 and 3 .. 5, then 1 .. 3 and 4, 5 and 0: row 0 does not reach row 4 through them.
    let moved = &x
        + normal(6, &[1, 12, 8])
            * Tensor::from_slice(&[0f32; 12]).index_fill(0, &Tensor::from_slice(&[0i64, 1]), 1.0).view([1, 12, 1]);
    let near = decoder.transform(&weights, moved, None)?;
    let off = (all - near).abs().amax([0i64, 2].as_slice(), false); // by token
    let by_row = Vec::<f32>::try_from(off.view([6, 2]).amax([1i64].as_slice(), false))?;
    assert!(by_row[..4].iter().all(|&off| off > 0.0) && by_row[4..].iter().all(|&off| off == 0.0), "{by_row:?}");
    let refused = Decoder::new(&mut Table::default(), "d", &grid, 4, &shape, make([4, 2])).err().expect("a fault");
    assert!(refused.message.contains("windows of 4 rows"), "{refused}");
    Ok(())
}
