//! Tests of shards: interchange with webdataset in both directions, and rejection of damaged files.

use crate::support::{Outcome, oracle, path_text};
use occlude::data::index::{Index, Member};
use occlude::data::pack::{PackOptions, PackReport, pack};
use occlude::data::set::DataSet;
use occlude::data::shard::{IMAGE_EXTENSIONS, Shard, ShardInfo};
use occlude::data::store::Store;
use occlude::error::{Error, ExitCode};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

crate::trials![
    webdataset_reads_packed_shards,
    shards_written_by_webdataset_are_read,
    a_damaged_tar_is_rejected_by_name,
    a_flipped_bit_is_detected_by_its_digest,
    a_mismatched_index_is_rejected,
    any_flipped_bit_of_an_index_is_detected,
    duplicate_keys_are_rejected,
    a_hostile_tar_is_rejected_at_once,
    packing_is_deterministic,
    packing_skips_unreadable_files,
    a_non_empty_output_is_rejected,
    a_missing_data_set_is_reported_with_a_remedy,
    the_test_split_has_the_requested_fraction,
    a_million_samples_open_in_little_memory,
];

/// Writes a folder of `classes` × `each` PNGs of 12 × 10 pixels, all different.
pub fn write_images(folder: &Path, classes: usize, each: usize) -> Result<(), libtest_mimic::Failed> {
    for class in 0..classes {
        let path = folder.join(format!("class.{class}"));
        fs::create_dir_all(&path)?;
        for number in 0..each {
            let value = |x: u32, y: u32, c: u32| ((x * 7 + y * 13 + c * 50) as usize + class * 31 + number * 3) as u8;
            let image = image::RgbImage::from_fn(12, 10, |x, y| image::Rgb([0, 1, 2].map(|c| value(x, y, c))));
            image.save(path.join(format!("p.{number:03}.png")))?;
        }
    }
    Ok(())
}

/// Packs the images into `out`, with `per_shard` samples per shard.
pub fn pack_images(source: &Path, out: &Path, per_shard: u64) -> Result<PackReport, libtest_mimic::Failed> {
    Ok(pack(
        &path_text(source),
        &path_text(out),
        &PackOptions { name: Some("small".into()), samples_per_shard: per_shard, ..PackOptions::default() },
    )?)
}

/// Opens one tar on the local disk.
fn open_tar(tar: &Path) -> Result<Shard, Error> {
    let folder = tar.parent().expect("a folder");
    let file = tar.file_name().expect("a name").to_string_lossy();
    Shard::open(&Store::open(&path_text(folder))?, &file)
}

fn index_of(tar: &Path) -> PathBuf {
    ShardInfo::index_name(&path_text(tar)).into()
}

/// Returns a packed set of 3 × 8 images in shards of 5: its folder and its tars.
fn small_set() -> Result<(tempfile::TempDir, PathBuf, Vec<PathBuf>), libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    write_images(&folder.path().join("in"), 3, 8)?;
    let out = folder.path().join("out");
    pack_images(&folder.path().join("in"), &out, 5)?;
    let tars = (0..5).map(|n| out.join(format!("small-{n:06}.tar"))).collect();
    Ok((folder, out, tars))
}

fn webdataset_reads_packed_shards() -> Outcome {
    let (folder, out, tars) = small_set()?;
    let names: Vec<String> = tars.iter().map(path_text).collect();
    let arguments: Vec<&str> = std::iter::once("read").chain(names.iter().map(String::as_str)).collect();
    let reference: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_str(&oracle("webdataset_shards.py", &arguments)?)?;
    let set = DataSet::open(&path_text(&out))?;
    assert_eq!((set.len(), set.shard_sizes(), &set.name[..]), (24, vec![5, 5, 5, 5, 4], "small"));
    assert_eq!(set.classes, ["class.0", "class.1", "class.2"]);
    let keys = (0..24).map(|index| set.key(index)).collect::<Result<Vec<_>, _>>()?;
    let ours: BTreeSet<&str> = keys.iter().map(String::as_str).collect();
    assert_eq!(reference.keys().map(String::as_str).collect::<BTreeSet<_>>(), ours);
    for index in 0..24 {
        let (shard, row) = set.find_sample(index)?;
        let key = shard.key(row);
        assert_eq!(reference[key].keys().collect::<Vec<_>>(), ["cls", "png"], "{key}");
        let class = shard.read_label(row)?.expect("a label");
        assert!(key.starts_with(&format!("class-{class}_p-")), "{key} has label {class}");
        let number = &key[key.len() - 3..];
        let original = fs::read(folder.path().join(format!("in/class.{class}/p.{number}.png")))?;
        assert_eq!(shard.read(row, IMAGE_EXTENSIONS)?, original, "{key}");
        assert_eq!(set.id(index)?, occlude::rng::hash_id(&["small", key]));
    }
    let brace = DataSet::open(&path_text(out.join("small-{000001..000002}.tar")))?;
    assert_eq!((brace.len(), &brace.name[..]), (10, "small"));
    Ok(())
}

fn shards_written_by_webdataset_are_read() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tar = folder.path().join("theirs.tar");
    oracle("webdataset_shards.py", &["write", &path_text(&tar), "6"])?;
    let shard = open_tar(&tar)?;
    assert_eq!(shard.sample_count(), 6);
    for row in 0..6 {
        let prefix = if row == 0 { format!("deep.folder/{}/", "long".repeat(30)) } else { "deep.folder/".into() };
        assert_eq!(shard.key(row), format!("{prefix}s{row:03}"));
        assert_eq!(shard.read_label(row)?, Some(row as i64 % 7));
        assert_eq!(shard.read(row, IMAGE_EXTENSIONS)?, vec![row as u8; row * 97]);
        assert_eq!(shard.read(row, &["seg.png"])?, b"x");
        assert_eq!(shard.read(row, &["wav"]).expect_err("no such member").code, ExitCode::Corrupt);
    }
    Ok(())
}

fn a_damaged_tar_is_rejected_by_name() -> Outcome {
    let (folder, _, tars) = small_set()?;
    let full = fs::read(&tars[0])?;
    let index = open_tar(&tars[0])?.index().clone();
    let boundary = index.members().nth(4).expect("a member").offset as usize - 512;
    let zeroed = |from: usize| {
        let mut bytes = full.clone();
        bytes[from..from + 512].fill(0);
        bytes
    };
    let flipped = |at: usize| {
        let mut bytes = full.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    for (label, bytes) in [
        ("cut at a member's boundary", full[..boundary].to_vec()),
        ("cut inside a member", full[..boundary + 600].to_vec()),
        ("cut inside a header", full[..boundary + 100].to_vec()),
        ("one block of zeros at the end", full[..full.len() - 512].to_vec()),
        ("a header zeroed", zeroed(boundary)),
        ("a header flipped", flipped(boundary + 130)),
        ("rubbish behind the end", [&full[..], &[1; 512]].concat()),
        ("nothing", Vec::new()),
    ] {
        let tar = folder.path().join("damaged.tar");
        fs::write(&tar, bytes)?;
        let error = open_tar(&tar).expect_err(label);
        assert_eq!(error.code, ExitCode::Corrupt, "{label}: {error}");
        assert!(error.message.contains("damaged.tar"), "{label}: {error}");
    }
    // The whole tar without its index is the same shard.
    let tar = folder.path().join("whole.tar");
    fs::write(&tar, &full)?;
    let scanned = open_tar(&tar)?.index().clone();
    let known: Vec<_> = index.members().map(|m| (m.name, m.offset, m.length)).collect();
    assert_eq!(scanned.members().map(|m| (m.name, m.offset, m.length)).collect::<Vec<_>>(), known);
    Ok(())
}

fn a_flipped_bit_is_detected_by_its_digest() -> Outcome {
    let (_folder, _, tars) = small_set()?;
    let mut bytes = fs::read(&tars[1])?;
    let shard = open_tar(&tars[1])?;
    let member = shard.index().members().find(|member| member.name.ends_with(".png")).expect("a picture");
    bytes[member.offset as usize + 20] ^= 1;
    fs::write(&tars[1], bytes)?;
    let error = shard.read(0, IMAGE_EXTENSIONS).expect_err("a flipped bit");
    assert_eq!(error.code, ExitCode::Corrupt);
    for part in ["small-000001.tar", shard.key(0), &occlude::data::index::to_hex(&member.digest.expect("known"))] {
        assert!(error.message.contains(part), "{part} is not named: {error}");
    }
    assert!(shard.read(1, IMAGE_EXTENSIONS).is_ok(), "its neighbor is intact");
    Ok(())
}

fn a_mismatched_index_is_rejected() -> Outcome {
    let (_folder, _, tars) = small_set()?;
    fs::copy(&tars[4], &tars[0])?;
    let error = open_tar(&tars[0]).expect_err("the index of another tar");
    assert_eq!(error.code, ExitCode::Usage);
    assert!(error.message.contains("pack again") && error.message.contains(".idx"), "{error}");
    fs::remove_file(index_of(&tars[0]))?;
    assert_eq!(open_tar(&tars[0])?.sample_count(), 4);
    Ok(())
}

fn any_flipped_bit_of_an_index_is_detected() -> Outcome {
    let (_folder, _, tars) = small_set()?;
    let bytes = fs::read(index_of(&tars[0]))?;
    let index = Index::from_bytes(bytes.clone())?;
    assert_eq!(index.as_bytes(), bytes);
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x40;
        assert!(Index::from_bytes(flipped).is_err(), "byte {at}");
        assert!(Index::from_bytes(bytes[..at].to_vec()).is_err(), "cut at {at}");
    }
    Ok(())
}

/// Writes a tar of these members.
fn tar_of(path: &Path, members: &[(&str, &[u8])]) -> Outcome {
    let mut builder = tar::Builder::new(fs::File::create(path)?);
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes)?;
    }
    builder.into_inner()?;
    Ok(())
}

fn duplicate_keys_are_rejected() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tar = folder.path().join("t.tar");
    for members in [
        &[("a.jpg", &b"1"[..]), ("a.JPG", b"2")][..],
        &[("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")],
        &[("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")],
    ] {
        tar_of(&tar, members)?;
        assert_eq!(open_tar(&tar).expect_err("a repeated key").code, ExitCode::Corrupt, "{members:?}");
    }
    tar_of(
        &tar,
        &[("__meta__", b"x"), ("dir/x.y/a.B.Jpg", b"1"), ("README", b"x"), (".hidden", b"x"), ("b.jpg", b"2")],
    )?;
    let shard = open_tar(&tar)?;
    assert_eq!((shard.sample_count(), shard.key(0), shard.key(1)), (2, "dir/x.y/a", "b"));
    assert_eq!(shard.read(0, &["b.jpg"])?, b"1");
    Ok(())
}

fn a_hostile_tar_is_rejected_at_once() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("t.tar");
    let header = |name: &[u8], size: u64, kind: u8| {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_size(size);
        header.set_mode(0o444);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let end = vec![0; 1024];
    let block = |text: &str| [text.as_bytes(), &vec![0; 512 - text.len()]].concat();
    let long = "a".repeat(300) + ".jpg";
    for (label, bytes) in [
        ("a member of 1 TiB", [header(b"a.jpg", 1 << 40, b'0'), end.clone()].concat()),
        (
            "a PAX size",
            [header(b"p", 11, b'x'), block("11 size=99\n"), header(b"a.jpg", 3, b'0'), block("abc"), end.clone()]
                .concat(),
        ),
        ("a PAX header of 1 GiB", [header(b"p", 1 << 30, b'x'), end.clone()].concat()),
        (
            "a long name",
            [header(b"l", long.len() as u64, b'L'), block(&long), header(b"a.jpg", 0, b'0'), end.clone()].concat(),
        ),
        ("a name that is not UTF-8", [header(b"\xff\xfe.jpg", 0, b'0'), end.clone()].concat()),
    ] {
        fs::write(&path, bytes)?;
        let error = open_tar(&path).expect_err(label);
        assert_eq!(error.code, ExitCode::Corrupt, "{label}: {error}");
    }
    // Names are keys and never paths; a link is not a member.
    let bytes = [header(b"../../x.jpg", 0, b'0'), header(b"link.jpg", 0, b'2'), end].concat();
    fs::write(&path, bytes)?;
    let shard = open_tar(&path)?;
    assert_eq!((shard.sample_count(), shard.key(0)), (1, "../../x"));
    Ok(())
}

fn packing_is_deterministic() -> Outcome {
    let (folder, out, tars) = small_set()?;
    let before: Vec<Vec<u8>> = tars.iter().map(fs::read).collect::<Result<_, _>>()?;
    let second = folder.path().join("again");
    pack_images(&folder.path().join("in"), &second, 5)?;
    for (tar, bytes) in tars.iter().zip(&before) {
        assert_eq!(&fs::read(second.join(tar.file_name().unwrap()))?, bytes);
    }
    assert!(pack_images(&folder.path().join("in"), &out, 5)?.up_to_date, "the same command again has nothing to do");
    // An unfinished pack is written again: no manifest, one shard half written, one too many.
    fs::remove_file(out.join("dataset.json"))?;
    fs::rename(&tars[3], out.join("small-000003.tar.partial"))?;
    fs::write(out.join("small-000009.tar"), b"of an earlier try")?;
    assert!(!pack_images(&folder.path().join("in"), &out, 5)?.up_to_date);
    let found: BTreeSet<_> = fs::read_dir(&out)?.map(|entry| entry.expect("an entry").file_name()).collect();
    assert_eq!(found.len(), 11, "5 tars, 5 indices, one manifest: {found:?}");
    for (tar, bytes) in tars.iter().zip(&before) {
        assert_eq!(&fs::read(tar)?, bytes);
    }
    // Neighboring samples are of many classes.
    let set = DataSet::open(&path_text(&out))?;
    let classes: BTreeSet<_> =
        (0..5).map(|row| set.shard(0).expect("a shard").read_label(row).expect("a label")).collect();
    assert!(classes.len() > 1, "a shard of one class");
    Ok(())
}

fn packing_skips_unreadable_files() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    write_images(&source, 2, 60)?;
    let bad = source.join("class.1/p.007.png");
    fs::write(&bad, &fs::read(&bad)?[..50])?;
    let packed_set = pack_images(&source, &folder.path().join("out"), 1000)?;
    assert_eq!(packed_set.data_sets[0].1.samples, 119);
    assert_eq!(packed_set.skipped.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), [path_text(&bad)]);
    fs::write(source.join("class.0/p.001.png"), b"no picture")?;
    let options = PackOptions { name: Some("small".into()), ..PackOptions::default() };
    let error = pack(&path_text(&source), &path_text(folder.path().join("more")), &options)
        .expect_err("2 of 120 is more than 1 %");
    assert_eq!(error.code, ExitCode::Corrupt);
    assert!(error.message.contains("p.001.png") && error.message.contains("p.007.png"), "{error}");
    assert!(
        DataSet::open(&path_text(folder.path().join("more"))).is_ok_and(|set| set.len() == 118)
            || !folder.path().join("more/dataset.json").exists()
    );
    Ok(())
}

fn a_non_empty_output_is_rejected() -> Outcome {
    let (folder, out, _) = small_set()?;
    fs::write(folder.path().join("in/class.0/p.900.png"), fs::read(folder.path().join("in/class.0/p.000.png"))?)?;
    let options = PackOptions { name: Some("small".into()), samples_per_shard: 5, ..PackOptions::default() };
    let error = pack(&path_text(folder.path().join("in")), &path_text(&out), &options)
        .expect_err("the output has another data set");
    assert_eq!(error.code, ExitCode::Usage, "{error}");
    let homes = folder.path().join("home");
    fs::create_dir(&homes)?;
    fs::write(homes.join("thesis.txt"), b"years of work")?;
    let error = pack(&path_text(folder.path().join("in")), &path_text(&homes), &options)
        .expect_err("a folder with other files");
    assert!(error.message.contains("thesis.txt"), "{error}");
    assert!(homes.join("thesis.txt").exists());
    Ok(())
}

fn a_missing_data_set_is_reported_with_a_remedy() -> Outcome {
    let folder = tempfile::tempdir()?;
    let empty = folder.path().join("empty");
    fs::create_dir(&empty)?;
    tar_of(&folder.path().join("none.tar"), &[("__meta__", b"x")])?;
    for url in [
        path_text(&empty),
        path_text(folder.path().join("nowhere")),
        path_text(folder.path().join("none.tar")),
        path_text(empty.join("a-{3..1}.tar")),
    ] {
        let error = DataSet::open(&url).expect_err(&url);
        assert_eq!(error.code, ExitCode::Usage, "{error}");
    }
    let (_folder, out, tars) = small_set()?;
    fs::remove_file(&tars[2])?;
    let error = DataSet::open(&path_text(&out)).expect_err("a shard is missing");
    assert!(error.message.contains("19 samples in 4 shards") && error.message.contains("24 in 5"), "{error}");
    Ok(())
}

fn the_test_split_has_the_requested_fraction() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_images(&folder.path().join("in"), 2, 100)?;
    let out = folder.path().join("out");
    let options = PackOptions { name: Some("digits".into()), test_fraction: 0.2, ..PackOptions::default() };
    pack(&path_text(folder.path().join("in")), &path_text(&out), &options)?;
    let train = DataSet::open(&path_text(out.join("train")))?;
    let test = DataSet::open(&path_text(out.join("test")))?;
    assert_eq!((&train.name[..], &test.name[..]), ("digits-train", "digits-test"));
    assert_eq!(train.len() + test.len(), 200);
    // 200 samples at 0.2 have a standard deviation of 5.7.
    assert!((18..=62).contains(&test.len()), "{} of 200", test.len());
    assert_eq!(train.classes, test.classes);
    let keys = |set: &DataSet| (0..set.len()).map(|index| set.key(index)).collect::<Result<BTreeSet<_>, _>>();
    assert!(keys(&train)?.is_disjoint(&keys(&test)?));
    assert_ne!(train.digest(), test.digest());
    Ok(())
}

/// Returns the resident memory of this process in KiB.
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("a line");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

/// Runs in its own process, so that only its memory counts: opens 100 shards of 10,000 samples and reads one sample of
/// each shard.
pub fn open_million_samples() -> i32 {
    let folder = tempfile::tempdir().expect("a folder");
    for number in 0..100 {
        let members = |sample: u64| {
            [("cls", 0), ("jpg", 1024)].map(|(extension, after)| Member {
                name: format!("n{number:08}_{sample:06}.{extension}"),
                offset: sample * 120_000 + 512 + after,
                length: 100,
                digest: Some([7; 16]),
            })
        };
        let index = Index::new(1_200_000_000, &(0..10_000).flat_map(members).collect::<Vec<_>>()).expect("an index");
        let tar = folder.path().join(format!("set-{number:06}.tar"));
        fs::File::create(&tar).expect("a tar").set_len(1_200_000_000).expect("a hole");
        fs::write(index_of(&tar), index.as_bytes()).expect("an index");
    }
    let before = resident_kib();
    let start = std::time::Instant::now();
    let set = DataSet::open(&path_text(folder.path())).expect("a set");
    let opened = start.elapsed();
    assert_eq!(set.len(), 1_000_000);
    let first = resident_kib() - before;
    set.set_max_open_shards(40);
    for shard in 0..100 {
        assert_eq!(set.key(shard * 10_000 + 17).expect("a key"), format!("n{shard:08}_000017"));
    }
    let all = resident_kib() - before;
    println!("opened in {} ms, {first} kB; {all} kB with 40 shards open", opened.as_millis());
    i32::from(first > 20_000 || all > 100_000)
}

fn a_million_samples_open_in_little_memory() -> Outcome {
    let output = std::process::Command::new(std::env::current_exe()?).env("OCCLUDE_CASE", "million").output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    println!("{text}");
    assert!(output.status.success(), "{text}");
    Ok(())
}
