//! RandAugment, random erasing and mixing against timm, with the same numbers.

use crate::augment::{asked, picture};
use crate::support::{Outcome, oracle, read, root, skipped, trial, write};
use libtest_mimic::Trial;
use occlude::data::decode::Region;
use occlude::part::view::colour;
use occlude::part::view::crop::Interpolation;
use occlude::part::view::erase::Erase;
use occlude::part::view::mix::Mixture;
use occlude::part::view::rand_augment::{Layer, OPERATIONS, Operation};
use occlude::rng::{Draw, Purpose};
use serde_json::{Value, json};
use std::fs;
use tch::{Kind, Tensor};

type Case = (&'static str, fn() -> Outcome);

pub fn trials() -> Vec<Trial> {
    let cases: [Case; 3] = [
        ("timm::random_layers_are_timms_to_the_bit", random_layers_are_timms_to_the_bit),
        ("timm::erased_boxes_are_timms_from_the_same_numbers", erased_boxes_are_timms_from_the_same_numbers),
        ("timm::mixed_batches_and_labels_are_timms", mixed_batches_and_labels_are_timms),
    ];
    let found = std::process::Command::new(root().join(".deps/venv/bin/python"))
        .args(["-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('timm') is None)"])
        .status()
        .is_ok_and(|status| status.success());
    let one = |(name, case): Case| match found {
        true => trial(name, case),
        false => skipped(name, "timm is not among the installed oracles"),
    };
    cases.into_iter().map(one).collect()
}

fn random_layers_are_timms_to_the_bit() -> Outcome {
    let fill = [124, 116, 104];
    for (width, height, channels) in [(48, 37, 3), (31, 40, 1)] {
        let shape = [height, width, channels];
        let pixels = picture(width, height, channels, 50.0);
        let (mut jobs, mut ours) = (Vec::new(), Vec::new());
        let mut draw = Draw::new(1, 2, 3, Purpose::RandAugment, 0);
        for id in 0..120 {
            let how = if id % 2 == 0 { Interpolation::Bicubic } else { Interpolation::Bilinear };
            let mut now = pixels.clone();
            let mut layers = Vec::new();
            for operation in [id % 15, draw.below(15) as usize] {
                let (chance, noise, sign) = (draw.uniform(), 2.0 * draw.normal(), draw.uniform());
                // Pillow 13 refuses to keep 0 bits, which is what level 10 means.
                let noise = if OPERATIONS[operation] == Operation::Posterise { noise.min(1.9) } else { noise };
                layers.push(json!([operation, chance, noise, sign]));
                if chance <= 0.5 {
                    let level = (9.0 + 0.5 * noise).clamp(0.0, 10.0);
                    Layer::new(OPERATIONS[operation], level, sign > 0.5).apply(
                        &mut now,
                        shape,
                        fill,
                        how,
                        &mut Vec::new(),
                    );
                }
            }
            let how = if id % 2 == 0 { "bicubic" } else { "bilinear" };
            jobs.push(json!({"layers": layers, "how": how, "fill": fill, "luma": colour::luma(&fill)}));
            ours.push(now);
        }
        let theirs = asked("timm_data.py", &["layers"], &pixels, shape, &jobs)?;
        for ((job, ours), theirs) in jobs.iter().zip(&ours).zip(&theirs) {
            assert_eq!(ours, theirs, "{job}");
        }
    }
    Ok(())
}

fn erased_boxes_are_timms_from_the_same_numbers() -> Outcome {
    let (mut cases, mut ours) = (Vec::new(), Vec::new());
    for (width, height) in [(224, 224), (32, 96), (7, 5), (64, 2)] {
        for id in 0..60 {
            let erase = Erase { probability: if id % 3 == 0 { 0.25 } else { 1.0 }, ..Erase::default() };
            let draw = Draw::new(8, id, 0, Purpose::Erase, 0);
            let mut numbers = draw.clone();
            let uniform: Vec<f64> = (0..40).map(|_| numbers.uniform()).collect();
            cases.push(json!({
                "width": width, "height": height, "probability": erase.probability, "uniform": uniform
            }));
            let region = erase.region(width, height, &mut draw.clone());
            // An empty box is none to the reader of timm's pixels.
            let region = region.filter(|region| region.width > 0 && region.height > 0);
            ours.push(region.map(|Region { left, top, width, height }| [top, left, height, width]));
        }
    }
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), serde_json::to_vec(&cases)?)?;
    let theirs: Vec<Option<[u32; 4]>> =
        serde_json::from_str(&oracle("timm_data.py", &["boxes", file.path().to_str().unwrap()])?)?;
    for ((case, ours), theirs) in cases.iter().zip(&ours).zip(&theirs) {
        assert_eq!(ours, theirs, "[top, left, height, width] of {case}");
    }
    assert!(theirs.iter().flatten().count() > 100, "hardly a box was drawn");
    Ok(())
}

fn mixed_batches_and_labels_are_timms() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().expect("UTF-8").to_owned();
    let (samples, labels) = (crate::support::normal(4, &[6, 3, 23, 34]), Tensor::from_slice(&[0i64, 4, 2, 2, 1, 6]));
    write(
        &path("in.safetensors"),
        &[("samples".into(), samples.shallow_clone()), ("labels".into(), labels.shallow_clone())],
    )?;
    let mut cases: Vec<(Value, Mixture)> = Vec::new();
    for (lam, smoothing) in [(0.3, 0.1), (0.987654, 0.0), (0.01, 0.2)] {
        let case = json!({"lam": lam, "cut": false, "middle": [0, 0], "classes": 7, "smoothing": smoothing});
        cases.push((case, Mixture::Blended { lam }));
        for middle in [[17, 11], [0, 0], [33, 22], [5, 20]] {
            let case = json!({"lam": lam, "cut": true, "middle": middle, "classes": 7, "smoothing": smoothing});
            cases.push((case, Mixture::pasted(34, 23, lam, middle)));
        }
    }
    fs::write(path("cases.json"), serde_json::to_vec(&cases.iter().map(|(case, _)| case).collect::<Vec<_>>())?)?;
    oracle("timm_data.py", &["mix", &text("in.safetensors"), &text("cases.json"), &text("out.safetensors")])?;
    let theirs = read(&path("out.safetensors"))?;
    for (index, (case, mixture)) in cases.iter().enumerate() {
        assert_eq!(mixture.samples(&samples), theirs[&format!("samples.{index}")], "samples of {case}");
        let targets = mixture.targets(&labels, 7, case["smoothing"].as_f64().expect("a number"));
        assert_eq!(targets.kind(), Kind::Float);
        assert!(targets.allclose(&theirs[&format!("targets.{index}")], 0.0, 1e-7, false), "targets of {case}");
    }
    Ok(())
}
