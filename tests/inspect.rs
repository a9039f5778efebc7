//! `occlude inspect`: what it counts, what it finds, what it writes.

use crate::job::occlude;
use crate::server::Server;
use crate::shard::{packed, pictures, text};
use crate::support::{Outcome, oracle};
use libtest_mimic::Failed;
use occlude::data::index::Index;
use occlude::data::pack::{Options, pack};
use occlude::data::set::DataSet;
use occlude::fault::Code;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

crate::trials![
    a_whole_set_is_counted,
    sizes_fall_into_their_bins,
    a_flipped_bit_is_named,
    a_cut_or_missing_shard_is_named,
    an_index_is_written_where_there_is_none,
    tars_of_others_are_indexed,
    some_samples_stand_for_all,
    a_store_is_looked_at,
];

/// The exit code, the JSON object of the last line, and the rest of what was said.
fn inspect(folder: &Path, words: &[&str]) -> Result<(Option<i32>, Value, String), Failed> {
    let output = occlude(&[&["inspect"], words].concat()).current_dir(folder).output()?;
    let text = String::from_utf8(output.stdout)?;
    let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let last = text.lines().last().ok_or_else(|| Failed::from(said.clone()))?;
    Ok((output.status.code(), serde_json::from_str(last)?, said))
}

/// 3 × 8 pictures of 12 × 10 in shards of 5, and their folder.
fn small() -> Result<(tempfile::TempDir, PathBuf), Failed> {
    let folder = tempfile::tempdir()?;
    pictures(&folder.path().join("in"), 3, 8)?;
    let out = folder.path().join("out");
    packed(&folder.path().join("in"), &out, 5)?;
    Ok((folder, out))
}

fn a_whole_set_is_counted() -> Outcome {
    let (folder, out) = small()?;
    let (code, told, said) = inspect(folder.path(), &[&text(&out)])?;
    assert_eq!(code, Some(0), "{said}");
    for (key, wanted) in [
        ("name", json!("small")),
        ("samples", json!(24)),
        ("looked_at", json!(24)),
        ("shards", json!(5)),
        ("pictures", json!(24)),
        ("members", json!({"cls": 24, "png": 24})),
        ("classes", json!({"class.0": 8, "class.1": 8, "class.2": 8})),
        ("shorter_side", json!([{"from": 0.0, "to": 32.0, "count": 24}])),
        ("verdict", json!("ok")),
        ("damaged", json!([])),
        ("sheet", json!("small-sheet.png")),
    ] {
        assert_eq!(told[key], wanted, "{key}");
    }
    let tars = (0..5).map(|n| fs::metadata(out.join(format!("small-{n:06}.tar"))).map(|meta| meta.len()));
    assert_eq!(told["bytes"], json!(tars.sum::<Result<u64, _>>()?));
    let sheet = image::open(folder.path().join("small-sheet.png"))?.to_rgb8();
    // 8 tiles of 12 × 10, eightfold, with 6 pixels around each; 3 rows.
    assert_eq!(sheet.dimensions(), (8 * (12 * 8 + 6) + 6, 3 * (10 * 8 + 6) + 6));
    let (set, first) = (DataSet::open(&text(&out))?, image::Rgb([255; 3]));
    let (shard, row) = set.sample(0)?;
    let picture = image::load_from_memory(&shard.read(row, &["png"])?)?.to_rgb8();
    assert_eq!((sheet.get_pixel(0, 0), sheet.get_pixel(6, 6)), (&first, picture.get_pixel(0, 0)));
    Ok(())
}

fn sizes_fall_into_their_bins() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    fs::create_dir(&source)?;
    for (number, (width, height)) in [(31, 31), (32, 64), (64, 32), (40, 30), (300, 100)].into_iter().enumerate() {
        image::GrayImage::new(width, height).save(source.join(format!("{number}.png")))?;
    }
    let out = text(&folder.path().join("out"));
    pack(&text(&source), &out, &Options::default())?;
    let (_, told, _) = inspect(folder.path(), &[&out])?;
    let bin = |from: f64, to: f64, count: u64| json!({"from": from, "to": to, "count": count});
    let sides = json!([bin(0.0, 32.0, 2), bin(32.0, 64.0, 2), bin(64.0, 96.0, 0), bin(96.0, 128.0, 1)]);
    assert_eq!(told["shorter_side"], sides);
    let aspects: Vec<(f64, u64)> = told["aspect"].as_array().expect("bins").iter().map(count).collect();
    let wanted = [(0.5, 1), (2.0 / 3.0, 0), (0.75, 0), (1.0, 1), (4.0 / 3.0, 1), (1.5, 0), (2.0, 1), (3.0, 1)];
    assert_eq!(aspects, wanted);
    assert_eq!(told["classes"], json!({}));
    Ok(())
}

fn count(bin: &Value) -> (f64, u64) {
    (bin["from"].as_f64().expect("a bound"), bin["count"].as_u64().expect("a count"))
}

fn a_flipped_bit_is_named() -> Outcome {
    let (folder, out) = small()?;
    let (shard, row) = DataSet::open(&text(&out))?.sample(7)?;
    let member = shard.wanted(row, &["png"])?;
    let tar = out.join("small-000001.tar");
    let mut bytes = fs::read(&tar)?;
    bytes[member.offset as usize + 30] ^= 4;
    fs::write(&tar, bytes)?;
    let (code, told, said) = inspect(folder.path(), &[&text(&out)])?;
    assert_eq!(code, Some(Code::Corrupt as i32), "{said}");
    assert_eq!((&told["verdict"], &told["damaged_count"]), (&json!("damaged"), &json!(1)));
    let name = told["damaged"][0].as_str().expect("a name");
    assert!(name.contains(member.name) && name.contains("small-000001.tar"), "{name}");
    assert_eq!((&told["looked_at"], &told["pictures"]), (&json!(24), &json!(23)), "the others are counted");
    Ok(())
}

fn a_cut_or_missing_shard_is_named() -> Outcome {
    let (folder, out) = small()?;
    let tar = out.join("small-000003.tar");
    let whole = fs::read(&tar)?;
    fs::write(&tar, &whole[..whole.len() / 2])?;
    let (code, told, said) = inspect(folder.path(), &[&text(&out)])?;
    assert_eq!((code, &told["verdict"]), (Some(65), &json!("damaged")), "{said}");
    assert!(told["damaged"][0].as_str().is_some_and(|name| name.contains("small-000003.tar")), "{told}");
    let (code, told, said) = inspect(folder.path(), &[&text(&tar)])?;
    assert_eq!((code, &told["damaged_count"]), (Some(65), &json!(1)), "{said}");
    fs::remove_file(&tar)?;
    let (code, told, _) = inspect(folder.path(), &[&text(&out)])?;
    assert_eq!(code, Some(65));
    assert!(told["damaged"][0].as_str().is_some_and(|name| name.contains("19 samples in 4 shards")), "{told}");
    let nothing = occlude(&["inspect", &text(&folder.path().join("nowhere"))]).output()?;
    assert_eq!(nothing.status.code(), Some(Code::Usage as i32), "no set is no damage");
    Ok(())
}

fn an_index_is_written_where_there_is_none() -> Outcome {
    let (folder, out) = small()?;
    let beside = |number: usize| out.join(format!("small-{number:06}.tar.idx"));
    let before = [fs::read(beside(1))?, fs::read(beside(4))?];
    [1, 4].iter().try_for_each(|&number| fs::remove_file(beside(number)))?;
    let (code, told, said) = inspect(folder.path(), &[&text(&out)])?;
    // Two shards of 5 and 4 samples, a picture and a label each.
    assert_eq!((code, &told["verdict"], &told["unchecked"]), (Some(0), &json!("unchecked"), &json!(18)), "{said}");
    assert!(!beside(1).exists(), "nobody asked for an index");
    let (code, told, _) = inspect(folder.path(), &[&text(&out), "--index"])?;
    assert_eq!((code, &told["verdict"], &told["indexed"]), (Some(0), &json!("ok"), &json!(2)));
    assert!(before == [fs::read(beside(1))?, fs::read(beside(4))?], "not the index that pack writes");
    assert_eq!(inspect(folder.path(), &[&text(&out), "--index"])?.1["indexed"], json!(0));
    Ok(())
}

fn tars_of_others_are_indexed() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tar = folder.path().join("theirs.tar");
    oracle("webdataset_read.py", &["write", &text(&tar), "6"])?;
    let (code, told, said) = inspect(folder.path(), &[&text(&tar), "--index"])?;
    assert_eq!((code, &told["verdict"], &told["indexed"]), (Some(0), &json!("ok"), &json!(1)), "{said}");
    assert_eq!(told["members"], json!({"cls": 6, "png": 6, "seg.png": 6}));
    // Their pictures are bytes of no format: whole, and unreadable.
    assert_eq!((&told["unreadable_count"], &told["sheet"]), (&json!(6), &Value::Null));
    let index = Index::from_bytes(fs::read(folder.path().join("theirs.tar.idx"))?)?;
    assert!(index.rows().all(|row| row.digest.is_some()) && index.samples() == 6);
    Ok(())
}

fn some_samples_stand_for_all() -> Outcome {
    let (folder, out) = small()?;
    let sheet = text(&folder.path().join("a sheet.png"));
    let (code, told, said) = inspect(folder.path(), &[&text(&out), "--sample", "6", "--sheet", &sheet])?;
    assert_eq!((code, &told["looked_at"], &told["samples"]), (Some(0), &json!(6), &json!(24)), "{said}");
    assert_eq!(told["members"], json!({"cls": 6, "png": 6}));
    assert_eq!(image::open(&sheet)?.width(), 6 * (12 * 8 + 6) + 6, "six pictures on one row");
    assert!(!folder.path().join("small-sheet.png").exists());
    Ok(())
}

fn a_store_is_looked_at() -> Outcome {
    let (folder, out) = small()?;
    let server = Server::start();
    server.upload(&out, "b/small")?;
    let (_, here, _) = inspect(folder.path(), &[&text(&out)])?;
    server.faults(|faults| faults.fail_every = 7);
    let (code, mut there, said) = inspect(folder.path(), &[&server.http("b/small")])?;
    assert_eq!(code, Some(0), "{said}");
    there["url"] = here["url"].clone();
    assert_eq!(there, here);
    Ok(())
}
