//! Augmentations: pixels against torchvision and Pillow, draws against what the config says.

use crate::support::{Outcome, oracle};
use libtest_mimic::Failed;
use occlude::data::decode::{Decoded, Picture};
use occlude::grid::Grid;
use occlude::part::view::View;
use occlude::part::view::affine::{self, affine};
use occlude::part::view::augment::Augment;
use occlude::part::view::crop::Interpolation;
use occlude::part::view::jitter::{Jitter, Jittered};
use occlude::part::view::rand_augment::{Layer, OPERATIONS, Operation, RandAugment};
use occlude::part::view::{blur, colour, sharpness, tone};
use occlude::rng::{Draw, Purpose};
use serde_json::{Value, json};
use std::fs;

crate::trials![
    colours_and_tones_are_torchvisions_to_the_bit,
    moved_pictures_are_pillows_to_the_bit,
    a_jitter_acts_in_its_order_as_torchvisions,
    blurred_pixels_are_torchvisions_within_one,
    a_blur_may_reach_beyond_the_picture,
    a_jitters_draws_keep_their_ranges_and_rates,
    a_rand_augments_draws_keep_their_levels_and_rates,
    grey_blur_and_solarise_come_at_their_rates,
    nothing_is_augmented_unless_it_is_named,
    an_augmented_view_depends_on_the_sample_alone,
    a_config_that_cannot_be_is_refused,
];

/// Waves with noise on them, or noise alone, so that many colours occur: [height, width, channels].
pub fn picture(width: usize, height: usize, channels: usize, noise: f64) -> Vec<u8> {
    let mut draw = Draw::new(5, 6, 7, Purpose::Probe, 0);
    let mut pixels = Vec::new();
    for at in 0..width * height * channels {
        let (y, x, c) = (at / channels / width, at / channels % width, at % channels);
        let wave = (x as f64 / 11.0 + c as f64).sin() * (y as f64 / 6.0 - c as f64).cos();
        pixels.push((127.5 + (127.5 - noise) * wave + draw.between(-noise, noise)) as u8);
    }
    pixels
}

pub fn png(pixels: &[u8], [height, width, channels]: [usize; 3]) -> Vec<u8> {
    let colour = if channels == 1 { image::ExtendedColorType::L8 } else { image::ExtendedColorType::Rgb8 };
    let mut png = std::io::Cursor::new(Vec::new());
    image::write_buffer_with_format(&mut png, pixels, width as u32, height as u32, colour, image::ImageFormat::Png)
        .expect("a PNG");
    png.into_inner()
}

/// What `script` makes of a picture in each job, as many bytes each as the picture has.
pub fn asked(
    script: &str,
    verb: &[&str],
    pixels: &[u8],
    shape: [usize; 3],
    jobs: &[Value],
) -> Result<Vec<Vec<u8>>, Failed> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    fs::write(path("in.png"), png(pixels, shape))?;
    fs::write(path("jobs.json"), serde_json::to_vec(jobs)?)?;
    let files = [path("in.png"), path("jobs.json"), path("out.raw")];
    oracle(script, &verb.iter().copied().chain(files.iter().map(String::as_str)).collect::<Vec<_>>())?;
    let out = fs::read(path("out.raw"))?;
    assert_eq!(out.len(), pixels.len() * jobs.len());
    Ok(out.chunks(pixels.len()).map(<[u8]>::to_vec).collect())
}

/// How many values differ, and by how much at most.
fn difference(a: &[u8], b: &[u8]) -> (usize, u8) {
    let apart = a.iter().zip(b).map(|(&a, &b)| a.abs_diff(b));
    apart.fold((0, 0), |(count, most), d| (count + usize::from(d > 0), most.max(d)))
}

fn all_equal(pixels: &[u8], shape: [usize; 3], jobs: &[Value], ours: impl Fn(&Value, &mut [u8])) -> Outcome {
    for (job, theirs) in jobs.iter().zip(asked("augment.py", &[], pixels, shape, jobs)?) {
        let mut now = pixels.to_vec();
        ours(job, &mut now);
        let (count, most) = difference(&now, &theirs);
        assert_eq!(count, 0, "{job} on {shape:?}: {count} values differ, by {most} at most");
    }
    Ok(())
}

fn colours_and_tones_are_torchvisions_to_the_bit() -> Outcome {
    let mut jobs: Vec<Value> =
        ["grey", "auto_contrast", "equalise", "invert"].iter().map(|name| json!({"do": name, "by": 0})).collect();
    for name in ["brightness", "contrast", "saturation", "sharpness"] {
        jobs.extend([0.0, 0.1, 0.37, 1.0, 1.6543, 2.5].iter().map(|by| json!({"do": name, "by": by})));
    }
    jobs.extend([-0.5, -0.1, -0.0031, 0.0, 0.07, 0.2718, 0.5].iter().map(|by| json!({"do": "hue", "by": by})));
    jobs.extend([0, 26, 128, 255, 256].iter().map(|by| json!({"do": "solarise", "by": by})));
    jobs.extend([1, 2, 4, 8].iter().map(|by| json!({"do": "posterise", "by": by})));
    let shapes =
        [([211, 160, 3], 127.0), ([45, 31, 3], 20.0), ([45, 31, 1], 20.0), ([28, 28, 1], 1.0), ([2, 9, 3], 30.0)];
    for (shape, noise) in shapes {
        let [height, width, channels] = shape;
        let mut pixels = picture(width, height, channels, noise);
        if channels == 3 {
            // A channel of one value has neither contrast nor histogram to stretch; another leaves out both ends.
            pixels.iter_mut().skip(1).step_by(3).for_each(|v| *v = if shape[0] == 45 { 77 } else { 20 + *v / 2 });
        }
        all_equal(&pixels, shape, &jobs, |job, pixels| {
            let by = job["by"].as_f64().expect("a number");
            match job["do"].as_str().expect("a name") {
                "brightness" => colour::brightness(pixels, by),
                "contrast" => colour::contrast(pixels, channels, by),
                "saturation" => colour::saturation(pixels, channels, by),
                "hue" => colour::hue(pixels, channels, by),
                "sharpness" => sharpness::sharpness(pixels, shape, by, &mut vec![9; 7]),
                "grey" => colour::grey(pixels, channels),
                "solarise" => tone::solarise(pixels, by as u16),
                "posterise" => tone::posterise(pixels, by as u32),
                "auto_contrast" => tone::auto_contrast(pixels, channels),
                "equalise" => tone::equalise(pixels, channels),
                _ => tone::invert(pixels),
            }
        })?;
    }
    Ok(())
}

fn moved_pictures_are_pillows_to_the_bit() -> Outcome {
    let fill = [124, 116, 104];
    let luma = colour::luma(&fill);
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
        all_equal(&picture(width, height, channels, 40.0), shape, &jobs, |job, pixels| {
            let matrix: affine::Matrix = serde_json::from_value(job["matrix"].clone()).expect("six numbers");
            let how = if job["how"] == "bicubic" { Interpolation::Bicubic } else { Interpolation::Bilinear };
            affine(pixels, shape, &matrix, &fill, how, &mut Vec::new());
        })?;
    }
    Ok(())
}

fn a_jitter_acts_in_its_order_as_torchvisions() -> Outcome {
    let jitter = Jitter { probability: 1.0, brightness: 0.8, contrast: 0.8, saturation: 0.8, hue: 0.5 };
    let half = Jitter { saturation: 0.0, ..jitter.clone() };
    let drawn: Vec<Jittered> = (0..40)
        .map(|id| if id % 4 == 0 { &half } else { &jitter }.draw(&mut Draw::new(3, id, 0, Purpose::Jitter, 0)))
        .map(|drawn| drawn.expect("probability 1"))
        .collect();
    let jobs: Vec<Value> = drawn
        .iter()
        .enumerate()
        .map(|(at, drawn)| json!({"do": "jitter", "at": at, "order": drawn.order, "amounts": drawn.amounts}))
        .collect();
    let shape = [40, 52, 3];
    all_equal(&picture(52, 40, 3, 60.0), shape, &jobs, |job, pixels| {
        drawn[job["at"].as_u64().expect("a number") as usize].apply(pixels, 3);
    })
}

fn blurred_pixels_are_torchvisions_within_one() -> Outcome {
    let jobs: Vec<Value> = [(23, 0.1), (23, 0.37), (23, 1.0), (23, 2.0), (9, 5.0), (3, 0.8), (1, 1.0)]
        .iter()
        .map(|(kernel, by)| json!({"do": "blur", "kernel": kernel, "by": by}))
        .collect();
    let (mut scratch, mut values, mut off) = (Vec::new(), 0, 0);
    for shape in [[64, 96, 3], [33, 21, 1]] {
        let pixels = picture(shape[1], shape[0], shape[2], 90.0);
        for (job, theirs) in jobs.iter().zip(asked("augment.py", &[], &pixels, shape, &jobs)?) {
            let mut ours = pixels.clone();
            let kernel = job["kernel"].as_u64().expect("a number") as usize;
            blur::gaussian(&mut ours, shape, kernel, job["by"].as_f64().expect("a number"), &mut scratch);
            let (count, most) = difference(&ours, &theirs);
            assert!(most <= 1, "{job} on {shape:?}: {count} values differ, by {most} at most");
            (values, off) = (values + ours.len(), off + count);
        }
    }
    // Sums that lie at a half; measured: none to a few of 130,000.
    assert!(off * 10_000 <= values, "{off} of {values} values differ");
    Ok(())
}

fn a_blur_may_reach_beyond_the_picture() -> Outcome {
    for shape in [[1, 1, 3], [1, 5, 1], [4, 2, 3]] {
        let mut pixels = vec![0; shape.iter().product()];
        pixels[0] = 200;
        let sum = |pixels: &[u8]| pixels.iter().map(|&v| i64::from(v)).sum::<i64>();
        blur::gaussian(&mut pixels, shape, 23, 2.0, &mut Vec::new());
        assert!(sum(&pixels) > 100, "{shape:?}: {pixels:?}");
        let mut flat = vec![131; pixels.len()];
        blur::gaussian(&mut flat, shape, 23, 2.0, &mut Vec::new());
        assert_eq!(flat, vec![131; pixels.len()]);
    }
    Ok(())
}

/// Fails unless `count` of `of` is within four deviations of the rate.
fn near(what: &str, count: usize, of: usize, rate: f64) {
    let (mean, deviation) = (of as f64 * rate, (of as f64 * rate * (1.0 - rate)).sqrt());
    assert!((count as f64 - mean).abs() <= 4.0 * deviation, "{what}: {count} of {of}, expected {mean:.0}");
}

fn a_jitters_draws_keep_their_ranges_and_rates() -> Outcome {
    let jitter = Jitter { probability: 0.7, brightness: 0.4, contrast: 1.5, saturation: 0.0, hue: 0.1 };
    let drawn: Vec<Jittered> =
        (0..4800).filter_map(|id| jitter.draw(&mut Draw::new(1, id, 2, Purpose::Jitter, 0))).collect();
    near("jittered", drawn.len(), 4800, 0.7);
    let mut orders = std::collections::BTreeMap::new();
    for one in &drawn {
        *orders.entry(one.order).or_insert(0) += 1;
        assert_eq!(one.amounts[2], None);
    }
    assert_eq!(orders.len(), 24);
    for (order, count) in orders {
        near(&format!("order {order:?}"), count, drawn.len(), 1.0 / 24.0);
    }
    for (which, low, high) in [(0, 0.6, 1.4), (1, 0.0, 2.5), (3, -0.1, 0.1)] {
        let values: Vec<f64> = drawn.iter().map(|one| one.amounts[which].expect("in use")).collect();
        assert!(values.iter().all(|v| (low..high).contains(v)), "{which}");
        near(
            "below the first quarter",
            values.iter().filter(|&&v| v < low + (high - low) / 4.0).count(),
            values.len(),
            0.25,
        );
        near("below the half", values.iter().filter(|&&v| v < (low + high) / 2.0).count(), values.len(), 0.5);
    }
    Ok(())
}

fn a_rand_augments_draws_keep_their_levels_and_rates() -> Outcome {
    let random = RandAugment::default();
    let layers: Vec<Layer> =
        (0..12000).filter_map(|id| random.layer(&mut Draw::new(1, id, 2, Purpose::RandAugment, 0))).collect();
    near("applied", layers.len(), 12000, 0.5);
    for operation in OPERATIONS {
        let count = layers.iter().filter(|layer| layer.operation == operation).count();
        near(&format!("{operation:?}"), count, layers.len(), 1.0 / 15.0);
    }
    // Shears give the level back: 9 with deviation 0.5, cut at 10 (2.3 in a hundred), either sign.
    let shears: Vec<f64> = layers
        .iter()
        .filter(|layer| matches!(layer.operation, Operation::ShearX | Operation::ShearY))
        .map(|layer| layer.argument / 0.03)
        .collect();
    near("negative", shears.iter().filter(|&&v| v < 0.0).count(), shears.len(), 0.5);
    near("below 9", shears.iter().filter(|v| v.abs() < 9.0).count(), shears.len(), 0.5);
    near("below 8.5", shears.iter().filter(|v| v.abs() < 8.5).count(), shears.len(), 0.1587);
    near("cut at 10", shears.iter().filter(|v| v.abs() > 9.999).count(), shears.len(), 0.0228);
    assert!(shears.iter().all(|v| v.abs() <= 10.0 + 1e-9));
    let still = RandAugment { deviation: 0.0, magnitude: 5.0, ..random };
    let layer = (0..99).find_map(|id| {
        let layer = still.layer(&mut Draw::new(1, id, 2, Purpose::RandAugment, 0))?;
        (layer.operation == Operation::Rotate).then_some(layer)
    });
    assert_eq!(layer.expect("a rotation").argument.abs(), 15.0);
    Ok(())
}

fn sample(width: u32, height: u32) -> Decoded {
    Decoded { width, height, channels: 3, pixels: picture(width as usize, height as usize, 3, 40.0) }
}

fn grid() -> Grid {
    Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 16 }
}

fn read(text: &str) -> Augment {
    serde_json::from_str(text).expect("a config")
}

fn grey_blur_and_solarise_come_at_their_rates() -> Outcome {
    let shape = [8, 8, 3];
    let pixels = picture(8, 8, 3, 60.0);
    for (text, rate) in [
        (r#"{"grey": 0.2}"#, 0.2),
        (r#"{"blur": {"probability": 0.6, "sigma": [1, 2]}}"#, 0.6),
        (r#"{"solarise": {"probability": 0.3, "threshold": 100}}"#, 0.3),
        (r#"{"jitter": {"probability": 0.5, "contrast": 0}}"#, 0.5),
    ] {
        let augment = read(text);
        augment.check()?;
        let changed = (0..1500).filter(|&id| {
            let mut now = pixels.clone();
            augment.apply(&mut now, shape, Interpolation::Bicubic, |purpose| Draw::new(9, id, 0, purpose, 0));
            now != pixels
        });
        near(text, changed.count(), 1500, rate);
    }
    let blur = read(r#"{"blur": {"sigma": [0.5, 1.5], "probability": 1}}"#).blur.expect("a blur");
    let sigmas: Vec<f64> =
        (0..2000).map(|id| blur.draw(&mut Draw::new(9, id, 0, Purpose::Blur, 0)).expect("probability 1").1).collect();
    assert!(sigmas.iter().all(|v| (0.5..1.5).contains(v)));
    near("deviations below 0.75", sigmas.iter().filter(|&&v| v < 0.75).count(), 2000, 0.25);
    Ok(())
}

/// Training's view at [seed, id, epoch, repeat].
fn shown(view: &View, image: &Decoded, at: [u64; 4]) -> Vec<u8> {
    let mut out = vec![0; grid().pixels().iter().product::<i64>() as usize];
    view.train(&grid(), Picture::from(image), at[0], at[1], at[2], at[3] as u32, &mut out).expect("a view");
    out
}

fn evaluated(view: &View, image: &Decoded) -> Vec<u8> {
    let mut out = vec![0; grid().pixels().iter().product::<i64>() as usize];
    view.eval(&grid(), Picture::from(image), &mut out).expect("a view");
    out
}

fn nothing_is_augmented_unless_it_is_named() -> Outcome {
    let image = sample(50, 40);
    let plain = View::default();
    assert_eq!(serde_json::from_str::<View>(r#"{"augment": {}}"#)?, plain);
    assert_eq!(serde_json::to_value(&plain.augment)?, json!({"grey": 0.0}));
    let loud = View { augment: read(r#"{"rand_augment": {"ops": 9}, "jitter": {}, "grey": 1}"#), ..plain.clone() };
    for id in 0..20 {
        assert_ne!(shown(&plain, &image, [1, id, 0, 0]), shown(&loud, &image, [1, id, 0, 0]));
    }
    // Evaluation sees the picture as it is.
    assert_eq!(evaluated(&plain, &image), evaluated(&loud, &image));
    Ok(())
}

fn an_augmented_view_depends_on_the_sample_alone() -> Outcome {
    let text = r#"{"rand_augment": {}, "jitter": {}, "grey": 0.3, "blur": {}, "solarise": {"probability": 0.5}}"#;
    let view = View { augment: read(text), ..View::default() };
    let (image, other) = (sample(90, 70), sample(33, 64));
    let train = |id, epoch, repeat| shown(&view, &image, [1, id, epoch, repeat]);
    let first: Vec<Vec<u8>> = (0..30).map(|id| train(id, 3, 0)).collect();
    // Backwards, on other threads, and with other samples between that leave their scratch behind.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for id in (0..30).rev() {
                    shown(&view, &other, [8, id + 5, 1, 0]);
                    assert_eq!(first[id as usize], train(id, 3, 0), "sample {id}");
                }
            });
        }
    });
    let same = (0..30).filter(|&id| first[id as usize] == train(id, 4, 0) || first[id as usize] == train(id, 3, 1));
    assert_eq!(same.count(), 0, "another epoch or another repeat gave the same view");
    // A purpose of its own for each: switching one on moves no number of another.
    let (jitter, both) = (read(r#"{"jitter": {}}"#), read(r#"{"jitter": {}, "solarise": {"probability": 0}}"#));
    let seen = |augment: &Augment| shown(&View { augment: augment.clone(), ..View::default() }, &image, [1, 2, 3, 0]);
    assert_eq!(seen(&jitter), seen(&both));
    Ok(())
}

fn a_config_that_cannot_be_is_refused() -> Outcome {
    for (text, key) in [
        (r#"{"grey": 1.1}"#, "view.augment.grey"),
        (r#"{"jitter": {"probability": -0.1}}"#, "view.augment.jitter.probability"),
        (r#"{"jitter": {"hue": 0.6}}"#, "view.augment.jitter.hue"),
        (r#"{"jitter": {"contrast": -1}}"#, "view.augment.jitter.contrast"),
        (r#"{"jitter": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}}"#, "view.augment.jitter"),
        (r#"{"blur": {"probability": 2}}"#, "view.augment.blur.probability"),
        (r#"{"blur": {"sigma": [0, 1]}}"#, "view.augment.blur.sigma"),
        (r#"{"blur": {"sigma": [2, 1]}}"#, "view.augment.blur.sigma"),
        (r#"{"blur": {"kernel": 22}}"#, "view.augment.blur.kernel"),
        (r#"{"solarise": {"threshold": 257}}"#, "view.augment.solarise.threshold"),
        (r#"{"rand_augment": {"ops": 0}}"#, "view.augment.rand_augment.ops"),
        (r#"{"rand_augment": {"magnitude": 11}}"#, "view.augment.rand_augment.magnitude"),
        (r#"{"rand_augment": {"deviation": -1}}"#, "view.augment.rand_augment.deviation"),
    ] {
        let view = View { augment: read(text), ..View::default() };
        let fault = view.check().expect_err(text);
        assert!(fault.message.contains(key), "{text}: {}", fault.message);
    }
    assert!(serde_json::from_str::<Augment>(r#"{"jitter": {"sharpness": 1}}"#).is_err(), "an unknown key was taken");
    let all = r#"{"rand_augment": {}, "jitter": {}, "grey": 0.2, "blur": {}, "solarise": {}}"#;
    Ok(read(all).check()?)
}
