//! Tests of training on colors: the palette is learned once, kept beside the run and in checkpoints, the same on all
//! ranks; images are sampled and probed at any block.

use crate::support::object_store::Server;
use crate::support::training_job::{Run, occlude_command, shared_data};
use crate::support::{Outcome, path_text, root};
use libtest_mimic::Failed;
use serde_json::{Value, json};
use std::path::Path;

crate::trials![
    a_palette_is_learned_once_and_kept,
    images_are_sampled_and_completed,
    layers_are_probed_and_searched,
    a_palette_goes_on_with_its_weights_and_not_with_other_data,
    a_palette_reaches_the_store_of_its_run,
];

/// Returns the tiny config for `steps` steps of eight images.
fn config(steps: u64) -> Result<Value, Failed> {
    let mut config: Value = serde_json::from_slice(&std::fs::read(root().join("configs/tiny/igpt.json"))?)?;
    config["method"]["igpt"]["encoder"] = json!({"width": 32, "depth": 3, "heads": 2});
    config["data"] = json!({"train": path_text(shared_data().join("train")), "threads": 1});
    config["train"] = json!({"steps": steps, "global_batch": 8, "seed": 5});
    config["checkpoint"]["every_steps"] = json!(2);
    config["log"] = json!({"image_interval_steps": steps, "interval_s": 1000});
    Ok(config)
}

fn palette(run: &Run) -> Result<String, Failed> {
    Ok(std::fs::read_to_string(run.folder().join("palette.json"))?)
}

fn a_palette_is_learned_once_and_kept() -> Outcome {
    let whole = Run::new(&config(4)?);
    let why = whole.finish(0, &[]);
    assert!(why.contains("learned a palette of 16 colors from"), "{why}");
    let file: Value = serde_json::from_str(&palette(&whole)?)?;
    assert_eq!(file["values"].as_array().map(Vec::len), Some(16));
    let saved = whole.newest_checkpoint()?;
    let bytes: Vec<u8> = file["values"]
        .as_array()
        .ok_or("rows")?
        .iter()
        .flat_map(|row| (row[0].as_f64().expect("a number") as f32).to_le_bytes())
        .collect();
    assert_eq!(saved.tensors["buffer.palette"].bytes, bytes);
    assert_eq!(std::fs::read_dir(whole.folder().join("pictures"))?.count(), 1, "half images, completed");

    let two = Run::new(&config(4)?);
    two.finish(2, &[]);
    assert_eq!(palette(&two)?, palette(&whole)?, "rank 0 learns alone");
    for (one, two) in whole.lines().iter().zip(two.lines()) {
        assert!((one.loss - two.loss).abs() <= 1e-5 * one.loss, "step {}: {} and {}", one.step, one.loss, two.loss);
    }
    // Another start from the checkpoint of step 2 learns nothing anew.
    std::fs::remove_dir_all(whole.folder().join("checkpoints/step-00000004"))?;
    let why = whole.finish(0, &[]);
    assert!(!why.contains("learned a palette"), "{why}");
    let again = whole.newest_checkpoint()?;
    assert!(saved.tensors.iter().all(|(name, tensor)| again.tensors[name] == *tensor), "resumed to the bit");
    Ok(())
}

fn output(words: &[&str]) -> Result<(i32, String, String), Failed> {
    let output = occlude_command(words).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
}

fn images_are_sampled_and_completed() -> Outcome {
    let run = Run::new(&config(2)?);
    run.finish(0, &[]);
    let folder = tempfile::tempdir()?;
    let checkpoint = path_text(run.folder());
    let sheet = |name: &str, words: &[&str]| -> Result<image::RgbImage, Failed> {
        let out = path_text(folder.path().join(name));
        let (code, printed, why) =
            output(&[&["sample", "--checkpoint", &checkpoint, "--out", &out][..], words].concat())?;
        assert_eq!((code, printed.trim()), (0, out.as_str()), "{why}");
        Ok(image::open(Path::new(&out))?.to_rgb8())
    };
    let ten = sheet("ten.png", &["--count", "10"])?;
    assert!(ten.width() > 8 * 96 && ten.height() > 2 * 96, "two rows: {:?}", ten.dimensions());
    assert_eq!(ten, sheet("again.png", &["--count", "10"])?, "the seed decides");
    assert_ne!(ten, sheet("other.png", &["--count", "10", "--seed", "1"])?);
    let digit = folder.path().join("digit.png");
    image::GrayImage::from_fn(28, 28, |x, y| image::Luma([(9 * x + y) as u8])).save(&digit)?;
    let completed = sheet("completed.png", &["--count", "3", &path_text(&digit)])?;
    assert!(completed.width() > 5 * 96, "given, three samples, original: {:?}", completed.dimensions());
    for (words, said) in
        [(["--temperature", "0"], "--temperature is 0"), (["--count", "0"], "--count is 0; it must lie in 1 to 1024")]
    {
        let (code, _, why) =
            output(&[&["sample", "--checkpoint", &checkpoint, "--out", "x.png"][..], &words].concat())?;
        assert!(code == 2 && why.contains(said), "{why}");
    }
    let mae = path_text(crate::support::training_job::reference_run(0).folder());
    let (code, _, why) = output(&["sample", "--checkpoint", &mae, "--out", "x.png"])?;
    assert!(code == 2 && why.contains("mae of this config samples no images"), "{why}");
    Ok(())
}

fn layers_are_probed_and_searched() -> Outcome {
    let run = Run::new(&config(2)?);
    run.finish(0, &[]);
    let [checkpoint, train, test] =
        [run.folder(), shared_data().join("train"), shared_data().join("test")].map(path_text);
    let evaluate = |words: &[&str]| -> Result<Value, Failed> {
        let common = ["evaluate", "--checkpoint", &checkpoint, "--train", &train, "--test", &test];
        let (code, printed, why) = output(&[&common[..], words].concat())?;
        assert_eq!(code, 0, "{why}");
        Ok(serde_json::from_str(printed.lines().last().ok_or("an answer")?)?)
    };
    let middle = evaluate(&["--protocol", "knn"])?;
    let first = evaluate(&["--protocol", "knn", "--layer", "1"])?;
    assert_eq!(middle["top1"], first["top1"], "of three blocks the middle one is number 1");
    let searched = evaluate(&["--protocol", "linear", "--layer", "search"])?;
    let accuracies: Vec<f64> = serde_json::from_value(searched["searched"].clone())?;
    let best = searched["layer"].as_u64().ok_or("a layer")? as usize;
    assert_eq!(accuracies.len(), 4, "the inputs of three blocks and the output of the last");
    assert!(accuracies.iter().all(|accuracy| *accuracy <= accuracies[best]), "{accuracies:?} {best}");
    let fixed = evaluate(&["--protocol", "linear", "--layer", &best.to_string()])?;
    assert_eq!(fixed["top1"], searched["top1"]);
    let words = ["evaluate", "--checkpoint", &checkpoint, "--train", &train, "--test", &test];
    for (more, said) in [
        (["--protocol", "linear", "--layer", "4"], "give 0 to 3, where 3 is after the last"),
        (["--protocol", "knn", "--layer", "search"], "--layer search belongs to --protocol linear"),
        (["--protocol", "linear", "--layer", "x"], "give the number of a block, or search"),
    ] {
        let (code, _, why) = output(&[&words[..], &more].concat())?;
        assert!(code == 2 && why.contains(said), "{why}");
    }
    let (code, _, why) = output(&["evaluate", "--checkpoint", &checkpoint, "--test", &test, "--protocol", "cka"])?;
    assert!(code == 2 && why.contains("reads whole images"), "{why}");
    Ok(())
}

fn a_palette_goes_on_with_its_weights_and_not_with_other_data() -> Outcome {
    let first = Run::new(&config(2)?);
    first.finish(0, &[]);
    let next = Run::new(&config(3)?);
    let mut other = config(2)?;
    other["data"]["train"] = json!(path_text(shared_data().join("test")));
    let moved = Run::new(&other);
    let why = moved.finish(0, &["--init", &path_text(first.folder())]);
    assert!(!why.contains("learned a palette"), "{why}");
    let tensor =
        |run: &Run| -> Result<Vec<u8>, Failed> { Ok(run.newest_checkpoint()?.tensors["buffer.palette"].bytes.clone()) };
    assert_eq!(tensor(&moved)?, tensor(&first)?, "weights mean nothing without their palette");
    let key = format!("method.igpt.palette={}", json!(path_text(first.folder().join("palette.json"))));
    next.finish(0, &["--set", &key]);
    assert_eq!(palette(&next)?, palette(&first)?);
    let refused = Run::new(&other).start(0, &["--set", &key]).end(60);
    assert!(refused.code == 2 && refused.stderr.contains("was learned from another data set"), "{}", refused.stderr);
    Ok(())
}

fn a_palette_reaches_the_store_of_its_run() -> Outcome {
    let server = Server::start();
    let run = Run::new(&config(2)?);
    let home = tempfile::tempdir()?;
    let path = path_text(run.config());
    let mut command = occlude_command(&["train", "--run", "s3://b/runs/colors", "--config", &path]);
    command.envs(server.s3_environment("somebody")).env("XDG_CACHE_HOME", home.path());
    let end = run.spawn(&mut command).end(60);
    assert_eq!(end.code, 0, "{}", end.stderr);
    assert!(server.keys().iter().any(|key| key.ends_with("runs/colors/palette.json")), "{:?}", server.keys());
    Ok(())
}
