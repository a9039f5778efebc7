//! Tests of the kernels of targets and losses: histograms of oriented gradients, InfoNCE, and the spectrum.

use crate::support::tolerance::{assert_within_tolerance, compare, compare_kernel, kernel_devices, random_inputs};
use crate::support::{Outcome, normal, oracle, write};
use occlude::op::{hog, info_nce, spectrum};
use tch::{Kind, Tensor};

crate::trials![
    hog_matches,
    hog_matches_scikit_image_where_definitions_agree,
    hog_of_a_flat_image_is_zero,
    info_nce_matches,
    info_nce_of_a_large_batch_never_holds_all_logits,
    info_nce_of_all_ranks_is_the_sum_of_local_losses,
    info_nce_matches_cross_entropy,
    info_nce_without_a_key_per_query_is_rejected,
    the_spectrum_of_sine_waves_matches,
];

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

fn hog_matches() -> Outcome {
    for device in kernel_devices() {
        for kind in KINDS {
            for (shape, patch) in [([2, 3, 32, 48], 16), ([1, 1, 24, 8], 8), ([1, 2, 16, 304], 16)] {
                let x = normal(1, &shape).to_kind(kind).to_device(device);
                let exact = hog::formula(&x.to_kind(Kind::Double), patch);
                let label = format!("{shape:?} in patches of {patch}, {kind:?} on {device:?}");
                assert_within_tolerance(&label, &hog::kernel(&x, patch)?, &hog::formula(&x, patch), &exact);
            }
        }
    }
    let error = hog::hog(&normal(1, &[1, 3, 30, 30]), 15).expect_err("patches of 15");
    assert!(error.message.contains("multiple of 8"), "{error}");
    Ok(())
}

fn hog_matches_scikit_image_where_definitions_agree() -> Outcome {
    // If an image is a function of the row plus a function of the column, the Sobel operator is four times the
    // difference; scikit-image swaps the arguments of the arc tangent, hence the transposed image.
    let x = (normal(2, &[40, 1]) + normal(3, &[1, 24])) * 50.0;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("x.safetensors");
    write(&path, &[("x".into(), x.transpose(0, 1).to_kind(Kind::Double).contiguous())])?;
    let reference: Vec<Vec<Vec<f64>>> = serde_json::from_str(&oracle("hog.py", &[path.to_str().expect("a path")])?)?;
    for device in kernel_devices() {
        let ours = hog::kernel(&x.view([1, 1, 40, 24]).to_device(device), 8)?.view([5, 3, 9]);
        for (row, cells) in reference.iter().enumerate() {
            for (column, bins) in cells.iter().enumerate() {
                for (bin, reference) in bins.iter().enumerate() {
                    let ours = ours.double_value(&[column as i64, row as i64, bin as i64]);
                    assert!(
                        (ours - reference).abs() < 1e-5,
                        "cell {column}, {row}, bin {bin}: {ours} against {reference}"
                    );
                }
            }
        }
    }
    Ok(())
}

fn hog_of_a_flat_image_is_zero() -> Outcome {
    let x = Tensor::ones([1, 1, 16, 16], (Kind::Float, tch::Device::Cpu));
    let target = hog::kernel(&x, 16)?;
    assert!(target.size() == [1, 1, 36] && target.equal(&target.zeros_like()));
    Ok(())
}

/// Normalizes rows to length 1.
fn unit(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true)
}

/// Returns queries [rows, width], keys [columns, width] that share a direction with them, and a scale.
fn features(rows: i64, columns: i64, width: i64, kind: Kind) -> Vec<Tensor> {
    let mut inputs = random_inputs(4, &[&[rows, width], &[columns, width]], Kind::Float);
    inputs[1] = &inputs[1] + inputs[0].repeat([columns / rows + 1, 1]).narrow(0, 0, columns);
    let scale = Tensor::from(14.3f32).to_kind(kind);
    inputs.iter().map(|x| unit(x).to_kind(kind)).chain([scale]).collect()
}

fn info_nce_matches() -> Outcome {
    for kind in KINDS {
        for (rows, columns, width, offset, strip) in
            [(1, 1, 3, 0, 1), (3, 3, 8, 0, 64), (5, 20, 17, 5, 2), (33, 1100, 24, 64, 20), (7, 301, 50, 294, 3)]
        {
            compare_kernel(
                &format!("{rows} queries, {columns} keys, {width} wide in strips of {strip}, {kind:?}"),
                &features(rows, columns, width, kind),
                &move |x| info_nce::kernel(&x[0], &x[1], &x[2], offset, strip).expect("a launch"),
                &move |x| info_nce::formula(&x[0], &x[1], &x[2], offset),
            );
        }
    }
    Ok(())
}

/// On a CPU the loss is computed in strips, and no tensor is as large as all logits: of 604 MB the process holds less
/// than a third.
fn info_nce_of_a_large_batch_never_holds_all_logits() -> Outcome {
    for (rows, columns, offset) in [(70, 40_000, 39_000), (3, 3, 0)] {
        compare(
            &format!("{rows} queries, {columns} keys"),
            &features(rows, columns, 12, Kind::Float),
            &move |x| info_nce::info_nce(&x[0], &x[1], &x[2], offset).expect("a loss"),
            &move |x| info_nce::formula(&x[0], &x[1], &x[2], offset),
        );
    }
    let (code, output, why) = crate::support::child_process::run_case("contrast")?;
    assert_eq!(code, Some(0), "{why}");
    let megabytes: f64 = output.trim().parse()?;
    assert!((1.0..200.0).contains(&megabytes), "{megabytes} MB more");
    Ok(())
}

/// Prints by how many megabytes the peak memory of the process grows with the loss of 12,288 pairs, value and
/// gradients, whose logits take 604 MB.
pub fn peak_memory() -> i32 {
    let max = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("the peak memory");
        line.split_whitespace().nth(1).expect("a number").parse::<f64>().expect("a number") / 1024.0
    };
    let loss = |pairs: i64| {
        let inputs: Vec<Tensor> =
            features(pairs, pairs, 32, Kind::Float).into_iter().map(|x| x.set_requires_grad(true)).collect();
        info_nce::info_nce(&inputs[0], &inputs[1], &inputs[2], 0).expect("a loss").backward();
    };
    loss(300);
    let before = max();
    loss(12_288);
    println!("{}", max() - before);
    0
}

fn info_nce_of_all_ranks_is_the_sum_of_local_losses() -> Outcome {
    let inputs = features(12, 12, 16, Kind::Float);
    let [x, y, scale] = [0, 1, 2].map(|i| inputs[i].set_requires_grad(true));
    let all = info_nce::symmetric_info_nce([&x, &y], [&x, &y], &scale, 0)?;
    all.backward();
    let expected = [x.grad().copy(), y.grad().copy(), scale.grad().copy()];
    [&x, &y, &scale].into_iter().for_each(|leaf| {
        let _ = leaf.grad().zero_();
    });
    let mut sum = 0.0;
    for (begin, rows) in [(0, 5), (5, 3), (8, 4)] {
        let part = |of: &Tensor| of.narrow(0, begin, rows);
        let loss = info_nce::symmetric_info_nce([&part(&x), &part(&y)], [&x, &y], &scale, begin)?;
        loss.backward();
        sum += loss.double_value(&[]);
    }
    assert!((sum / all.double_value(&[]) - 1.0).abs() < 1e-6);
    for (leaf, expected) in [x, y, scale].iter().zip(expected) {
        assert!((leaf.grad() - &expected).norm().double_value(&[]) < 1e-5 * expected.norm().double_value(&[]));
    }
    Ok(())
}

fn info_nce_matches_cross_entropy() -> Outcome {
    let inputs = features(12, 12, 16, Kind::Float);
    let logits = inputs[0].matmul(&inputs[1].transpose(0, 1)) * &inputs[2];
    let labels = Tensor::arange(12, (Kind::Int64, tch::Device::Cpu));
    let expected = logits.cross_entropy_for_logits(&labels) + logits.transpose(0, 1).cross_entropy_for_logits(&labels);
    let ours = info_nce::symmetric_info_nce([&inputs[0], &inputs[1]], [&inputs[0], &inputs[1]], &inputs[2], 0)? / 12.0;
    assert!((ours / expected - 1.0).abs().double_value(&[]) < 1e-6);
    Ok(())
}

fn info_nce_without_a_key_per_query_is_rejected() -> Outcome {
    let inputs = features(3, 4, 8, Kind::Float);
    for offset in [-1, 2] {
        let error = info_nce::info_nce(&inputs[0], &inputs[1], &inputs[2], offset).expect_err("a missing key");
        assert!(error.message.contains("one positive key for each query"), "{error}");
    }
    Ok(())
}

fn the_spectrum_of_sine_waves_matches() -> Outcome {
    let rows = 6i64;
    let cols = 8i64;
    let angle = |n: i64, of: i64| {
        Tensor::arange(of, (Kind::Float, tch::Device::Cpu)) * (std::f64::consts::TAU * n as f64 / of as f64)
    };
    // A mean of 3 and a wave of two periods down and one across.
    let wave = (angle(2, rows).unsqueeze(1) + angle(1, cols).unsqueeze(0)).cos() + 3.0;
    let all = spectrum::spectrum(&wave.to_kind(Kind::BFloat16).unsqueeze(0));
    assert_eq!((all.size(), all.kind()), (vec![1, rows, cols, 2], Kind::Float));
    let size = all.square().sum_dim_intlist([-1i64].as_slice(), false, Kind::Float).sqrt();
    let root = ((rows * cols) as f64).sqrt();
    for row in 0..rows {
        for column in 0..cols {
            let expected = match (row - rows / 2, column - cols / 2) {
                (0, 0) => 3.0 * root,
                (2, 1) | (-2, -1) => root / 2.0,
                _ => 0.0,
            };
            let ours = size.double_value(&[0, row, column]);
            assert!((ours - expected).abs() < 0.05, "{row}, {column}: {ours} against {expected}");
        }
    }
    // The orthonormal transform keeps the square norm.
    let energy = (all.square().sum(Kind::Float) / wave.square().sum(Kind::Float)).double_value(&[]);
    assert!((energy - 1.0).abs() < 0.01, "{energy}");
    Ok(())
}
