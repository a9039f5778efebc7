//! Tests of packing: from folders and lists, on disks and in stores, on any number of threads, killed and resumed.

use crate::data::shard::{pack_images, write_images};
use crate::support::object_store::Server;
use crate::support::training_job::occlude_command;
use crate::support::{Outcome, oracle, path_text};
use libtest_mimic::Failed;
use occlude::data::pack::{ImageEncoding, PackOptions, pack};
use occlude::data::set::DataSet;
use occlude::data::shard::IMAGE_EXTENSIONS;
use occlude::data::store::Store;
use occlude::error::ExitCode;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

crate::trials![
    every_list_format_makes_the_same_tars,
    extra_fields_of_a_line_are_kept,
    labels_can_be_numbers,
    image_formats_are_detected_by_content,
    an_invalid_list_is_rejected,
    webdataset_reads_captions,
    any_number_of_threads_writes_the_same_bytes,
    resizing_matches_pillow,
    images_that_are_small_enough_are_unchanged,
    an_unreadable_image_does_not_shift_the_others,
    a_killed_pack_resumes,
    an_incomplete_shard_is_written_again,
    stores_are_read_and_written,
    a_killed_pack_into_a_store_resumes,
    a_web_server_is_read_only,
];

/// Returns every file of a folder.
fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, Failed> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        found.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
    }
    Ok(found)
}

/// Returns the objects of a server below `bucket`.
fn objects(server: &Server, bucket: &str) -> Result<BTreeMap<String, Vec<u8>>, Failed> {
    let store = Store::open(&server.http(bucket))?;
    let below = format!("{bucket}/");
    let names: Vec<String> =
        server.keys().iter().filter_map(|key| key.strip_prefix(&below).map(str::to_owned)).collect();
    Ok(names.into_iter().map(|name| Ok((name.clone(), store.get(&name)?))).collect::<occlude::error::Result<_>>()?)
}

fn small() -> PackOptions {
    PackOptions { name: Some("small".into()), samples_per_shard: 5, ..PackOptions::default() }
}

/// Returns a folder with 3 × 8 images in `in/`, and list rows with path, label name and caption.
fn folder_and_rows() -> Result<(tempfile::TempDir, Vec<Value>), Failed> {
    let folder = tempfile::tempdir()?;
    write_images(&folder.path().join("in"), 3, 8)?;
    let row = |class: usize, number: usize| {
        let caption = format!("picture {number}, of \"class\" {class} … naïve");
        json!({"path": format!("class.{class}/p.{number:03}.png"), "label": format!("class.{class}"), "caption": caption})
    };
    let rows = (0..3).flat_map(|class| (0..8).map(move |number| row(class, number)));
    Ok((folder, rows.collect()))
}

/// Writes these rows as a list file.
fn write_list(folder: &Path, kind: &str, rows: &[Value]) -> Result<String, Failed> {
    let path = folder.join(format!("list.{kind}"));
    let cells = |row: &Value| -> Vec<String> {
        let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
        row.as_object().expect("a row").values().map(text).collect()
    };
    match kind {
        "jsonl" => fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>())?,
        "parquet" => {
            let plain = folder.join("rows.txt");
            fs::write(&plain, Value::from(rows).to_string())?;
            oracle("pack.py", &["parquet", &path_text(&plain), &path_text(&path)])?;
        }
        _ => {
            let quoted = |cell: String| format!("\"{}\"", cell.replace('"', "\"\""));
            let comma = if kind == "csv" { "," } else { "\t" };
            let heads: Vec<&String> = rows[0].as_object().expect("a row").keys().collect();
            let head = heads.iter().map(|head| head.as_str()).collect::<Vec<_>>().join(comma);
            let lines = rows.iter().map(|row| cells(row).into_iter().map(quoted).collect::<Vec<_>>().join(comma));
            fs::write(&path, std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n"))?;
        }
    }
    Ok(path_text(&path))
}

fn every_list_format_makes_the_same_tars() -> Outcome {
    let (folder, rows) = folder_and_rows()?;
    let at = |name: &str| folder.path().join(name);
    let mut first: Option<BTreeMap<String, Vec<u8>>> = None;
    for kind in ["csv", "tsv", "jsonl", "parquet"] {
        let list = write_list(&at("in"), kind, &rows)?;
        let packed = pack(&list, &path_text(at(kind)), &small())?;
        assert_eq!((packed.data_sets[0].1.samples, packed.skipped.len()), (24, 0), "{kind}");
        let found = files(&at(kind))?;
        assert_eq!(found.len(), 11, "5 tars, 5 indices, 1 manifest");
        assert!(first.get_or_insert(found.clone()) == &found, "a list as {kind} gives different bytes");
    }
    let set = DataSet::open(&path_text(at("csv")))?;
    assert_eq!(set.classes, ["class.0", "class.1", "class.2"]);
    for index in 0..24 {
        let (shard, row) = set.find_sample(index)?;
        let class: usize = shard.key(row)["class-".len()..][..1].parse()?;
        let number: usize = shard.key(row)[shard.key(row).len() - 3..].parse()?;
        assert_eq!(shard.read_label(row)?, Some(class as i64));
        let caption = format!("picture {number}, of \"class\" {class} … naïve");
        assert_eq!(String::from_utf8(shard.read(row, &["txt"])?)?, caption);
        let original = fs::read(at("in").join(format!("class.{class}/p.{number:03}.png")))?;
        assert_eq!(shard.read(row, IMAGE_EXTENSIONS)?, original);
    }
    // Without captions a list gives the same tars as its folders.
    let bare: Vec<Value> = rows.iter().map(|row| json!({"path": row["path"], "label": row["label"]})).collect();
    let list = write_list(&at("in"), "csv", &bare)?;
    pack(&list, &path_text(at("bare")), &small())?;
    pack_images(&at("in"), &at("folder"), 5)?;
    assert!(files(&at("bare"))? == files(&at("folder"))?, "a list differs from its folder");
    Ok(())
}

fn extra_fields_of_a_line_are_kept() -> Outcome {
    let (folder, mut rows) = folder_and_rows()?;
    for (at, row) in rows.iter_mut().enumerate() {
        row["source"] = json!({"page": at, "tags": ["a", null]});
        row["caption"] = Value::Null;
    }
    let list = write_list(&folder.path().join("in"), "jsonl", &rows)?;
    let out = path_text(folder.path().join("out"));
    pack(&list, &out, &small())?;
    let set = DataSet::open(&out)?;
    for index in 0..24 {
        let (shard, row) = set.find_sample(index)?;
        assert!(!shard.has_member(row, "txt"), "null is not a caption");
        let more: Value = serde_json::from_slice(&shard.read(row, &["json"])?)?;
        let class = shard.read_label(row)?.expect("a label");
        let number = &shard.key(row)[shard.key(row).len() - 3..];
        let page = class as usize * 8 + number.parse::<usize>()?;
        assert_eq!(more, json!({"source": {"page": page, "tags": ["a", null]}}));
    }
    Ok(())
}

fn labels_can_be_numbers() -> Outcome {
    let (folder, rows) = folder_and_rows()?;
    let numbered: Vec<Value> =
        rows.iter().enumerate().map(|(at, row)| json!({"path": row["path"], "label": at + 100})).collect();
    for kind in ["csv", "jsonl", "parquet"] {
        let out = path_text(folder.path().join(kind));
        pack(&write_list(&folder.path().join("in"), kind, &numbered)?, &out, &small())?;
        let set = DataSet::open(&out)?;
        assert!(set.classes.is_empty());
        let labels = (0..24).map(|index| set.find_sample(index).and_then(|(shard, row)| shard.read_label(row)));
        let mut labels: Vec<_> = labels.collect::<Result<_, _>>()?;
        labels.sort();
        assert_eq!(labels, (100..124).map(Some).collect::<Vec<_>>(), "{kind}");
    }
    Ok(())
}

fn image_formats_are_detected_by_content() -> Outcome {
    let (folder, _) = folder_and_rows()?;
    let source = folder.path().join("in");
    let out = path_text(folder.path().join("out"));
    fs::rename(source.join("class.0/p.000.png"), source.join("class.0/0123"))?;
    fs::write(source.join("list.csv"), "path\n./class.0/0123\n")?;
    pack(&path_text(source.join("list.csv")), &out, &small())?;
    let (shard, row) = DataSet::open(&out)?.find_sample(0)?;
    assert_eq!(shard.require_member(row, IMAGE_EXTENSIONS)?.name, "class-0_0123.png");
    Ok(())
}

fn an_invalid_list_is_rejected() -> Outcome {
    let (folder, _) = folder_and_rows()?;
    let out = path_text(folder.path().join("out"));
    let name = "class.0/p.000.png";
    for (kind, list, word) in [
        ("csv", "file,label\na.png,1\n".to_owned(), "no column `path`"),
        ("csv", format!("path,label\n{name},1\n{name},1\n"), "both name"),
        ("csv", format!("path,label\n{name},1\nclass.0/p.001.png,\n"), "row 2 has no label"),
        ("csv", format!("path,label\n{name},-1\n"), "labels begin at 0"),
        ("csv", "path,label\n,1\n".to_owned(), "row 1 has no path"),
        ("csv", "path\n".to_owned(), "no rows"),
        ("jsonl", format!("{{\"path\": \"{name}\"}}\n[1]\n"), "line 2"),
        ("jsonl", format!("{{\"path\": \"{name}\", \"label\": 0.5}}\n"), "label is 0.5"),
        ("parquet", "not Parquet".to_owned(), "Parquet"),
    ] {
        let path = folder.path().join(format!("in/list.{kind}"));
        fs::write(&path, &list)?;
        let error = pack(&path_text(&path), &out, &small()).expect_err(&list);
        assert_eq!(error.code, ExitCode::Usage, "{error}");
        assert!(error.message.contains(word) && error.message.contains(&path_text(&path)), "{error}");
    }
    let path = folder.path().join("in/list.csv");
    fs::write(&path, format!("path\n{name}\nnowhere.png\n"))?;
    let error = pack(&path_text(&path), &out, &small()).expect_err("one of two is missing");
    assert_eq!(error.code, ExitCode::Corrupt);
    assert!(error.message.contains("nowhere.png: there is no such file"), "{error}");
    for (quality, encode, resize) in
        [(0, None, Some(5)), (101, Some(ImageEncoding::Jpeg), None), (50, Some(ImageEncoding::Png), None)]
    {
        let options = PackOptions { quality: Some(quality), encode, resize, ..small() };
        let error = pack(&path_text(folder.path().join("in")), &out, &options).expect_err("a quality");
        assert_eq!(error.code, ExitCode::Usage, "{error}");
    }
    Ok(())
}

fn webdataset_reads_captions() -> Outcome {
    let (folder, rows) = folder_and_rows()?;
    let out = folder.path().join("out");
    pack(&write_list(&folder.path().join("in"), "csv", &rows)?, &path_text(&out), &small())?;
    let tars: Vec<String> = (0..5).map(|n| path_text(out.join(format!("small-{n:06}.tar")))).collect();
    let arguments: Vec<&str> = std::iter::once("read").chain(tars.iter().map(String::as_str)).collect();
    let reference: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_str(&oracle("webdataset_shards.py", &arguments)?)?;
    assert_eq!(reference.len(), 24);
    for (key, members) in reference {
        assert_eq!(members.keys().collect::<Vec<_>>(), ["cls", "png", "txt"], "{key}");
    }
    Ok(())
}

fn any_number_of_threads_writes_the_same_bytes() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_images(&folder.path().join("in"), 3, 8)?;
    let mut first: Option<BTreeMap<String, Vec<u8>>> = None;
    for threads in [1, 2, 7, 40] {
        let out = folder.path().join(format!("out-{threads}"));
        let options = PackOptions { threads, resize: Some(7), encode: Some(ImageEncoding::Jpeg), ..small() };
        pack(&path_text(folder.path().join("in")), &path_text(&out), &options)?;
        let found = files(&out)?;
        assert!(first.get_or_insert(found.clone()) == &found, "{threads} threads give different bytes");
    }
    let set = DataSet::open(&path_text(folder.path().join("out-2")))?;
    let (shard, row) = set.find_sample(0)?;
    let image = image::load_from_memory(&shard.read(row, &["jpg"])?)?;
    assert_eq!((image.width(), image.height()), (8, 7), "12 x 10 with the shorter side at 7");
    Ok(())
}

/// Two lists of sizes, and the mean and maximum difference where there is one.
type Comparison = (Vec<u32>, Vec<u32>, Option<[f64; 2]>);

fn resizing_matches_pillow() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = path_text(folder.path().join("in"));
    oracle("pack.py", &["images", &source])?;
    // The resizers round differently, one value in six by one; JPEG at quality 90 adds more.
    for (encode, extension, near) in [
        (ImageEncoding::Png, "png", [0.25, 1.0]),
        (ImageEncoding::Webp, "webp", [0.25, 1.0]),
        (ImageEncoding::Jpeg, "jpg", [3.0, 60.0]),
    ] {
        let out = folder.path().join(extension);
        let options =
            PackOptions { name: Some("r".into()), resize: Some(40), encode: Some(encode), ..PackOptions::default() };
        pack(&source, &path_text(&out), &options)?;
        let output = oracle("pack.py", &["compare", &source, "40", &path_text(out.join("r-000000.tar"))])?;
        let output: BTreeMap<String, Comparison> = serde_json::from_str(&output)?;
        assert_eq!(output.len(), 8);
        assert_eq!(output["rotated"].0, [40, 58], "the EXIF orientation is applied");
        assert_eq!(output["small"].0, [30, 20], "nothing is enlarged");
        for (key, (ours, reference, far)) in output {
            assert_eq!(ours, reference, "{key}");
            let far = far.expect("images of one size");
            assert!(far[0] <= near[0] && far[1] <= near[1], "{key} as {extension} differs from Pillow by {far:?}");
        }
        let set = DataSet::open(&path_text(&out))?;
        for index in 0..8 {
            let (shard, row) = set.find_sample(index)?;
            let image = image::load_from_memory(&shard.read(row, &[extension])?)?;
            let gray = shard.key(row) == "gray" && encode != ImageEncoding::Webp;
            assert_eq!(image.color().channel_count(), if gray { 1 } else { 3 }, "{}", shard.key(row));
        }
    }
    Ok(())
}

fn images_that_are_small_enough_are_unchanged() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    oracle("pack.py", &["images", &path_text(&source)])?;
    let out = path_text(folder.path().join("out"));
    pack(&path_text(&source), &out, &PackOptions { resize: Some(85), ..PackOptions::default() })?;
    let set = DataSet::open(&out)?;
    let mut untouched = 0;
    for index in 0..8 {
        let (shard, row) = set.find_sample(index)?;
        let member = shard.require_member(row, IMAGE_EXTENSIONS)?;
        let (key, extension) = member.split_name();
        let same = shard.read(row, IMAGE_EXTENSIONS)? == fs::read(source.join(format!("{key}.{extension}")))?;
        assert_eq!(same, ["tall", "small"].contains(&key), "{key}: only sides above 85 shrink");
        untouched += usize::from(same);
    }
    assert_eq!(untouched, 2);
    Ok(())
}

fn an_unreadable_image_does_not_shift_the_others() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    write_images(&source, 3, 8)?;
    let options = PackOptions { max_corrupt_fraction: 0.1, ..small() };
    pack(&path_text(&source), &path_text(folder.path().join("whole")), &options)?;
    let bad = source.join("class.1/p.003.png");
    let length = fs::metadata(&bad)?.len() as usize;
    fs::write(&bad, vec![0; length])?;
    let packed = pack(&path_text(&source), &path_text(folder.path().join("less")), &options)?;
    assert_eq!(packed.skipped.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), [path_text(&bad)]);
    let full = files(&folder.path().join("whole"))?;
    let less = files(&folder.path().join("less"))?;
    let other = full.keys().filter(|name| name.ends_with(".tar") && full[*name] != less[*name]).count();
    assert_eq!(other, 1, "only the shard of the image");
    // Every shard exists, and the image is still skipped and named.
    fs::remove_file(folder.path().join("less/dataset.json"))?;
    let mark = format!("{{\"source\":{:?}}}", packed.data_sets[0].1.source.as_deref().expect("a source"));
    fs::write(folder.path().join("less/pack.json"), mark)?;
    let second = pack(&path_text(&source), &path_text(folder.path().join("less")), &options)?;
    assert_eq!((second.existing_shards, &second.skipped), (5, &packed.skipped));
    assert!(files(&folder.path().join("less"))? == less);
    Ok(())
}

/// Writes 80 images that take long to pack.
fn write_slow_images(folder: &Path) -> Outcome {
    fs::create_dir_all(folder)?;
    for number in 0..80u32 {
        let noise = |x: u32, y: u32| ((x * 31 + y * 17 + number * 101).wrapping_mul(2_654_435_761) >> 23) as u8;
        let image = image::RgbImage::from_fn(160, 160, |x, y| image::Rgb([noise(x, y), noise(y, x), x as u8]));
        image.save(folder.join(format!("{number:03}.png")))?;
    }
    Ok(())
}

/// Kills a program once `begun` returns true; returns false where it ended before.
fn kill_when(mut command: Command, start: impl Fn() -> bool) -> Result<bool, Failed> {
    let mut child = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
    let started = Instant::now();
    while !start() && child.try_wait()?.is_none() {
        assert!(started.elapsed() < Duration::from_secs(60), "the pack does not start");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill()?;
    Ok(!child.wait()?.success())
}

fn a_killed_pack_resumes() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| path_text(folder.path().join(name));
    write_slow_images(&folder.path().join("in"))?;
    let source = at("in");
    let out = at("out");
    let full = at("whole");
    let words = |out: &str| {
        let words =
            ["pack", &source, out, "--name", "n", "--samples-per-shard", "4", "--encode", "png", "--threads", "1"];
        occlude_command(&words)
    };
    assert!(words(&full).output()?.status.success());
    let third = folder.path().join("out/n-000002.tar");
    assert!(kill_when(words(&out), || third.exists())?, "it ended before it was killed");
    assert!(!folder.path().join("out/dataset.json").exists());
    let changed = fs::metadata(&third)?.modified()?;
    let second = words(&out).output()?;
    let output = String::from_utf8_lossy(&second.stdout).into_owned();
    assert!(second.status.success() && output.contains("shards existed already"), "{output}");
    assert_eq!(fs::metadata(&third)?.modified()?, changed, "a complete shard was written again");
    assert!(
        files(&folder.path().join("out"))? == files(&folder.path().join("whole"))?,
        "the result differs from an uninterrupted pack"
    );
    Ok(())
}

fn an_incomplete_shard_is_written_again() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out");
    write_images(&folder.path().join("in"), 3, 8)?;
    pack_images(&folder.path().join("in"), &out, 5)?;
    let full = files(&out)?;
    let cut = &full["small-000001.tar"];
    fs::write(out.join("small-000001.tar"), &cut[..cut.len() - 512])?;
    fs::remove_file(out.join("small-000002.tar.idx"))?;
    let mut index = full["small-000003.tar.idx"].clone();
    index[70] ^= 1;
    fs::write(out.join("small-000003.tar.idx"), index)?;
    // With a manifest a truncated tar is detected; without it a damaged index.
    for manifest in [true, false] {
        if !manifest {
            let source = serde_json::from_slice::<Value>(&full["dataset.json"])?["source"].clone();
            fs::write(out.join("pack.json"), json!({"source": source}).to_string())?;
            fs::remove_file(out.join("dataset.json"))?;
            let mut index = full["small-000003.tar.idx"].clone();
            index[70] ^= 1;
            fs::write(out.join("small-000003.tar.idx"), index)?;
        }
        let packed = pack_images(&folder.path().join("in"), &out, 5)?;
        assert_eq!((packed.existing_shards, packed.up_to_date), (if manifest { 2 } else { 4 }, false));
        assert!(files(&out)? == full, "the result differs from an uninterrupted pack");
    }
    Ok(())
}

/// Returns the program with the environment of an S3 client.
fn s3_command(server: &Server, words: &[&str]) -> Command {
    let mut command = occlude_command(words);
    command.envs(server.s3_environment("somebody"));
    command
}

fn run_command(mut command: Command) -> Result<String, Failed> {
    let output = command.output()?;
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    if output.status.success() { Ok(text) } else { Err(text.into()) }
}

fn stores_are_read_and_written() -> Outcome {
    let (folder, rows) = folder_and_rows()?;
    let server = Server::start();
    for row in &rows {
        let path = row["path"].as_str().expect("a path");
        server.put(&format!("b/in/{path}"), fs::read(folder.path().join("in").join(path))?);
    }
    let list = write_list(&folder.path().join("in"), "csv", &rows)?;
    server.put("b/in/list.csv", fs::read(&list)?);
    // Every ninth response is a failure, as on a busy day.
    server.faults(|errors| errors.fail_every = 9);
    let options = ["--name", "small", "--samples-per-shard", "5"];
    let tars = |files: BTreeMap<String, Vec<u8>>| -> BTreeMap<String, Vec<u8>> {
        files.into_iter().filter(|(name, _)| name != "dataset.json").collect()
    };
    pack(&list, &path_text(folder.path().join("listed")), &small())?;
    pack_images(&folder.path().join("in"), &folder.path().join("plain"), 5)?;
    let web = format!("{}/list.csv", server.http("b/in"));
    for (source, out, same) in
        [(&web[..], "web", "listed"), ("s3://b/in/list.csv", "s3", "listed"), ("s3://b/in", "dir", "plain")]
    {
        run_command(s3_command(&server, &[&["pack", source, &format!("s3://b/{out}")], &options[..]].concat()))?;
        let on_disk = files(&folder.path().join(same))?;
        let in_store = objects(&server, &format!("b/{out}"))?;
        assert!(in_store.contains_key("dataset.json") && in_store.len() == on_disk.len(), "{:?}", in_store.keys());
        assert!(tars(on_disk) == tars(in_store), "{source}: the shards of a store differ from those of a disk");
        let text =
            run_command(s3_command(&server, &[&["pack", source, &format!("s3://b/{out}")], &options[..]].concat()))?;
        assert!(text.contains("5 shards existed already"), "{text}");
    }
    let set = DataSet::open(&server.http("b/web"))?;
    assert_eq!((set.len(), set.classes.len()), (24, 3));
    // Foreign files in the destination are an error.
    server.put("b/thesis/thesis.txt", b"years of work".to_vec());
    let output = s3_command(&server, &["pack", "s3://b/in", "s3://b/thesis"]).output()?;
    assert_eq!(output.status.code(), Some(ExitCode::Usage as i32));
    assert!(String::from_utf8_lossy(&output.stderr).contains("thesis.txt"));
    Ok(())
}

fn a_killed_pack_into_a_store_resumes() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = path_text(folder.path().join("in"));
    write_images(&folder.path().join("in"), 3, 8)?;
    let server = Server::start();
    let words = |out: &str| {
        s3_command(&server, &["pack", &source, &format!("s3://b/{out}"), "--name", "n", "--samples-per-shard", "2"])
    };
    run_command(words("whole"))?;
    server.faults(|errors| errors.latency = Duration::from_millis(40));
    let third = "b/out/n-000002.tar".to_owned();
    assert!(kill_when(words("out"), || server.keys().contains(&third))?, "it ended before it was killed");
    assert!(!server.keys().contains(&"b/out/dataset.json".to_owned()));
    server.faults(|errors| errors.latency = Duration::ZERO);
    let output = run_command(words("out"))?;
    assert!(output.contains("shards existed already"), "{output}");
    assert!(objects(&server, "b/out")? == objects(&server, "b/whole")?, "an uninterrupted pack gives other objects");
    Ok(())
}

fn a_web_server_is_read_only() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_images(&folder.path().join("in"), 1, 2)?;
    let server = Server::start();
    let error =
        pack(&path_text(folder.path().join("in")), &server.http("b/out"), &small()).expect_err("no way to write");
    assert_eq!(error.code, ExitCode::Usage, "{error}");
    let out = path_text(folder.path().join("out"));
    let error = pack(&server.http("b/in"), &out, &small()).expect_err("no way to list");
    assert!(error.code == ExitCode::Usage && error.message.contains("give a list"), "{error}");
    Ok(())
}
