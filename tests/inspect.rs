//! Tests of `occlude inspect`: its counts, findings and files.

use crate::data::shard::{pack_images, write_images};
use crate::support::object_store::Server;
use crate::support::training_job::occlude_command;
use crate::support::{Outcome, oracle, path_text};
use libtest_mimic::Failed;
use occlude::data::index::Index;
use occlude::data::pack::{PackOptions, pack};
use occlude::data::set::DataSet;
use occlude::error::ExitCode;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

crate::trials![
    an_intact_data_set_is_counted,
    image_sizes_are_counted_in_their_bins,
    a_flipped_bit_is_reported_by_sample,
    a_truncated_or_missing_shard_is_reported,
    a_missing_index_is_written,
    foreign_tars_are_indexed,
    a_subset_of_samples_can_be_inspected,
    a_data_set_in_a_store_is_inspected,
];

/// Returns the exit code, the JSON object of the last line, and the rest of the output.
fn inspect(folder: &Path, words: &[&str]) -> Result<(Option<i32>, Value, String), Failed> {
    let output = occlude_command(&[&["inspect"], words].concat()).current_dir(folder).output()?;
    let text = String::from_utf8(output.stdout)?;
    let printed = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let last = text.lines().last().ok_or_else(|| Failed::from(printed.clone()))?;
    Ok((output.status.code(), serde_json::from_str(last)?, printed))
}

/// Returns 3 × 8 images of 12 × 10 in shards of 5, and their folder.
fn small_set() -> Result<(tempfile::TempDir, PathBuf), Failed> {
    let folder = tempfile::tempdir()?;
    write_images(&folder.path().join("in"), 3, 8)?;
    let out = folder.path().join("out");
    pack_images(&folder.path().join("in"), &out, 5)?;
    Ok((folder, out))
}

fn an_intact_data_set_is_counted() -> Outcome {
    let (folder, out) = small_set()?;
    let (code, output, printed) = inspect(folder.path(), &[&path_text(&out)])?;
    assert_eq!(code, Some(0), "{printed}");
    for (key, expected) in [
        ("name", json!("small")),
        ("samples", json!(24)),
        ("inspected", json!(24)),
        ("shards", json!(5)),
        ("images", json!(24)),
        ("members", json!({"cls": 24, "png": 24})),
        ("classes", json!({"class.0": 8, "class.1": 8, "class.2": 8})),
        ("shorter_side", json!([{"from": 0.0, "to": 32.0, "count": 24}])),
        ("verdict", json!("ok")),
        ("damaged", json!([])),
        ("sheet", json!("small-sheet.png")),
    ] {
        assert_eq!(output[key], expected, "{key}");
    }
    let tars = (0..5).map(|n| fs::metadata(out.join(format!("small-{n:06}.tar"))).map(|meta| meta.len()));
    assert_eq!(output["bytes"], json!(tars.sum::<Result<u64, _>>()?));
    let sheet = image::open(folder.path().join("small-sheet.png"))?.to_rgb8();
    // 8 tiles of 12 × 10 at factor 8, with 6 pixels around each; 3 rows.
    assert_eq!(sheet.dimensions(), (8 * (12 * 8 + 6) + 6, 3 * (10 * 8 + 6) + 6));
    let set = DataSet::open(&path_text(&out))?;
    let first = image::Rgb([255; 3]);
    let (shard, row) = set.find_sample(0)?;
    let image = image::load_from_memory(&shard.read(row, &["png"])?)?.to_rgb8();
    assert_eq!((sheet.get_pixel(0, 0), sheet.get_pixel(6, 6)), (&first, image.get_pixel(0, 0)));
    Ok(())
}

fn image_sizes_are_counted_in_their_bins() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    fs::create_dir(&source)?;
    for (number, (width, height)) in [(31, 31), (32, 64), (64, 32), (40, 30), (300, 100)].into_iter().enumerate() {
        image::GrayImage::new(width, height).save(source.join(format!("{number}.png")))?;
    }
    let out = path_text(folder.path().join("out"));
    pack(&path_text(&source), &out, &PackOptions::default())?;
    let (_, output, _) = inspect(folder.path(), &[&out])?;
    let bin = |from: f64, to: f64, count: u64| json!({"from": from, "to": to, "count": count});
    let sides = json!([bin(0.0, 32.0, 2), bin(32.0, 64.0, 2), bin(64.0, 96.0, 0), bin(96.0, 128.0, 1)]);
    assert_eq!(output["shorter_side"], sides);
    let aspects: Vec<(f64, u64)> = output["aspect"].as_array().expect("bins").iter().map(count).collect();
    let expected = [(0.5, 1), (2.0 / 3.0, 0), (0.75, 0), (1.0, 1), (4.0 / 3.0, 1), (1.5, 0), (2.0, 1), (3.0, 1)];
    assert_eq!(aspects, expected);
    assert_eq!(output["classes"], json!({}));
    Ok(())
}

fn count(bin: &Value) -> (f64, u64) {
    (bin["from"].as_f64().expect("a bound"), bin["count"].as_u64().expect("a count"))
}

fn a_flipped_bit_is_reported_by_sample() -> Outcome {
    let (folder, out) = small_set()?;
    let (shard, row) = DataSet::open(&path_text(&out))?.find_sample(7)?;
    let member = shard.require_member(row, &["png"])?;
    let tar = out.join("small-000001.tar");
    let mut bytes = fs::read(&tar)?;
    bytes[member.offset as usize + 30] ^= 4;
    fs::write(&tar, bytes)?;
    let (code, output, printed) = inspect(folder.path(), &[&path_text(&out)])?;
    assert_eq!(code, Some(ExitCode::Corrupt as i32), "{printed}");
    assert_eq!((&output["verdict"], &output["damaged_count"]), (&json!("damaged"), &json!(1)));
    let name = output["damaged"][0].as_str().expect("a name");
    assert!(name.contains(member.name) && name.contains("small-000001.tar"), "{name}");
    assert_eq!((&output["inspected"], &output["images"]), (&json!(24), &json!(23)), "the other samples are counted");
    Ok(())
}

fn a_truncated_or_missing_shard_is_reported() -> Outcome {
    let (folder, out) = small_set()?;
    let tar = out.join("small-000003.tar");
    let full = fs::read(&tar)?;
    fs::write(&tar, &full[..full.len() / 2])?;
    let (code, output, printed) = inspect(folder.path(), &[&path_text(&out)])?;
    assert_eq!((code, &output["verdict"]), (Some(65), &json!("damaged")), "{printed}");
    assert!(output["damaged"][0].as_str().is_some_and(|name| name.contains("small-000003.tar")), "{output}");
    let (code, output, printed) = inspect(folder.path(), &[&path_text(&tar)])?;
    assert_eq!((code, &output["damaged_count"]), (Some(65), &json!(1)), "{printed}");
    fs::remove_file(&tar)?;
    let (code, output, _) = inspect(folder.path(), &[&path_text(&out)])?;
    assert_eq!(code, Some(65));
    assert!(output["damaged"][0].as_str().is_some_and(|name| name.contains("19 samples in 4 shards")), "{output}");
    let nothing = occlude_command(&["inspect", &path_text(folder.path().join("nowhere"))]).output()?;
    assert_eq!(nothing.status.code(), Some(ExitCode::Usage as i32), "a missing set is not damage");
    Ok(())
}

fn a_missing_index_is_written() -> Outcome {
    let (folder, out) = small_set()?;
    let next_to = |number: usize| out.join(format!("small-{number:06}.tar.idx"));
    let before = [fs::read(next_to(1))?, fs::read(next_to(4))?];
    [1, 4].iter().try_for_each(|&number| fs::remove_file(next_to(number)))?;
    let (code, output, printed) = inspect(folder.path(), &[&path_text(&out)])?;
    // Two shards of 5 and 4 samples, an image and a label each.
    assert_eq!(
        (code, &output["verdict"], &output["unchecked"]),
        (Some(0), &json!("unchecked"), &json!(18)),
        "{printed}"
    );
    assert!(!next_to(1).exists(), "no index was requested");
    let (code, output, _) = inspect(folder.path(), &[&path_text(&out), "--index"])?;
    assert_eq!((code, &output["verdict"], &output["indices_written"]), (Some(0), &json!("ok"), &json!(2)));
    assert!(before == [fs::read(next_to(1))?, fs::read(next_to(4))?], "the index differs from that of pack");
    assert_eq!(inspect(folder.path(), &[&path_text(&out), "--index"])?.1["indices_written"], json!(0));
    Ok(())
}

fn foreign_tars_are_indexed() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tar = folder.path().join("theirs.tar");
    oracle("webdataset_shards.py", &["write", &path_text(&tar), "6"])?;
    let (code, output, printed) = inspect(folder.path(), &[&path_text(&tar), "--index"])?;
    assert_eq!((code, &output["verdict"], &output["indices_written"]), (Some(0), &json!("ok"), &json!(1)), "{printed}");
    assert_eq!(output["members"], json!({"cls": 6, "png": 6, "seg.png": 6}));
    // Their images are bytes of no format: intact, but unreadable.
    assert_eq!((&output["unreadable_count"], &output["sheet"]), (&json!(6), &Value::Null));
    let index = Index::from_bytes(fs::read(folder.path().join("theirs.tar.idx"))?)?;
    assert!(index.members().all(|row| row.digest.is_some()) && index.sample_count() == 6);
    Ok(())
}

fn a_subset_of_samples_can_be_inspected() -> Outcome {
    let (folder, out) = small_set()?;
    let sheet = path_text(folder.path().join("a sheet.png"));
    let (code, output, printed) = inspect(folder.path(), &[&path_text(&out), "--sample", "6", "--sheet", &sheet])?;
    assert_eq!((code, &output["inspected"], &output["samples"]), (Some(0), &json!(6), &json!(24)), "{printed}");
    assert_eq!(output["members"], json!({"cls": 6, "png": 6}));
    assert_eq!(image::open(&sheet)?.width(), 6 * (12 * 8 + 6) + 6, "six images in one row");
    assert!(!folder.path().join("small-sheet.png").exists());
    Ok(())
}

fn a_data_set_in_a_store_is_inspected() -> Outcome {
    let (folder, out) = small_set()?;
    let server = Server::start();
    server.upload(&out, "b/small")?;
    let (_, here, _) = inspect(folder.path(), &[&path_text(&out)])?;
    server.faults(|errors| errors.fail_every = 7);
    let (code, mut there, printed) = inspect(folder.path(), &[&server.http("b/small")])?;
    assert_eq!(code, Some(0), "{printed}");
    there["url"] = here["url"].clone();
    assert_eq!(there, here);
    Ok(())
}
