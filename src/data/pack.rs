//! The writer: a folder of pictures becomes shards with their indices, and `dataset.json` last.
//!
//! The same pictures give the same bytes, on every machine: members are USTAR, mode 0444, time 0, in the order of a
//! digest of their keys, which mixes the classes over the shards. Files are written under temporary names and
//! renamed; without `dataset.json` a folder is an unfinished pack, which is begun again.

use super::decode::{Limits, probe};
use super::index;
use super::set::{Listed, Manifest};
use super::shard::IMAGE;
use super::store::Store;
use super::write::{Writer, commit};
use crate::fault::{Code, Fault, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How to pack.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data set's name, in shard names and sample ids; the output folder's name where none is given.
    pub name: Option<String>,
    /// A shard is closed at this many samples …
    pub samples_per_shard: u64,
    /// … or before it passes this many bytes.
    pub shard_bytes: u64,
    /// Share of samples that go to `test/`, the rest to `train/`; 0 makes one data set, not split.
    pub test_share: f64,
    /// Share of unreadable pictures past which packing fails.
    pub max_bad_share: f64,
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            name: None,
            samples_per_shard: 10_000,
            shard_bytes: 1 << 30,
            test_share: 0.0,
            max_bad_share: 0.01,
            limits: Limits::default(),
        }
    }
}

/// What was packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The folders that `train` can be pointed at, with their manifests.
    pub sets: Vec<(PathBuf, Manifest)>,
    /// Pictures that were left out, and why.
    pub bad: Vec<(PathBuf, String)>,
    /// The output was already there, from the same pictures.
    pub untouched: bool,
}

/// One picture to pack.
struct Picture {
    path: PathBuf,
    key: String,
    extension: String,
    label: Option<usize>,
}

/// Packs the pictures under `source` into `out`. Sub-folders of `source` are classes, numbered in the order of their
/// names; a folder without sub-folders has no classes. Faults: Code::Usage for a source without pictures or an
/// output that holds something else, Code::Corrupt where too many pictures are unreadable, Code::Disk.
pub fn pack(source: &Path, out: &Path, options: &Options) -> Result<Packed> {
    check(options)?;
    let (mut pictures, classes) = pictures(source)?;
    let name = options.name.clone().unwrap_or_else(|| {
        out.file_name().map_or("data".into(), |name| name.to_string_lossy().replace(['{', '}', '.'], "-"))
    });
    let made_from = fingerprint(&pictures, options)?;
    let split = options.test_share > 0.0;
    let folders: Vec<(PathBuf, String)> = match split {
        true => ["train", "test"].iter().map(|part| (out.join(part), format!("{name}-{part}"))).collect(),
        false => vec![(out.to_owned(), name)],
    };
    if let Some(sets) = standing(&folders, &made_from)? {
        return Ok(Packed { sets, bad: Vec::new(), untouched: true });
    }
    let total = pictures.len();
    pictures.sort_by_cached_key(|picture| index::digest(picture.key.as_bytes()));
    let is_test = |key: &str| (crate::rng::id(&["test", key]) as f64 / u64::MAX as f64) < options.test_share;
    let (test, train): (Vec<_>, Vec<_>) = pictures.into_iter().partition(|picture| split && is_test(&picture.key));

    let bar = progress(total as u64);
    let mut bad = Vec::new();
    let mut manifests = Vec::new();
    for ((folder, name), part) in folders.iter().zip([train, test]) {
        let shards = write_shards(folder, name, &part, options, &bar, &mut bad)?;
        refuse_many(&bad, total, options)?;
        let samples = shards.iter().map(|shard| shard.samples).sum();
        if samples == 0 {
            let message = format!(
                "{}: no picture would go there; pack more pictures or change the share of the test part",
                folder.display()
            );
            return Err(Fault::usage(message));
        }
        let source = Some(made_from.clone());
        manifests.push(Manifest { name: name.clone(), samples, classes: classes.clone(), shards, source });
    }
    bar.finish_and_clear();
    for ((folder, _), manifest) in folders.iter().zip(&manifests) {
        let text = serde_json::to_string_pretty(manifest).expect("a manifest is JSON") + "\n";
        commit(&folder.join(Manifest::FILE), text.as_bytes())?;
    }
    let sets = folders.into_iter().map(|(folder, _)| folder).zip(manifests).collect();
    Ok(Packed { sets, bad, untouched: false })
}

fn check(options: &Options) -> Result<()> {
    if options.samples_per_shard == 0 || options.shard_bytes == 0 {
        return Err(Fault::usage("a shard needs room for a sample: samples_per_shard and shard_bytes are 1 or more"));
    }
    if !(0.0..1.0).contains(&options.test_share) {
        return Err(Fault::usage(format!("the test share is {}; it is 0 or more and less than 1", options.test_share)));
    }
    let safe = |name: &String| !name.is_empty() && !name.contains(['/', '{', '}', '\0']);
    match &options.name {
        Some(name) if !safe(name) => Err(Fault::usage(format!("{name:?} cannot name a data set: no slash, no brace"))),
        _ => Ok(()),
    }
}

/// All pictures under `source` with their keys and classes, by path; hidden files and folders are passed over.
fn pictures(source: &Path) -> Result<(Vec<Picture>, Vec<String>)> {
    if !source.is_dir() {
        let message = format!(
            "{} is not a folder; give a folder of pictures, with a sub-folder a class or without",
            source.display()
        );
        return Err(Fault::usage(message));
    }
    let mut paths = Vec::new();
    walk(source, &mut paths)?;
    paths.sort();
    let parts = |path: &Path| -> Vec<String> {
        let inside = path.strip_prefix(source).expect("a path under the source");
        inside.iter().map(|part| part.to_string_lossy().into_owned()).collect()
    };
    let mut classes: Vec<String> =
        paths.iter().map(|path| parts(path)).filter(|p| p.len() > 1).map(|p| p[0].clone()).collect();
    let loose = paths.len() - classes.len();
    classes.dedup();
    if paths.is_empty() {
        return Err(Fault::usage(format!("{} holds no picture (.{})", source.display(), IMAGE.join(", ."))));
    }
    if loose > 0 && !classes.is_empty() {
        return Err(Fault::usage(format!(
            "{} holds {loose} pictures beside its class folders ({}, …): move them into a folder, or pack that folder alone",
            source.display(),
            classes[0]
        )));
    }
    classes.sort();
    classes.dedup();
    let keys = keys(&paths.iter().map(|path| parts(path).join("/")).collect::<Vec<_>>());
    let pictures = paths.into_iter().zip(keys).map(|(path, key)| {
        let first = parts(&path).swap_remove(0);
        Picture {
            extension: extension(&path).expect("a picture"),
            label: classes.binary_search(&first).ok(),
            key,
            path,
        }
    });
    Ok((pictures.collect(), classes.clone()))
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    let disk = |error| Fault::disk(folder.display(), error);
    for entry in fs::read_dir(folder).map_err(disk)? {
        let path = entry.map_err(disk)?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            walk(&path, paths)?;
        } else if extension(&path).is_some() {
            paths.push(path);
        }
    }
    Ok(())
}

fn extension(path: &Path) -> Option<String> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    IMAGE.contains(&extension.as_str()).then_some(extension)
}

/// Keys out of relative paths: without the extension, dots and slashes made safe, short enough for a USTAR name.
/// Where two paths would share a key, or one had to be cut, a digest of the path tells them apart.
fn keys(relative: &[String]) -> Vec<String> {
    let plain: Vec<String> = relative
        .iter()
        .map(|path| {
            let stem = path.rsplit_once('.').map_or(path.as_str(), |(stem, _)| stem);
            stem.chars()
                .map(|c| {
                    if c == '/' {
                        '_'
                    } else if c == '.' || c.is_control() {
                        '-'
                    } else {
                        c
                    }
                })
                .collect()
        })
        .collect();
    let mut uses: HashMap<&str, usize> = HashMap::new();
    for key in &plain {
        *uses.entry(key).or_default() += 1;
    }
    let told = |(key, path): (&String, &String)| {
        if uses[key.as_str()] == 1 && key.len() <= 90 && !path.contains(char::REPLACEMENT_CHARACTER) {
            return key.clone();
        }
        let short = key.char_indices().take_while(|(at, c)| at + c.len_utf8() <= 57).map(|(_, c)| c);
        format!("{}-{}", short.collect::<String>(), index::hex(&index::digest(path.as_bytes())))
    };
    plain.iter().zip(relative).map(told).collect()
}

/// One digest over what goes in and how.
fn fingerprint(pictures: &[Picture], options: &Options) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let Options { name, samples_per_shard, shard_bytes, test_share, max_bad_share, limits } = options;
    hasher.update(
        format!("1 {name:?} {samples_per_shard} {shard_bytes} {test_share} {max_bad_share} {limits:?}\0").as_bytes(),
    );
    for picture in pictures {
        let disk = |error| Fault::disk(picture.path.display(), error);
        let meta = fs::metadata(&picture.path).map_err(disk)?;
        let time = meta.modified().map_err(disk)?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let Picture { key, extension, label, .. } = picture;
        hasher.update(format!("{key}.{extension} {label:?} {} {}\0", meta.len(), time.as_nanos()).as_bytes());
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

/// The manifests, where the output is there and was made from the same pictures; a fault where it holds anything
/// else than an unfinished pack.
fn standing(folders: &[(PathBuf, String)], made_from: &str) -> Result<Option<Vec<(PathBuf, Manifest)>>> {
    let mut sets = Vec::new();
    for (folder, name) in folders {
        let taken = |what: String| {
            let remedy = "choose another output, or remove it";
            Fault::usage(format!("{} holds {what}; {remedy}", folder.display()))
        };
        if let Some(manifest) = Manifest::read(&Store::open(&folder.to_string_lossy())?)? {
            if manifest.source.as_deref() != Some(made_from) {
                return Err(taken(format!("the data set {} already, from other pictures or settings", manifest.name)));
            }
            sets.push((folder.clone(), manifest));
        } else if let Ok(entries) = fs::read_dir(folder) {
            let ours = |file: &str| file.starts_with(&format!("{name}-")) || file.ends_with(".partial");
            let strange =
                entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).find(|f| !ours(f));
            if let Some(file) = strange {
                return Err(taken(format!("{file}, which no pack of {name} left there")));
            }
        }
    }
    Ok((sets.len() == folders.len()).then_some(sets))
}

fn write_shards(
    folder: &Path,
    name: &str,
    pictures: &[Picture],
    options: &Options,
    bar: &ProgressBar,
    bad: &mut Vec<(PathBuf, String)>,
) -> Result<Vec<Listed>> {
    fs::create_dir_all(folder).map_err(|error| Fault::disk(folder.display(), error))?;
    clear(folder)?;
    let mut shards = Vec::new();
    let mut open: Option<Writer> = None;
    for picture in pictures {
        bar.inc(1);
        let bytes = fs::read(&picture.path).map_err(|error| Fault::disk(picture.path.display(), error))?;
        if let Err(fault) = probe(&bytes, &options.limits) {
            tracing::warn!("{} is left out: {fault}", picture.path.display());
            bad.push((picture.path.clone(), fault.message));
            continue;
        }
        if open.as_ref().is_some_and(|tar| full(tar, bytes.len() as u64, options)) {
            shards.extend(open.take().map(Writer::close).transpose()?);
        }
        let tar = match &mut open {
            Some(tar) => tar,
            None => open.insert(Writer::create(folder.join(format!("{name}-{:06}.tar", shards.len())))?),
        };
        // Members stand in the order of their extensions: `cls` in front of every picture's.
        if let Some(label) = picture.label {
            tar.member(format!("{}.cls", picture.key), label.to_string().as_bytes())?;
        }
        tar.member(format!("{}.{}", picture.key, picture.extension), &bytes)?;
        tar.samples += 1;
    }
    shards.extend(open.take().map(Writer::close).transpose()?);
    Ok(shards)
}

fn full(tar: &Writer, next: u64, options: &Options) -> bool {
    // A sample costs two headers, a padded label, and the two blocks of zeros at the end.
    tar.samples >= options.samples_per_shard || tar.bytes() + next + 3072 > options.shard_bytes
}

/// Shards that an unfinished pack left; `standing` has seen that nothing else is there.
fn clear(folder: &Path) -> Result<()> {
    let disk = |error| Fault::disk(folder.display(), error);
    for entry in fs::read_dir(folder).map_err(disk)? {
        fs::remove_file(entry.map_err(disk)?.path()).map_err(disk)?;
    }
    Ok(())
}

fn refuse_many(bad: &[(PathBuf, String)], total: usize, options: &Options) -> Result<()> {
    if bad.len() as f64 <= options.max_bad_share * total as f64 {
        return Ok(());
    }
    let named: Vec<String> = bad.iter().take(10).map(|(path, why)| format!("{}: {why}", path.display())).collect();
    Err(Fault::new(
        Code::Corrupt,
        format!(
            "{} of {total} pictures are unreadable, at most {:.2} % may be; mend or remove them. {}{}",
            bad.len(),
            options.max_bad_share * 100.0,
            named.join("; "),
            if bad.len() > named.len() { "; …" } else { "" }
        ),
    ))
}

/// Drawn on a terminal only.
fn progress(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("packing {bar:40} {pos}/{len} pictures, {per_sec}, {eta} left");
    ProgressBar::new(length).with_style(style.expect("a valid template"))
}
