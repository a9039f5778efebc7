//! Packing: from folders and lists, on disks and in stores, on any number of threads, killed and started again.

use crate::job::occlude;
use crate::server::Server;
use crate::shard::{packed, pictures, text};
use crate::support::{Outcome, oracle};
use libtest_mimic::Failed;
use occlude::data::pack::{Encode, Options, pack};
use occlude::data::set::DataSet;
use occlude::data::shard::IMAGE;
use occlude::data::store::Store;
use occlude::fault::Code;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

crate::trials![
    lists_of_every_kind_make_the_same_tars,
    what_else_a_line_says_is_kept,
    labels_may_be_numbers,
    a_picture_is_known_by_its_bytes,
    a_list_that_cannot_be_is_refused,
    webdataset_reads_captions,
    any_number_of_threads_makes_the_same_bytes,
    a_resize_is_pillow_s,
    what_is_small_enough_stays_as_it_is,
    an_unreadable_picture_moves_no_other,
    a_killed_pack_goes_on,
    a_shard_that_is_not_whole_is_made_again,
    stores_are_read_and_written,
    a_killed_pack_into_a_store_goes_on,
    a_web_server_is_only_read,
];

/// Every file of a folder.
fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, Failed> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        found.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
    }
    Ok(found)
}

/// What a server holds below `bucket`.
fn objects(server: &Server, bucket: &str) -> Result<BTreeMap<String, Vec<u8>>, Failed> {
    let store = Store::open(&server.http(bucket))?;
    let below = format!("{bucket}/");
    let names: Vec<String> =
        server.keys().iter().filter_map(|key| key.strip_prefix(&below).map(str::to_owned)).collect();
    Ok(names.into_iter().map(|name| Ok((name.clone(), store.get(&name)?))).collect::<occlude::fault::Result<_>>()?)
}

fn small() -> Options {
    Options { name: Some("small".into()), samples_per_shard: 5, ..Options::default() }
}

/// `in/` of 3 × 8 pictures, and rows that name them: label by name, caption.
fn listed() -> Result<(tempfile::TempDir, Vec<Value>), Failed> {
    let folder = tempfile::tempdir()?;
    pictures(&folder.path().join("in"), 3, 8)?;
    let row = |class: usize, number: usize| {
        let caption = format!("picture {number}, of \"class\" {class} … naïve");
        json!({"path": format!("class.{class}/p.{number:03}.png"), "label": format!("class.{class}"), "caption": caption})
    };
    let rows = (0..3).flat_map(|class| (0..8).map(move |number| row(class, number)));
    Ok((folder, rows.collect()))
}

/// A list's file of these rows.
fn list(folder: &Path, kind: &str, rows: &[Value]) -> Result<String, Failed> {
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
            oracle("pack.py", &["parquet", &text(&plain), &text(&path)])?;
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
    Ok(text(&path))
}

fn lists_of_every_kind_make_the_same_tars() -> Outcome {
    let (folder, rows) = listed()?;
    let at = |name: &str| folder.path().join(name);
    let mut first: Option<BTreeMap<String, Vec<u8>>> = None;
    for kind in ["csv", "tsv", "jsonl", "parquet"] {
        let list = list(&at("in"), kind, &rows)?;
        let done = pack(&list, &text(&at(kind)), &small())?;
        assert_eq!((done.sets[0].1.samples, done.bad.len()), (24, 0), "{kind}");
        let found = files(&at(kind))?;
        assert_eq!(found.len(), 11, "5 tars, 5 indices, 1 manifest");
        assert!(first.get_or_insert(found.clone()) == &found, "a list as {kind} makes other bytes");
    }
    let set = DataSet::open(&text(&at("csv")))?;
    assert_eq!(set.classes, ["class.0", "class.1", "class.2"]);
    for index in 0..24 {
        let (shard, row) = set.sample(index)?;
        let class: usize = shard.key(row)["class-".len()..][..1].parse()?;
        let number: usize = shard.key(row)[shard.key(row).len() - 3..].parse()?;
        assert_eq!(shard.label(row)?, Some(class as i64));
        let caption = format!("picture {number}, of \"class\" {class} … naïve");
        assert_eq!(String::from_utf8(shard.read(row, &["txt"])?)?, caption);
        let original = fs::read(at("in").join(format!("class.{class}/p.{number:03}.png")))?;
        assert_eq!(shard.read(row, IMAGE)?, original);
    }
    // Without captions a list says what its folders say.
    let bare: Vec<Value> = rows.iter().map(|row| json!({"path": row["path"], "label": row["label"]})).collect();
    let list = list(&at("in"), "csv", &bare)?;
    pack(&list, &text(&at("bare")), &small())?;
    packed(&at("in"), &at("folder"), 5)?;
    assert!(files(&at("bare"))? == files(&at("folder"))?, "a list is not its folder");
    Ok(())
}

fn what_else_a_line_says_is_kept() -> Outcome {
    let (folder, mut rows) = listed()?;
    for (at, row) in rows.iter_mut().enumerate() {
        row["source"] = json!({"page": at, "tags": ["a", null]});
        row["caption"] = Value::Null;
    }
    let list = list(&folder.path().join("in"), "jsonl", &rows)?;
    let out = text(&folder.path().join("out"));
    pack(&list, &out, &small())?;
    let set = DataSet::open(&out)?;
    for index in 0..24 {
        let (shard, row) = set.sample(index)?;
        assert!(!shard.has(row, "txt"), "null is no caption");
        let more: Value = serde_json::from_slice(&shard.read(row, &["json"])?)?;
        let (class, number) = (shard.label(row)?.expect("a label"), &shard.key(row)[shard.key(row).len() - 3..]);
        let page = class as usize * 8 + number.parse::<usize>()?;
        assert_eq!(more, json!({"source": {"page": page, "tags": ["a", null]}}));
    }
    Ok(())
}

fn labels_may_be_numbers() -> Outcome {
    let (folder, rows) = listed()?;
    let numbered: Vec<Value> =
        rows.iter().enumerate().map(|(at, row)| json!({"path": row["path"], "label": at + 100})).collect();
    for kind in ["csv", "jsonl", "parquet"] {
        let out = text(&folder.path().join(kind));
        pack(&list(&folder.path().join("in"), kind, &numbered)?, &out, &small())?;
        let set = DataSet::open(&out)?;
        assert!(set.classes.is_empty());
        let labels = (0..24).map(|index| set.sample(index).and_then(|(shard, row)| shard.label(row)));
        let mut labels: Vec<_> = labels.collect::<Result<_, _>>()?;
        labels.sort();
        assert_eq!(labels, (100..124).map(Some).collect::<Vec<_>>(), "{kind}");
    }
    Ok(())
}

fn a_picture_is_known_by_its_bytes() -> Outcome {
    let (folder, _) = listed()?;
    let (source, out) = (folder.path().join("in"), text(&folder.path().join("out")));
    fs::rename(source.join("class.0/p.000.png"), source.join("class.0/0123"))?;
    fs::write(source.join("list.csv"), "path\n./class.0/0123\n")?;
    pack(&text(&source.join("list.csv")), &out, &small())?;
    let (shard, row) = DataSet::open(&out)?.sample(0)?;
    assert_eq!(shard.wanted(row, IMAGE)?.name, "class-0_0123.png");
    Ok(())
}

fn a_list_that_cannot_be_is_refused() -> Outcome {
    let (folder, _) = listed()?;
    let out = text(&folder.path().join("out"));
    let there = "class.0/p.000.png";
    for (kind, list, word) in [
        ("csv", "file,label\na.png,1\n".to_owned(), "no column `path`"),
        ("csv", format!("path,label\n{there},1\n{there},1\n"), "both name"),
        ("csv", format!("path,label\n{there},1\nclass.0/p.001.png,\n"), "row 2 has no label"),
        ("csv", format!("path,label\n{there},-1\n"), "labels begin at 0"),
        ("csv", "path,label\n,1\n".to_owned(), "row 1 has no path"),
        ("csv", "path\n".to_owned(), "no rows"),
        ("jsonl", format!("{{\"path\": \"{there}\"}}\n[1]\n"), "line 2"),
        ("jsonl", format!("{{\"path\": \"{there}\", \"label\": 0.5}}\n"), "label is 0.5"),
        ("parquet", "not Parquet".to_owned(), "Parquet"),
    ] {
        let path = folder.path().join(format!("in/list.{kind}"));
        fs::write(&path, &list)?;
        let fault = pack(&text(&path), &out, &small()).expect_err(&list);
        assert_eq!(fault.code, Code::Usage, "{fault}");
        assert!(fault.message.contains(word) && fault.message.contains(&text(&path)), "{fault}");
    }
    let path = folder.path().join("in/list.csv");
    fs::write(&path, format!("path\n{there}\nnowhere.png\n"))?;
    let fault = pack(&text(&path), &out, &small()).expect_err("one of two is not there");
    assert_eq!(fault.code, Code::Corrupt);
    assert!(fault.message.contains("nowhere.png: there is no such file"), "{fault}");
    for (quality, encode, resize) in
        [(0, None, Some(5)), (101, Some(Encode::Jpeg), None), (50, Some(Encode::Png), None)]
    {
        let options = Options { quality: Some(quality), encode, resize, ..small() };
        let fault = pack(&text(&folder.path().join("in")), &out, &options).expect_err("a quality");
        assert_eq!(fault.code, Code::Usage, "{fault}");
    }
    Ok(())
}

fn webdataset_reads_captions() -> Outcome {
    let (folder, rows) = listed()?;
    let out = folder.path().join("out");
    pack(&list(&folder.path().join("in"), "csv", &rows)?, &text(&out), &small())?;
    let tars: Vec<String> = (0..5).map(|n| text(&out.join(format!("small-{n:06}.tar")))).collect();
    let arguments: Vec<&str> = std::iter::once("read").chain(tars.iter().map(String::as_str)).collect();
    let theirs: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_str(&oracle("webdataset_read.py", &arguments)?)?;
    assert_eq!(theirs.len(), 24);
    for (key, members) in theirs {
        assert_eq!(members.keys().collect::<Vec<_>>(), ["cls", "png", "txt"], "{key}");
    }
    Ok(())
}

fn any_number_of_threads_makes_the_same_bytes() -> Outcome {
    let folder = tempfile::tempdir()?;
    pictures(&folder.path().join("in"), 3, 8)?;
    let mut first: Option<BTreeMap<String, Vec<u8>>> = None;
    for threads in [1, 2, 7, 40] {
        let out = folder.path().join(format!("out-{threads}"));
        let options = Options { threads, resize: Some(7), encode: Some(Encode::Jpeg), ..small() };
        pack(&text(&folder.path().join("in")), &text(&out), &options)?;
        let found = files(&out)?;
        assert!(first.get_or_insert(found.clone()) == &found, "{threads} threads make other bytes");
    }
    let set = DataSet::open(&text(&folder.path().join("out-2")))?;
    let (shard, row) = set.sample(0)?;
    let picture = image::load_from_memory(&shard.read(row, &["jpg"])?)?;
    assert_eq!((picture.width(), picture.height()), (8, 7), "12 x 10 with the shorter side at 7");
    Ok(())
}

/// Two lists of sizes, and a mean and greatest difference where there is one.
type Told = (Vec<u32>, Vec<u32>, Option<[f64; 2]>);

fn a_resize_is_pillow_s() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = text(&folder.path().join("in"));
    oracle("pack.py", &["pictures", &source])?;
    // The resizes round in their own ways, one value in six by one; JPEG at 90 costs some values more.
    for (encode, extension, near) in
        [(Encode::Png, "png", [0.25, 1.0]), (Encode::Webp, "webp", [0.25, 1.0]), (Encode::Jpeg, "jpg", [3.0, 60.0])]
    {
        let out = folder.path().join(extension);
        let options = Options { name: Some("r".into()), resize: Some(40), encode: Some(encode), ..Options::default() };
        pack(&source, &text(&out), &options)?;
        let told = oracle("pack.py", &["compare", &source, "40", &text(&out.join("r-000000.tar"))])?;
        let told: BTreeMap<String, Told> = serde_json::from_str(&told)?;
        assert_eq!(told.len(), 8);
        assert_eq!(told["turned"].0, [40, 58], "EXIF's orientation is applied");
        assert_eq!(told["small"].0, [30, 20], "nothing is enlarged");
        for (key, (ours, theirs, far)) in told {
            assert_eq!(ours, theirs, "{key}");
            let far = far.expect("pictures of one size");
            assert!(far[0] <= near[0] && far[1] <= near[1], "{key} as {extension} is {far:?} off Pillow's");
        }
        let set = DataSet::open(&text(&out))?;
        for index in 0..8 {
            let (shard, row) = set.sample(index)?;
            let picture = image::load_from_memory(&shard.read(row, &[extension])?)?;
            let grey = shard.key(row) == "grey" && encode != Encode::Webp;
            assert_eq!(picture.color().channel_count(), if grey { 1 } else { 3 }, "{}", shard.key(row));
        }
    }
    Ok(())
}

fn what_is_small_enough_stays_as_it_is() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    oracle("pack.py", &["pictures", &text(&source)])?;
    let out = text(&folder.path().join("out"));
    pack(&text(&source), &out, &Options { resize: Some(85), ..Options::default() })?;
    let set = DataSet::open(&out)?;
    let mut untouched = 0;
    for index in 0..8 {
        let (shard, row) = set.sample(index)?;
        let member = shard.wanted(row, IMAGE)?;
        let (key, extension) = member.split();
        let same = shard.read(row, IMAGE)? == fs::read(source.join(format!("{key}.{extension}")))?;
        assert_eq!(same, ["tall", "small"].contains(&key), "{key}: sides above 85 shrink, others stay");
        untouched += usize::from(same);
    }
    assert_eq!(untouched, 2);
    Ok(())
}

fn an_unreadable_picture_moves_no_other() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    pictures(&source, 3, 8)?;
    let options = Options { max_bad_share: 0.1, ..small() };
    pack(&text(&source), &text(&folder.path().join("whole")), &options)?;
    let bad = source.join("class.1/p.003.png");
    let length = fs::metadata(&bad)?.len() as usize;
    fs::write(&bad, vec![0; length])?;
    let done = pack(&text(&source), &text(&folder.path().join("less")), &options)?;
    assert_eq!(done.bad.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), [text(&bad)]);
    let (whole, less) = (files(&folder.path().join("whole"))?, files(&folder.path().join("less"))?);
    let other = whole.keys().filter(|name| name.ends_with(".tar") && whole[*name] != less[*name]).count();
    assert_eq!(other, 1, "the shard that the picture would be in, and no other");
    // Every shard stands, and the picture is still left out and named.
    fs::remove_file(folder.path().join("less/dataset.json"))?;
    let mark = format!("{{\"source\":{:?}}}", done.sets[0].1.source.as_deref().expect("a source"));
    fs::write(folder.path().join("less/pack.json"), mark)?;
    let again = pack(&text(&source), &text(&folder.path().join("less")), &options)?;
    assert_eq!((again.kept, &again.bad), (5, &done.bad));
    assert!(files(&folder.path().join("less"))? == less);
    Ok(())
}

/// 80 pictures that take their time.
fn slow(folder: &Path) -> Outcome {
    fs::create_dir_all(folder)?;
    for number in 0..80u32 {
        let noise = |x: u32, y: u32| ((x * 31 + y * 17 + number * 101).wrapping_mul(2_654_435_761) >> 23) as u8;
        let picture = image::RgbImage::from_fn(160, 160, |x, y| image::Rgb([noise(x, y), noise(y, x), x as u8]));
        picture.save(folder.join(format!("{number:03}.png")))?;
    }
    Ok(())
}

/// Kills a program once `begun` says so; false where it ended before.
fn killed(mut command: Command, begun: impl Fn() -> bool) -> Result<bool, Failed> {
    let mut child = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
    let began = Instant::now();
    while !begun() && child.try_wait()?.is_none() {
        assert!(began.elapsed() < Duration::from_secs(60), "the pack does not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill()?;
    Ok(!child.wait()?.success())
}

fn a_killed_pack_goes_on() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| text(&folder.path().join(name));
    slow(&folder.path().join("in"))?;
    let (source, out, whole) = (at("in"), at("out"), at("whole"));
    let words = |out: &str| {
        let words =
            ["pack", &source, out, "--name", "n", "--samples-per-shard", "4", "--encode", "png", "--threads", "1"];
        occlude(&words)
    };
    assert!(words(&whole).output()?.status.success());
    let third = folder.path().join("out/n-000002.tar");
    assert!(killed(words(&out), || third.exists())?, "it ended before it was killed");
    assert!(!folder.path().join("out/dataset.json").exists());
    let changed = fs::metadata(&third)?.modified()?;
    let again = words(&out).output()?;
    let told = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(again.status.success() && told.contains("shards stood there already"), "{told}");
    assert_eq!(fs::metadata(&third)?.modified()?, changed, "a whole shard was made again");
    assert!(files(&folder.path().join("out"))? == files(&folder.path().join("whole"))?, "not what one go makes");
    Ok(())
}

fn a_shard_that_is_not_whole_is_made_again() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out");
    pictures(&folder.path().join("in"), 3, 8)?;
    packed(&folder.path().join("in"), &out, 5)?;
    let whole = files(&out)?;
    let cut = &whole["small-000001.tar"];
    fs::write(out.join("small-000001.tar"), &cut[..cut.len() - 512])?;
    fs::remove_file(out.join("small-000002.tar.idx"))?;
    let mut index = whole["small-000003.tar.idx"].clone();
    index[70] ^= 1;
    fs::write(out.join("small-000003.tar.idx"), index)?;
    // With the manifest there a cut tar is seen; a damaged index without it.
    for manifest in [true, false] {
        if !manifest {
            let source = serde_json::from_slice::<Value>(&whole["dataset.json"])?["source"].clone();
            fs::write(out.join("pack.json"), json!({"source": source}).to_string())?;
            fs::remove_file(out.join("dataset.json"))?;
            let mut index = whole["small-000003.tar.idx"].clone();
            index[70] ^= 1;
            fs::write(out.join("small-000003.tar.idx"), index)?;
        }
        let done = packed(&folder.path().join("in"), &out, 5)?;
        assert_eq!((done.kept, done.untouched), (if manifest { 2 } else { 4 }, false));
        assert!(files(&out)? == whole, "not what one go makes");
    }
    Ok(())
}

/// The program with what an S3 client is told.
fn through(server: &Server, words: &[&str]) -> Command {
    let mut command = occlude(words);
    command.envs(server.s3_environment("somebody"));
    command
}

fn done(mut command: Command) -> Result<String, Failed> {
    let output = command.output()?;
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    if output.status.success() { Ok(text) } else { Err(text.into()) }
}

fn stores_are_read_and_written() -> Outcome {
    let (folder, rows) = listed()?;
    let server = Server::start();
    for row in &rows {
        let path = row["path"].as_str().expect("a path");
        server.put(&format!("b/in/{path}"), fs::read(folder.path().join("in").join(path))?);
    }
    let list = list(&folder.path().join("in"), "csv", &rows)?;
    server.put("b/in/list.csv", fs::read(&list)?);
    // Every ninth answer is a failure, as on a busy day.
    server.faults(|faults| faults.fail_every = 9);
    let options = ["--name", "small", "--samples-per-shard", "5"];
    let tars = |files: BTreeMap<String, Vec<u8>>| -> BTreeMap<String, Vec<u8>> {
        files.into_iter().filter(|(name, _)| name != "dataset.json").collect()
    };
    pack(&list, &text(&folder.path().join("listed")), &small())?;
    packed(&folder.path().join("in"), &folder.path().join("plain"), 5)?;
    let web = format!("{}/list.csv", server.http("b/in"));
    for (source, out, same) in
        [(&web[..], "web", "listed"), ("s3://b/in/list.csv", "s3", "listed"), ("s3://b/in", "dir", "plain")]
    {
        done(through(&server, &[&["pack", source, &format!("s3://b/{out}")], &options[..]].concat()))?;
        let (here, there) = (files(&folder.path().join(same))?, objects(&server, &format!("b/{out}"))?);
        assert!(there.contains_key("dataset.json") && there.len() == here.len(), "{:?}", there.keys());
        assert!(tars(here) == tars(there), "{source}: a store's shards are others than a disk's");
        let told = done(through(&server, &[&["pack", source, &format!("s3://b/{out}")], &options[..]].concat()))?;
        assert!(told.contains("5 shards stood there already"), "{told}");
    }
    let set = DataSet::open(&server.http("b/web"))?;
    assert_eq!((set.len(), set.classes.len()), (24, 3));
    // Nothing but a pack's own files may stand there.
    server.put("b/thesis/thesis.txt", b"years of work".to_vec());
    let output = through(&server, &["pack", "s3://b/in", "s3://b/thesis"]).output()?;
    assert_eq!(output.status.code(), Some(Code::Usage as i32));
    assert!(String::from_utf8_lossy(&output.stderr).contains("thesis.txt"));
    Ok(())
}

fn a_killed_pack_into_a_store_goes_on() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = text(&folder.path().join("in"));
    pictures(&folder.path().join("in"), 3, 8)?;
    let server = Server::start();
    let words = |out: &str| {
        through(&server, &["pack", &source, &format!("s3://b/{out}"), "--name", "n", "--samples-per-shard", "2"])
    };
    done(words("whole"))?;
    server.faults(|faults| faults.latency = Duration::from_millis(40));
    let third = "b/out/n-000002.tar".to_owned();
    assert!(killed(words("out"), || server.keys().contains(&third))?, "it ended before it was killed");
    assert!(!server.keys().contains(&"b/out/dataset.json".to_owned()));
    server.faults(|faults| faults.latency = Duration::ZERO);
    let told = done(words("out"))?;
    assert!(told.contains("shards stood there already"), "{told}");
    assert!(objects(&server, "b/out")? == objects(&server, "b/whole")?, "not what one go makes");
    Ok(())
}

fn a_web_server_is_only_read() -> Outcome {
    let folder = tempfile::tempdir()?;
    pictures(&folder.path().join("in"), 1, 2)?;
    let server = Server::start();
    let fault = pack(&text(&folder.path().join("in")), &server.http("b/out"), &small()).expect_err("no way to write");
    assert_eq!(fault.code, Code::Usage, "{fault}");
    let out = text(&folder.path().join("out"));
    let fault = pack(&server.http("b/in"), &out, &small()).expect_err("no way to list");
    assert!(fault.code == Code::Usage && fault.message.contains("give a list"), "{fault}");
    Ok(())
}
