//! The kernels of targets and losses: gradients' histograms, the contrastive loss; and the spectrum.

use crate::bar::{compare, compare_kernel, grounds, inputs, judge};
use crate::support::{Outcome, normal, oracle, write};
use occlude::op::{hog, info_nce, spectrum};
use tch::{Kind, Tensor};

crate::trials![
    histograms_of_gradients_agree,
    histograms_are_those_of_scikit_image_where_it_defines_the_same,
    flat_pictures_have_no_histogram,
    the_contrastive_loss_agrees,
    the_contrastive_loss_of_a_large_batch_never_holds_all_logits,
    the_contrastive_loss_of_all_ranks_is_the_sum_of_theirs,
    the_contrastive_loss_is_the_library_s_cross_entropy,
    a_contrastive_loss_without_a_key_for_each_query_is_refused,
    a_spectrum_is_that_of_waves,
];

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

fn histograms_of_gradients_agree() -> Outcome {
    for ground in grounds() {
        for kind in KINDS {
            for (shape, patch) in [([2, 3, 32, 48], 16), ([1, 1, 24, 8], 8), ([1, 2, 16, 304], 16)] {
                let x = normal(1, &shape).to_kind(kind).to_device(ground);
                let exact = hog::formula(&x.to_kind(Kind::Double), patch);
                let what = format!("{shape:?} in patches of {patch}, {kind:?} on {ground:?}");
                judge(&what, &hog::kernel(&x, patch)?, &hog::formula(&x, patch), &exact);
            }
        }
    }
    let fault = hog::hog(&normal(1, &[1, 3, 30, 30]), 15).expect_err("patches of 15");
    assert!(fault.message.contains("multiple of 8"), "{fault}");
    Ok(())
}

fn histograms_are_those_of_scikit_image_where_it_defines_the_same() -> Outcome {
    // Where a picture is a sum of something of its row and something of its column, Sobel's operator is four times the
    // difference; theirs swaps the arguments of the arc tangent, hence the picture turned over its diagonal.
    let x = (normal(2, &[40, 1]) + normal(3, &[1, 24])) * 50.0;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("x.safetensors");
    write(&path, &[("x".into(), x.transpose(0, 1).to_kind(Kind::Double).contiguous())])?;
    let theirs: Vec<Vec<Vec<f64>>> = serde_json::from_str(&oracle("hog.py", &[path.to_str().expect("a path")])?)?;
    for ground in grounds() {
        let ours = hog::kernel(&x.view([1, 1, 40, 24]).to_device(ground), 8)?.view([5, 3, 9]);
        for (row, cells) in theirs.iter().enumerate() {
            for (column, bins) in cells.iter().enumerate() {
                for (bin, theirs) in bins.iter().enumerate() {
                    let ours = ours.double_value(&[column as i64, row as i64, bin as i64]);
                    assert!((ours - theirs).abs() < 1e-5, "cell {column}, {row}, bin {bin}: {ours} against {theirs}");
                }
            }
        }
    }
    Ok(())
}

fn flat_pictures_have_no_histogram() -> Outcome {
    let x = Tensor::ones([1, 1, 16, 16], (Kind::Float, tch::Device::Cpu));
    let target = hog::kernel(&x, 16)?;
    assert!(target.size() == [1, 1, 36] && target.equal(&target.zeros_like()));
    Ok(())
}

/// Rows of length 1.
fn unit(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true)
}

/// Queries [rows, width], keys [columns, width] that share a direction with them, and a scale.
fn features(rows: i64, columns: i64, width: i64, kind: Kind) -> Vec<Tensor> {
    let mut given = inputs(4, &[&[rows, width], &[columns, width]], Kind::Float);
    given[1] = &given[1] + given[0].repeat([columns / rows + 1, 1]).narrow(0, 0, columns);
    let scale = Tensor::from(14.3f32).to_kind(kind);
    given.iter().map(|x| unit(x).to_kind(kind)).chain([scale]).collect()
}

fn the_contrastive_loss_agrees() -> Outcome {
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

/// The strips of a CPU, and that no tensor is as large as all logits: of 604 MB the process comes to hold less than a third.
fn the_contrastive_loss_of_a_large_batch_never_holds_all_logits() -> Outcome {
    for (rows, columns, offset) in [(70, 40_000, 39_000), (3, 3, 0)] {
        compare(
            &format!("{rows} queries, {columns} keys"),
            &features(rows, columns, 12, Kind::Float),
            &move |x| info_nce::info_nce(&x[0], &x[1], &x[2], offset).expect("a loss"),
            &move |x| info_nce::formula(&x[0], &x[1], &x[2], offset),
        );
    }
    let (code, told, why) = crate::bridge::run("contrast")?;
    assert_eq!(code, Some(0), "{why}");
    let megabytes: f64 = told.trim().parse()?;
    assert!((1.0..200.0).contains(&megabytes), "{megabytes} MB more");
    Ok(())
}

/// Prints by how many megabytes the most that the process ever held grows with the loss of 12,288 pairs, value
/// and gradients, whose logits are 604 MB.
pub fn peak() -> i32 {
    let most = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("the most held");
        line.split_whitespace().nth(1).expect("a number").parse::<f64>().expect("a number") / 1024.0
    };
    let loss = |pairs: i64| {
        let given: Vec<Tensor> =
            features(pairs, pairs, 32, Kind::Float).into_iter().map(|x| x.set_requires_grad(true)).collect();
        info_nce::info_nce(&given[0], &given[1], &given[2], 0).expect("a loss").backward();
    };
    loss(300);
    let before = most();
    loss(12_288);
    println!("{}", most() - before);
    0
}

fn the_contrastive_loss_of_all_ranks_is_the_sum_of_theirs() -> Outcome {
    let given = features(12, 12, 16, Kind::Float);
    let [x, y, scale] = [0, 1, 2].map(|i| given[i].set_requires_grad(true));
    let all = info_nce::symmetric([&x, &y], [&x, &y], &scale, 0)?;
    all.backward();
    let wanted = [x.grad().copy(), y.grad().copy(), scale.grad().copy()];
    [&x, &y, &scale].into_iter().for_each(|leaf| {
        let _ = leaf.grad().zero_();
    });
    let mut sum = 0.0;
    for (begin, rows) in [(0, 5), (5, 3), (8, 4)] {
        let part = |of: &Tensor| of.narrow(0, begin, rows);
        let loss = info_nce::symmetric([&part(&x), &part(&y)], [&x, &y], &scale, begin)?;
        loss.backward();
        sum += loss.double_value(&[]);
    }
    assert!((sum / all.double_value(&[]) - 1.0).abs() < 1e-6);
    for (leaf, wanted) in [x, y, scale].iter().zip(wanted) {
        assert!((leaf.grad() - &wanted).norm().double_value(&[]) < 1e-5 * wanted.norm().double_value(&[]));
    }
    Ok(())
}

fn the_contrastive_loss_is_the_library_s_cross_entropy() -> Outcome {
    let given = features(12, 12, 16, Kind::Float);
    let logits = given[0].matmul(&given[1].transpose(0, 1)) * &given[2];
    let own = Tensor::arange(12, (Kind::Int64, tch::Device::Cpu));
    let wanted = logits.cross_entropy_for_logits(&own) + logits.transpose(0, 1).cross_entropy_for_logits(&own);
    let ours = info_nce::symmetric([&given[0], &given[1]], [&given[0], &given[1]], &given[2], 0)? / 12.0;
    assert!((ours / wanted - 1.0).abs().double_value(&[]) < 1e-6);
    Ok(())
}

fn a_contrastive_loss_without_a_key_for_each_query_is_refused() -> Outcome {
    let given = features(3, 4, 8, Kind::Float);
    for offset in [-1, 2] {
        let fault = info_nce::info_nce(&given[0], &given[1], &given[2], offset).expect_err("no key");
        assert!(fault.message.contains("a key for each query"), "{fault}");
    }
    Ok(())
}

fn a_spectrum_is_that_of_waves() -> Outcome {
    let (rows, cols) = (6i64, 8i64);
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
            let wanted = match (row - rows / 2, column - cols / 2) {
                (0, 0) => 3.0 * root,
                (2, 1) | (-2, -1) => root / 2.0,
                _ => 0.0,
            };
            let ours = size.double_value(&[0, row, column]);
            assert!((ours - wanted).abs() < 0.05, "{row}, {column}: {ours} against {wanted}");
        }
    }
    // The orthonormal one keeps the square norm.
    let energy = (all.square().sum(Kind::Float) / wave.square().sum(Kind::Float)).double_value(&[]);
    assert!((energy - 1.0).abs() < 0.01, "{energy}");
    Ok(())
}
