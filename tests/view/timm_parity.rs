//! Tests of RandAugment, random erasing and mixing against timm, with the same random numbers.

use crate::support::{Outcome, oracle, read, root, write};
use crate::view::augment::{noisy_image, oracle_pixels};
use occlude::data::decode::Region;
use occlude::rng::{Philox, Purpose};
use occlude::view::color;
use occlude::view::crop::Interpolation;
use occlude::view::erase::Erase;
use occlude::view::mixup::MixupDraw;
use occlude::view::rand_augment::{Layer, OPERATIONS, Operation};
use serde_json::{Value, json};
use std::fs;
use tch::{Kind, Tensor};

crate::trials![;
    no_timm:
    rand_augment_layers_match_timm_bit_for_bit,
    erased_boxes_match_timm,
    mixed_batches_and_labels_match_timm,
];

fn no_timm() -> Option<&'static str> {
    let found = std::process::Command::new(root().join(".deps/venv/bin/python"))
        .args(["-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('timm') is None)"])
        .status()
        .is_ok_and(|status| status.success());
    (!found).then_some("timm is not among the installed oracles")
}

fn rand_augment_layers_match_timm_bit_for_bit() -> Outcome {
    let fill = [124, 116, 104];
    for (width, height, channels) in [(48, 37, 3), (31, 40, 1)] {
        let shape = [height, width, channels];
        let pixels = noisy_image(width, height, channels, 50.0);
        let mut jobs = Vec::new();
        let mut ours = Vec::new();
        let mut draw = Philox::new(1, 2, 3, Purpose::RandAugment, 0);
        for id in 0..120 {
            let how = if id % 2 == 0 { Interpolation::Bicubic } else { Interpolation::Bilinear };
            let mut augmented = pixels.clone();
            let mut layers = Vec::new();
            for operation in [id % 15, draw.uniform_int(15) as usize] {
                let chance = draw.uniform();
                let noise = 2.0 * draw.normal();
                let sign = draw.uniform();
                // Pillow 13 refuses to keep 0 bits, which is the meaning of level 10.
                let noise = if OPERATIONS[operation] == Operation::Posterize { noise.min(1.9) } else { noise };
                layers.push(json!([operation, chance, noise, sign]));
                if chance <= 0.5 {
                    let level = (9.0 + 0.5 * noise).clamp(0.0, 10.0);
                    Layer::new(OPERATIONS[operation], level, sign > 0.5).apply(
                        &mut augmented,
                        shape,
                        fill,
                        how,
                        &mut Vec::new(),
                    );
                }
            }
            let how = if id % 2 == 0 { "bicubic" } else { "bilinear" };
            jobs.push(json!({"layers": layers, "how": how, "fill": fill, "luma": color::luma(&fill)}));
            ours.push(augmented);
        }
        let reference = oracle_pixels("timm_data.py", &["layers"], &pixels, shape, &jobs)?;
        for ((job, ours), reference) in jobs.iter().zip(&ours).zip(&reference) {
            assert_eq!(ours, reference, "{job}");
        }
    }
    Ok(())
}

fn erased_boxes_match_timm() -> Outcome {
    let mut cases = Vec::new();
    let mut ours = Vec::new();
    for (width, height) in [(224, 224), (32, 96), (7, 5), (64, 2)] {
        for id in 0..60 {
            let erase = Erase { probability: if id % 3 == 0 { 0.25 } else { 1.0 }, ..Erase::default() };
            let draw = Philox::new(8, id, 0, Purpose::Erase, 0);
            let mut numbers = draw.clone();
            let uniform: Vec<f64> = (0..40).map(|_| numbers.uniform()).collect();
            cases.push(json!({
                "width": width, "height": height, "probability": erase.probability, "uniform": uniform
            }));
            let region = erase.sample_region(width, height, &mut draw.clone());
            // The reader of timm's pixels takes an empty box for none.
            let region = region.filter(|region| region.width > 0 && region.height > 0);
            ours.push(region.map(|Region { left, top, width, height }| [top, left, height, width]));
        }
    }
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), serde_json::to_vec(&cases)?)?;
    let reference: Vec<Option<[u32; 4]>> =
        serde_json::from_str(&oracle("timm_data.py", &["boxes", file.path().to_str().unwrap()])?)?;
    for ((case, ours), reference) in cases.iter().zip(&ours).zip(&reference) {
        assert_eq!(ours, reference, "[top, left, height, width] of {case}");
    }
    assert!(reference.iter().flatten().count() > 100, "too few boxes were sampled");
    Ok(())
}

fn mixed_batches_and_labels_match_timm() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().expect("UTF-8").to_owned();
    let samples = crate::support::normal(4, &[6, 3, 23, 34]);
    let labels = Tensor::from_slice(&[0i64, 4, 2, 2, 1, 6]);
    write(
        &path("in.safetensors"),
        &[("samples".into(), samples.shallow_clone()), ("labels".into(), labels.shallow_clone())],
    )?;
    let mut cases: Vec<(Value, MixupDraw)> = Vec::new();
    for (lam, smoothing) in [(0.3, 0.1), (0.987654, 0.0), (0.01, 0.2)] {
        let case = json!({"lam": lam, "cut": false, "middle": [0, 0], "classes": 7, "smoothing": smoothing});
        cases.push((case, MixupDraw::Mixup { lam }));
        for middle in [[17, 11], [0, 0], [33, 22], [5, 20]] {
            let case = json!({"lam": lam, "cut": true, "middle": middle, "classes": 7, "smoothing": smoothing});
            cases.push((case, MixupDraw::cutmix(34, 23, lam, middle)));
        }
    }
    fs::write(path("cases.json"), serde_json::to_vec(&cases.iter().map(|(case, _)| case).collect::<Vec<_>>())?)?;
    oracle("timm_data.py", &["mix", &text("in.safetensors"), &text("cases.json"), &text("out.safetensors")])?;
    let reference = read(&path("out.safetensors"))?;
    for (index, (case, mixture)) in cases.iter().enumerate() {
        assert_eq!(mixture.mix_samples(&samples), reference[&format!("samples.{index}")], "samples of {case}");
        let targets = mixture.mix_targets(&labels, 7, case["smoothing"].as_f64().expect("a number"));
        assert_eq!(targets.kind(), Kind::Float);
        assert!(targets.allclose(&reference[&format!("targets.{index}")], 0.0, 1e-7, false), "targets of {case}");
    }
    Ok(())
}
