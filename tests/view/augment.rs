//! Tests of augmentation: pixels against torchvision and Pillow, sampled parameters against the config.

use crate::support::{Outcome, oracle};
use libtest_mimic::Failed;
use occlude::data::decode::{DecodedImage, LazyImage};
use occlude::grid::Grid;
use occlude::rng::{Philox, Purpose};
use occlude::view::View;
use occlude::view::affine::{self, apply_affine};
use occlude::view::augment::Augment;
use occlude::view::crop::Interpolation;
use occlude::view::jitter::{Jitter, JitterParams};
use occlude::view::rand_augment::{Layer, OPERATIONS, Operation, RandAugment};
use occlude::view::{ViewKey, blur, color, sharpness, tone};
use serde_json::{Value, json};
use std::fs;

crate::trials![
    color_and_tone_operations_match_torchvision_bit_for_bit,
    affine_operations_match_pillow_bit_for_bit,
    color_jitter_matches_torchvision_in_every_order,
    blur_matches_torchvision_within_one,
    a_blur_kernel_may_be_larger_than_the_image,
    color_jitter_samples_keep_their_ranges_and_rates,
    rand_augment_samples_keep_their_levels_and_rates,
    grayscale_blur_and_solarize_have_their_rates,
    nothing_is_augmented_by_default,
    an_augmented_view_depends_only_on_the_sample,
    an_invalid_config_is_rejected,
];

/// Returns waves with noise, or noise alone, so that many colors occur: [height, width, channels].
pub fn noisy_image(width: usize, height: usize, channels: usize, noise: f64) -> Vec<u8> {
    let mut draw = Philox::new(5, 6, 7, Purpose::Probe, 0);
    let mut pixels = Vec::new();
    for at in 0..width * height * channels {
        let y = at / channels / width;
        let x = at / channels % width;
        let c = at % channels;
        let wave = (x as f64 / 11.0 + c as f64).sin() * (y as f64 / 6.0 - c as f64).cos();
        pixels.push((127.5 + (127.5 - noise) * wave + draw.uniform_range(-noise, noise)) as u8);
    }
    pixels
}

pub fn encode_png(pixels: &[u8], [height, width, channels]: [usize; 3]) -> Vec<u8> {
    let color = if channels == 1 { image::ExtendedColorType::L8 } else { image::ExtendedColorType::Rgb8 };
    let mut png = std::io::Cursor::new(Vec::new());
    image::write_buffer_with_format(&mut png, pixels, width as u32, height as u32, color, image::ImageFormat::Png)
        .expect("a PNG");
    png.into_inner()
}

/// Returns the pixels that `script` computes from an image for each job, each as many bytes as the image.
pub fn oracle_pixels(
    script: &str,
    verb: &[&str],
    pixels: &[u8],
    shape: [usize; 3],
    jobs: &[Value],
) -> Result<Vec<Vec<u8>>, Failed> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    fs::write(path("in.png"), encode_png(pixels, shape))?;
    fs::write(path("jobs.json"), serde_json::to_vec(jobs)?)?;
    let files = [path("in.png"), path("jobs.json"), path("out.raw")];
    oracle(script, &verb.iter().copied().chain(files.iter().map(String::as_str)).collect::<Vec<_>>())?;
    let out = fs::read(path("out.raw"))?;
    assert_eq!(out.len(), pixels.len() * jobs.len());
    Ok(out.chunks(pixels.len()).map(<[u8]>::to_vec).collect())
}

/// Returns how many values differ, and the maximum difference.
fn difference(a: &[u8], b: &[u8]) -> (usize, u8) {
    let apart = a.iter().zip(b).map(|(&a, &b)| a.abs_diff(b));
    apart.fold((0, 0), |(count, max), d| (count + usize::from(d > 0), max.max(d)))
}

fn all_equal(pixels: &[u8], shape: [usize; 3], jobs: &[Value], ours: impl Fn(&Value, &mut [u8])) -> Outcome {
    for (job, reference) in jobs.iter().zip(oracle_pixels("augment.py", &[], pixels, shape, jobs)?) {
        let mut augmented = pixels.to_vec();
        ours(job, &mut augmented);
        let (count, max) = difference(&augmented, &reference);
        assert_eq!(count, 0, "{job} on {shape:?}: {count} values differ, by {max} at most");
    }
    Ok(())
}

fn color_and_tone_operations_match_torchvision_bit_for_bit() -> Outcome {
    let mut jobs: Vec<Value> =
        ["grayscale", "auto_contrast", "equalize", "invert"].iter().map(|name| json!({"do": name, "by": 0})).collect();
    for name in ["brightness", "contrast", "saturation", "sharpness"] {
        jobs.extend([0.0, 0.1, 0.37, 1.0, 1.6543, 2.5].iter().map(|by| json!({"do": name, "by": by})));
    }
    jobs.extend([-0.5, -0.1, -0.0031, 0.0, 0.07, 0.2718, 0.5].iter().map(|by| json!({"do": "hue", "by": by})));
    jobs.extend([0, 26, 128, 255, 256].iter().map(|by| json!({"do": "solarize", "by": by})));
    jobs.extend([1, 2, 4, 8].iter().map(|by| json!({"do": "posterize", "by": by})));
    let shapes =
        [([211, 160, 3], 127.0), ([45, 31, 3], 20.0), ([45, 31, 1], 20.0), ([28, 28, 1], 1.0), ([2, 9, 3], 30.0)];
    for (shape, noise) in shapes {
        let [height, width, channels] = shape;
        let mut pixels = noisy_image(width, height, channels, noise);
        if channels == 3 {
            // A channel of one value has neither contrast nor histogram to stretch; another lacks both ends.
            pixels.iter_mut().skip(1).step_by(3).for_each(|v| *v = if shape[0] == 45 { 77 } else { 20 + *v / 2 });
        }
        all_equal(&pixels, shape, &jobs, |job, pixels| {
            let by = job["by"].as_f64().expect("a number");
            match job["do"].as_str().expect("a name") {
                "brightness" => color::adjust_brightness(pixels, by),
                "contrast" => color::adjust_contrast(pixels, channels, by),
                "saturation" => color::adjust_saturation(pixels, channels, by),
                "hue" => color::adjust_hue(pixels, channels, by),
                "sharpness" => sharpness::adjust_sharpness(pixels, shape, by, &mut vec![9; 7]),
                "grayscale" => color::to_grayscale(pixels, channels),
                "solarize" => tone::solarize(pixels, by as u16),
                "posterize" => tone::posterize(pixels, by as u32),
                "auto_contrast" => tone::auto_contrast(pixels, channels),
                "equalize" => tone::equalize(pixels, channels),
                _ => tone::invert(pixels),
            }
        })?;
    }
    Ok(())
}

fn affine_operations_match_pillow_bit_for_bit() -> Outcome {
    let fill = [124, 116, 104];
    let luma = color::luma(&fill);
    for (width, height, channels) in [(64, 64, 3), (61, 47, 3), (47, 61, 1), (3, 2, 3)] {
        let shape = [height, width, channels];
        let mut jobs = Vec::new();
        for how in ["bicubic", "bilinear"] {
            for by in [-30.0, -17.3, 0.0, 3.21, 28.9, 45.0, 135.0] {
                let matrix = affine::rotate(width, height, by);
                jobs.push(json!({"do": "rotate", "by": by, "how": how, "fill": fill, "luma": luma, "matrix": matrix}));
            }
            for matrix in [
                affine::shear_x(-0.27),
                affine::shear_x(0.3),
                affine::shear_y(0.123),
                affine::translate(-0.405 * width as f64, 0.0),
                affine::translate(0.0, 0.45 * height as f64),
                affine::translate(3.0, -2.0),
                [1.1, 0.2, -3.0, -0.1, 0.8, 4.4],
            ] {
                jobs.push(json!({"do": "affine", "matrix": matrix, "how": how, "fill": fill, "luma": luma}));
            }
        }
        let fill = if channels == 1 { vec![luma] } else { fill.to_vec() };
        all_equal(&noisy_image(width, height, channels, 40.0), shape, &jobs, |job, pixels| {
            let matrix: affine::Matrix = serde_json::from_value(job["matrix"].clone()).expect("six numbers");
            let how = if job["how"] == "bicubic" { Interpolation::Bicubic } else { Interpolation::Bilinear };
            apply_affine(pixels, shape, &matrix, &fill, how, &mut Vec::new());
        })?;
    }
    Ok(())
}

fn color_jitter_matches_torchvision_in_every_order() -> Outcome {
    let jitter = Jitter { probability: 1.0, brightness: 0.8, contrast: 0.8, saturation: 0.8, hue: 0.5 };
    let half = Jitter { saturation: 0.0, ..jitter.clone() };
    let drawn: Vec<JitterParams> = (0..40)
        .map(|id| if id % 4 == 0 { &half } else { &jitter }.sample(&mut Philox::new(3, id, 0, Purpose::Jitter, 0)))
        .map(|drawn| drawn.expect("probability 1"))
        .collect();
    let jobs: Vec<Value> = drawn
        .iter()
        .enumerate()
        .map(|(at, drawn)| json!({"do": "jitter", "at": at, "order": drawn.order, "amounts": drawn.amounts}))
        .collect();
    let shape = [40, 52, 3];
    all_equal(&noisy_image(52, 40, 3, 60.0), shape, &jobs, |job, pixels| {
        drawn[job["at"].as_u64().expect("a number") as usize].apply(pixels, 3);
    })
}

fn blur_matches_torchvision_within_one() -> Outcome {
    let jobs: Vec<Value> = [(23, 0.1), (23, 0.37), (23, 1.0), (23, 2.0), (9, 5.0), (3, 0.8), (1, 1.0)]
        .iter()
        .map(|(kernel, by)| json!({"do": "blur", "kernel": kernel, "by": by}))
        .collect();
    let mut scratch = Vec::new();
    let mut values = 0;
    let mut error = 0;
    for shape in [[64, 96, 3], [33, 21, 1]] {
        let pixels = noisy_image(shape[1], shape[0], shape[2], 90.0);
        for (job, reference) in jobs.iter().zip(oracle_pixels("augment.py", &[], &pixels, shape, &jobs)?) {
            let mut ours = pixels.clone();
            let kernel = job["kernel"].as_u64().expect("a number") as usize;
            blur::gaussian_blur(&mut ours, shape, kernel, job["by"].as_f64().expect("a number"), &mut scratch);
            let (count, max) = difference(&ours, &reference);
            assert!(max <= 1, "{job} on {shape:?}: {count} values differ, by {max} at most");
            (values, error) = (values + ours.len(), error + count);
        }
    }
    // Sums that are close to a half; measured: none to a few of 130,000.
    assert!(error * 10_000 <= values, "{error} of {values} values differ");
    Ok(())
}

fn a_blur_kernel_may_be_larger_than_the_image() -> Outcome {
    for shape in [[1, 1, 3], [1, 5, 1], [4, 2, 3]] {
        let mut pixels = vec![0; shape.iter().product()];
        pixels[0] = 200;
        let sum = |pixels: &[u8]| pixels.iter().map(|&v| i64::from(v)).sum::<i64>();
        blur::gaussian_blur(&mut pixels, shape, 23, 2.0, &mut Vec::new());
        assert!(sum(&pixels) > 100, "{shape:?}: {pixels:?}");
        let mut flat = vec![131; pixels.len()];
        blur::gaussian_blur(&mut flat, shape, 23, 2.0, &mut Vec::new());
        assert_eq!(flat, vec![131; pixels.len()]);
    }
    Ok(())
}

/// Asserts that `count` of `of` is within four standard deviations of the rate.
fn assert_rate(label: &str, count: usize, of: usize, rate: f64) {
    let mean = of as f64 * rate;
    let deviation = (of as f64 * rate * (1.0 - rate)).sqrt();
    assert!((count as f64 - mean).abs() <= 4.0 * deviation, "{label}: {count} of {of}, expected {mean:.0}");
}

fn color_jitter_samples_keep_their_ranges_and_rates() -> Outcome {
    let jitter = Jitter { probability: 0.7, brightness: 0.4, contrast: 1.5, saturation: 0.0, hue: 0.1 };
    let drawn: Vec<JitterParams> =
        (0..4800).filter_map(|id| jitter.sample(&mut Philox::new(1, id, 2, Purpose::Jitter, 0))).collect();
    assert_rate("jittered", drawn.len(), 4800, 0.7);
    let mut orders = std::collections::BTreeMap::new();
    for one in &drawn {
        *orders.entry(one.order).or_insert(0) += 1;
        assert_eq!(one.amounts[2], None);
    }
    assert_eq!(orders.len(), 24);
    for (order, count) in orders {
        assert_rate(&format!("order {order:?}"), count, drawn.len(), 1.0 / 24.0);
    }
    for (which, low, high) in [(0, 0.6, 1.4), (1, 0.0, 2.5), (3, -0.1, 0.1)] {
        let values: Vec<f64> = drawn.iter().map(|one| one.amounts[which].expect("in use")).collect();
        assert!(values.iter().all(|v| (low..high).contains(v)), "{which}");
        assert_rate(
            "below the first quarter",
            values.iter().filter(|&&v| v < low + (high - low) / 4.0).count(),
            values.len(),
            0.25,
        );
        assert_rate("below the half", values.iter().filter(|&&v| v < (low + high) / 2.0).count(), values.len(), 0.5);
    }
    Ok(())
}

fn rand_augment_samples_keep_their_levels_and_rates() -> Outcome {
    let random = RandAugment::default();
    let layers: Vec<Layer> =
        (0..12000).filter_map(|id| random.sample_layer(&mut Philox::new(1, id, 2, Purpose::RandAugment, 0))).collect();
    assert_rate("applied", layers.len(), 12000, 0.5);
    for operation in OPERATIONS {
        let count = layers.iter().filter(|layer| layer.operation == operation).count();
        assert_rate(&format!("{operation:?}"), count, layers.len(), 1.0 / 15.0);
    }
    // Shears reveal the level: 9 with a standard deviation of 0.5, clipped at 10 (2.3 in a hundred), either sign.
    let shears: Vec<f64> = layers
        .iter()
        .filter(|layer| matches!(layer.operation, Operation::ShearX | Operation::ShearY))
        .map(|layer| layer.argument / 0.03)
        .collect();
    assert_rate("negative", shears.iter().filter(|&&v| v < 0.0).count(), shears.len(), 0.5);
    assert_rate("below 9", shears.iter().filter(|v| v.abs() < 9.0).count(), shears.len(), 0.5);
    assert_rate("below 8.5", shears.iter().filter(|v| v.abs() < 8.5).count(), shears.len(), 0.1587);
    assert_rate("cut at 10", shears.iter().filter(|v| v.abs() > 9.999).count(), shears.len(), 0.0228);
    assert!(shears.iter().all(|v| v.abs() <= 10.0 + 1e-9));
    let is_image = RandAugment { magnitude_std: 0.0, magnitude: 5.0, ..random };
    let layer = (0..99).find_map(|id| {
        let layer = is_image.sample_layer(&mut Philox::new(1, id, 2, Purpose::RandAugment, 0))?;
        (layer.operation == Operation::Rotate).then_some(layer)
    });
    assert_eq!(layer.expect("a rotation").argument.abs(), 15.0);
    Ok(())
}

fn sample(width: u32, height: u32) -> DecodedImage {
    DecodedImage { width, height, channels: 3, pixels: noisy_image(width as usize, height as usize, 3, 40.0) }
}

fn grid() -> Grid {
    Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 16 }
}

fn read(text: &str) -> Augment {
    serde_json::from_str(text).expect("a config")
}

fn grayscale_blur_and_solarize_have_their_rates() -> Outcome {
    let shape = [8, 8, 3];
    let pixels = noisy_image(8, 8, 3, 60.0);
    for (text, rate) in [
        (r#"{"grayscale": 0.2}"#, 0.2),
        (r#"{"blur": {"probability": 0.6, "sigma": [1, 2]}}"#, 0.6),
        (r#"{"solarize": {"probability": 0.3, "threshold": 100}}"#, 0.3),
        (r#"{"jitter": {"probability": 0.5, "contrast": 0}}"#, 0.5),
    ] {
        let augment = read(text);
        augment.check()?;
        let changed = (0..1500).filter(|&id| {
            let mut augmented = pixels.clone();
            augment.apply(&mut augmented, shape, Interpolation::Bicubic, |purpose| Philox::new(9, id, 0, purpose, 0));
            augmented != pixels
        });
        assert_rate(text, changed.count(), 1500, rate);
    }
    let blur = read(r#"{"blur": {"sigma": [0.5, 1.5], "probability": 1}}"#).blur.expect("a blur");
    let sigmas: Vec<f64> = (0..2000)
        .map(|id| blur.sample(&mut Philox::new(9, id, 0, Purpose::Blur, 0)).expect("probability 1").1)
        .collect();
    assert!(sigmas.iter().all(|v| (0.5..1.5).contains(v)));
    assert_rate("deviations below 0.75", sigmas.iter().filter(|&&v| v < 0.75).count(), 2000, 0.25);
    Ok(())
}

/// Returns the training view at [seed, id, epoch, repeat].
fn training_view(view: &View, image: &DecodedImage, at: [u64; 4]) -> Vec<u8> {
    let mut out = vec![0; grid().pixel_shape().iter().product::<i64>() as usize];
    view.train_view(
        &grid(),
        LazyImage::from(image),
        ViewKey { seed: at[0], id: at[1], epoch: at[2] },
        at[3] as u32,
        &mut out,
    )
    .expect("a view");
    out
}

fn eval_view(view: &View, image: &DecodedImage) -> Vec<u8> {
    let mut out = vec![0; grid().pixel_shape().iter().product::<i64>() as usize];
    view.eval_view(&grid(), LazyImage::from(image), &mut out).expect("a view");
    out
}

fn nothing_is_augmented_by_default() -> Outcome {
    let image = sample(50, 40);
    let plain = View::default();
    assert_eq!(serde_json::from_str::<View>(r#"{"augment": {}}"#)?, plain);
    assert_eq!(serde_json::to_value(&plain.augment)?, json!({"grayscale": 0.0}));
    let loud = View { augment: read(r#"{"rand_augment": {"ops": 9}, "jitter": {}, "grayscale": 1}"#), ..plain.clone() };
    for id in 0..20 {
        assert_ne!(training_view(&plain, &image, [1, id, 0, 0]), training_view(&loud, &image, [1, id, 0, 0]));
    }
    // Evaluation does not augment.
    assert_eq!(eval_view(&plain, &image), eval_view(&loud, &image));
    Ok(())
}

fn an_augmented_view_depends_only_on_the_sample() -> Outcome {
    let text = r#"{"rand_augment": {}, "jitter": {}, "grayscale": 0.3, "blur": {}, "solarize": {"probability": 0.5}}"#;
    let view = View { augment: read(text), ..View::default() };
    let image = sample(90, 70);
    let other = sample(33, 64);
    let train = |id, epoch, repeat| training_view(&view, &image, [1, id, epoch, repeat]);
    let first: Vec<Vec<u8>> = (0..30).map(|id| train(id, 3, 0)).collect();
    // In reverse, on other threads, and with other samples in between that leave their scratch behind.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for id in (0..30).rev() {
                    training_view(&view, &other, [8, id + 5, 1, 0]);
                    assert_eq!(first[id as usize], train(id, 3, 0), "sample {id}");
                }
            });
        }
    });
    let same = (0..30).filter(|&id| first[id as usize] == train(id, 4, 0) || first[id as usize] == train(id, 3, 1));
    assert_eq!(same.count(), 0, "another epoch or repeat gave the same view");
    // Each has its own purpose: enabling one changes no random number of another.
    let jitter = read(r#"{"jitter": {}}"#);
    let both = read(r#"{"jitter": {}, "solarize": {"probability": 0}}"#);
    let visible =
        |augment: &Augment| training_view(&View { augment: augment.clone(), ..View::default() }, &image, [1, 2, 3, 0]);
    assert_eq!(visible(&jitter), visible(&both));
    Ok(())
}

fn an_invalid_config_is_rejected() -> Outcome {
    for (text, key) in [
        (r#"{"grayscale": 1.1}"#, "view.augment.grayscale"),
        (r#"{"jitter": {"probability": -0.1}}"#, "view.augment.jitter.probability"),
        (r#"{"jitter": {"hue": 0.6}}"#, "view.augment.jitter.hue"),
        (r#"{"jitter": {"contrast": -1}}"#, "view.augment.jitter.contrast"),
        (r#"{"jitter": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}}"#, "view.augment.jitter"),
        (r#"{"blur": {"probability": 2}}"#, "view.augment.blur.probability"),
        (r#"{"blur": {"sigma": [0, 1]}}"#, "view.augment.blur.sigma"),
        (r#"{"blur": {"sigma": [2, 1]}}"#, "view.augment.blur.sigma"),
        (r#"{"blur": {"kernel": 22}}"#, "view.augment.blur.kernel"),
        (r#"{"solarize": {"threshold": 257}}"#, "view.augment.solarize.threshold"),
        (r#"{"rand_augment": {"ops": 0}}"#, "view.augment.rand_augment.ops"),
        (r#"{"rand_augment": {"magnitude": 11}}"#, "view.augment.rand_augment.magnitude"),
        (r#"{"rand_augment": {"magnitude_std": -1}}"#, "view.augment.rand_augment.magnitude_std"),
    ] {
        let view = View { augment: read(text), ..View::default() };
        let error = view.check().expect_err(text);
        assert!(error.message.contains(key), "{text}: {}", error.message);
    }
    assert!(serde_json::from_str::<Augment>(r#"{"jitter": {"sharpness": 1}}"#).is_err(), "an unknown key was accepted");
    let all = r#"{"rand_augment": {}, "jitter": {}, "grayscale": 0.2, "blur": {}, "solarize": {}}"#;
    Ok(read(all).check()?)
}
