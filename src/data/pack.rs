//! The writer: pictures, still or moving, or sounds become shards with their indices, and `dataset.json` last.
//!
//! The same files give the same bytes, on every machine and with any number of threads: members are USTAR, mode
//! 0444, time 0, in the order of a digest of their keys, which mixes the classes over the shards. Threads read and
//! shape pictures ahead of the one that writes; a shard is put in its place while the next one is made, so at most two
//! are in memory, and none where they go to a disk.
//!
//! Without `dataset.json` a destination is an unfinished pack: started again, it keeps the shards that are whole.

mod keys; // of samples, out of paths
mod rows; // CSV, TSV, JSON lines, Parquet
mod source; // where pictures come from
mod shape; // one picture becomes a sample's members
mod moving; // videos encoded anew
mod voice; // one sound does
mod plan; // which picture goes into which shard
mod standing; // what stands at the destination already

use super::caption;
use super::decode::Limits;
use super::medium::Medium;
use super::set::{Listed, Manifest};
use super::store::Store;
use super::write::{Writer, commit};
use crate::fault::{Code, Fault, Result};
use indicatif::{ProgressBar, ProgressStyle};
use plan::{Part, Plan, Shard};
use serde::{Deserialize, Serialize};
use shape::{Shaped, Shaper};
use source::{Picture, Source};
use standing::Kept;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::ScopedJoinHandle;

/// Samples that a thread may be ahead of the writer.
const AHEAD: usize = 4;

/// How to pack.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data set's name, in shard names and sample ids; the output folder's name where none is given.
    pub name: Option<String>,
    /// A shard is closed at this many samples …
    pub samples_per_shard: u64,
    /// … or before it passes this many bytes. Pictures that are encoded anew are reckoned as they came.
    pub shard_bytes: u64,
    /// Share of samples that go to `test/`, the rest to `train/`; 0 makes one data set, not split.
    pub test_share: f64,
    /// Share of unreadable pictures past which packing fails.
    pub max_bad_share: f64,
    /// What the source is looked through for.
    pub medium: Medium,
    /// Of pictures; sounds have [`sound::Limits::default`](super::sound::Limits::default).
    pub limits: Limits,
    /// Pictures whose shorter side has more pixels are brought down to this many.
    pub resize: Option<u32>,
    /// All pictures are decoded and encoded in this format. Pictures that are resized keep theirs where none is given;
    /// without either, bytes are stored as they came.
    pub encode: Option<Encode>,
    /// Of JPEG and of videos, 1 to 100; [`Options::QUALITY`] where none is given, and of H.264 [`Options::H264`].
    pub quality: Option<u8>,
    /// How videos are encoded anew.
    pub video: Videos,
    /// All sounds are decoded, brought to so many samples a second and stored as WAV of 16 bits and one channel;
    /// without it their bytes are stored as they came.
    pub rate: Option<u32>,
    /// A WordPiece vocabulary of so many tokens is learned from the captions, those of the test part apart, and written to
    /// this file.
    pub tokenizer: Option<(usize, PathBuf)>,
    /// Threads that read and shape pictures; 0: one for each core, and more where pictures come from a store.
    pub threads: usize,
}

/// A format of pictures to write: upright, 8 bits, without alpha. PNG and WebP keep every pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encode {
    Jpeg,
    Png,
    Webp,
}

impl Encode {
    /// In members' names.
    pub fn extension(self) -> &'static str {
        match self {
            Encode::Jpeg => "jpg",
            Encode::Png => "png",
            Encode::Webp => "webp",
        }
    }
}

/// How videos are encoded anew; as they came where nothing is asked for and `resize` leaves them alone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Videos {
    /// H.264 where none is given.
    pub encode: Option<EncodeVideo>,
    /// Frames a second of videos that have more.
    pub fps: Option<f64>,
    /// Of H.264, the most frames from one that stands alone to the next: the smaller, the sooner a clip begins, and the
    /// larger the file; [`Options::GOP`] where none is given.
    pub gop: Option<u32>,
}

/// A coding of videos to write: upright, without sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodeVideo {
    /// In MP4.
    H264,
    /// Each frame a JPEG, in Matroska: the largest, and the fastest to decode.
    Mjpeg,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            name: None,
            samples_per_shard: 10_000,
            shard_bytes: 1 << 30,
            test_share: 0.0,
            max_bad_share: 0.01,
            medium: Medium::Picture,
            limits: Limits::default(),
            resize: None,
            encode: None,
            quality: None,
            video: Videos::default(),
            rate: None,
            tokenizer: None,
            threads: 0,
        }
    }
}

/// What was packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The places that `train` can be pointed at, with their manifests.
    pub sets: Vec<(String, Manifest)>,
    /// Pictures that were left out, and why.
    pub bad: Vec<(String, String)>,
    /// Shards that an earlier pack had left whole.
    pub kept: usize,
    /// The output was already there, from the same pictures.
    pub untouched: bool,
}

/// Packs what `source` names (a folder, or a list of path, label, caption) into the folder `url`; both may be paths or
/// URLs of a store. Faults: Code::Usage for a source without pictures or an output that holds something else,
/// Code::Corrupt where too many pictures are unreadable, Code::Disk, Code::Store.
pub fn pack(source: &str, url: &str, options: &Options) -> Result<Packed> {
    options.check()?;
    let out = Store::open(url)?;
    if !out.lists() {
        return Err(Fault::usage(format!("{url}: nothing can be written through a web server; give its store's URL")));
    }
    let mut source = Source::find(source, options.medium)?;
    let plan = Plan::new(&mut source, &out, options)?;
    if let Some((size, file)) = &options.tokenizer {
        vocabulary(&source.pictures[plan.learned_from()], *size, file)?;
    }
    let standing = standing::finished(&plan)?;
    let untouched = standing.is_some();
    let (manifests, bad, kept) = match standing {
        Some(manifests) => (manifests, Vec::new(), plan.parts.iter().map(|part| part.shards.len()).sum()),
        None => write(&source, &plan, options)?,
    };
    let place = |part: &Part| part.store.name("").trim_end_matches('/').to_owned();
    Ok(Packed { sets: plan.parts.iter().map(place).zip(manifests).collect(), bad, kept, untouched })
}

/// Learns a vocabulary from the captions of pictures.
fn vocabulary(pictures: &[Picture], size: usize, file: &Path) -> Result<()> {
    let captions = pictures.iter().filter_map(|picture| picture.caption.as_deref());
    let text = caption::train(captions, size)?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    let written = folder.map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(file, text + "\n"));
    written.map_err(|error| Fault::usage(format!("{}: {error}; give a file that can be written", file.display())))
}

impl Options {
    /// Quality of JPEG where nobody says otherwise.
    pub const QUALITY: u8 = 90;
    /// Quality of H.264 where nobody says otherwise: a constant rate factor of 21.
    pub const H264: u8 = 60;
    /// Frames between those that stand alone where nobody says otherwise.
    pub const GOP: u32 = 12;

    fn check(&self) -> Result<()> {
        if self.samples_per_shard == 0 || self.shard_bytes == 0 {
            let message = "a shard needs room for a sample: samples_per_shard and shard_bytes are 1 or more";
            return Err(Fault::usage(message));
        }
        if !(0.0..1.0).contains(&self.test_share) {
            return Err(Fault::usage(format!(
                "the test share is {}; it is 0 or more and less than 1",
                self.test_share
            )));
        }
        match self.medium {
            Medium::Picture => self.check_pictures()?,
            Medium::Sound => self.check_sounds()?,
        }
        let safe = |name: &String| !name.is_empty() && !name.contains(['/', '{', '}', '\0']);
        match &self.name {
            Some(name) if !safe(name) => {
                Err(Fault::usage(format!("{name:?} cannot name a data set: no slash, no brace")))
            }
            _ => Ok(()),
        }
    }

    fn check_sounds(&self) -> Result<()> {
        let changed = self.resize.is_some() || self.encode.is_some() || self.quality.is_some();
        if changed || self.video != Videos::default() {
            return Err(Fault::usage("sounds have no size, format or quality to be changed; give a rate, or nothing"));
        }
        match self.rate {
            Some(rate) if !(1000..=384_000).contains(&rate) => {
                Err(Fault::usage(format!("the rate is {rate}; it is samples a second, 1000 to 384000")))
            }
            _ => Ok(()),
        }
    }

    fn check_pictures(&self) -> Result<()> {
        if self.rate.is_some() {
            return Err(Fault::usage("a rate is for sounds; pack sounds, or leave it out"));
        }
        if self.resize == Some(0) {
            return Err(Fault::usage("pictures cannot be resized to 0 pixels; the shorter side needs 1 or more"));
        }
        self.video.check()?;
        let video = self.video != Videos::default();
        let jpeg = video || self.encode.map_or(self.resize.is_some(), |encode| encode == Encode::Jpeg);
        match self.quality {
            Some(quality) if !(1..=100).contains(&quality) => {
                Err(Fault::usage(format!("the quality is {quality}; it is 1 to 100")))
            }
            Some(_) if !jpeg => {
                Err(Fault::usage("a quality belongs to JPEG and videos, and none is encoded; leave it out"))
            }
            _ => Ok(()),
        }
    }
}

/// Pictures that were left out so far.
struct Bad<'a> {
    named: Vec<(String, String)>,
    total: usize,
    options: &'a Options,
}

impl Bad<'_> {
    /// Counts one more; a fault once they are too many.
    fn push(&mut self, name: String, why: String) -> Result<()> {
        tracing::warn!("{name} is left out: {why}");
        self.named.push((name, why));
        if self.named.len() as f64 <= self.options.max_bad_share * self.total as f64 {
            return Ok(());
        }
        let named: Vec<String> = self.named.iter().rev().take(10).map(|(name, why)| format!("{name}: {why}")).collect();
        Err(Fault::new(
            Code::Corrupt,
            format!(
                "{} of {} {} are unreadable, at most {:.2} % may be; mend or remove them. {}",
                self.named.len(),
                self.total,
                self.options.medium.plural(),
                self.options.max_bad_share * 100.0,
                named.join("; "),
            ),
        ))
    }
}

/// The manifests, what was left out, and how many shards were there already.
type Written = (Vec<Manifest>, Vec<(String, String)>, usize);

/// Writes all shards that do not stand yet, then the manifests.
fn write(source: &Source, plan: &Plan, options: &Options) -> Result<Written> {
    let mut bad = Bad { named: Vec::new(), total: source.pictures.len(), options };
    // Both are looked at before anything is written.
    let prepare = |part| standing::prepare(part, &source.pictures, &plan.made_from);
    let kept: Vec<Vec<Option<Kept>>> = plan.parts.iter().map(prepare).collect::<Result<_>>()?;
    let mut shaper = Shaper::new(options);
    let mut listed: Vec<Vec<Option<Listed>>> = Vec::new();
    for part in kept {
        let still = |kept: Option<Kept>| kept.map_or(Ok(None), |kept| still(source, &mut shaper, kept, &mut bad));
        listed.push(part.into_iter().map(still).collect::<Result<_>>()?);
    }
    let count = listed.iter().flatten().flatten().count();
    let lacking = |(part, listed): (_, &Vec<Option<Listed>>)| -> Vec<(&Part, &Shard)> {
        let part: &Part = part;
        part.shards.iter().zip(listed).filter(|(_, listed)| listed.is_none()).map(|(shard, _)| (part, shard)).collect()
    };
    let lacking: Vec<(&Part, &Shard)> = plan.parts.iter().zip(&listed).flat_map(lacking).collect();
    let mut made = shards(source, &lacking, options, &mut bad)?.into_iter();
    let mut manifests = Vec::new();
    for (part, listed) in plan.parts.iter().zip(listed) {
        let filled = listed.into_iter().map(|listed| listed.or_else(|| made.next().expect("one for each that lacks")));
        let shards: Vec<Listed> = filled.flatten().collect();
        let samples = shards.iter().map(|shard| shard.samples).sum();
        if samples == 0 {
            return Err(plan::nothing(&part.store));
        }
        let (name, classes) = (part.name.clone(), source.classes.clone());
        manifests.push(Manifest { name, samples, classes, shards, source: Some(plan.made_from.clone()) });
    }
    for (part, manifest) in plan.parts.iter().zip(&manifests) {
        let text = serde_json::to_string_pretty(manifest).expect("a manifest is JSON") + "\n";
        commit(&part.store, Manifest::FILE, text.as_bytes())?;
    }
    plan.parts.iter().try_for_each(standing::done)?;
    Ok((manifests, bad.named, count))
}

/// A shard that stands, if the pictures that it lacks are still unreadable.
fn still(source: &Source, shaper: &mut Shaper, kept: Kept, bad: &mut Bad) -> Result<Option<Listed>> {
    let mut reasons = Vec::new();
    for at in kept.lacks {
        match shaper.shape(source, &source.pictures[at])? {
            Shaped::Members(_) => return Ok(None),
            Shaped::Bad(why) => reasons.push((source.name(&source.pictures[at]), why)),
        }
    }
    reasons.into_iter().try_for_each(|(name, why)| bad.push(name, why))?;
    Ok(Some(kept.listed))
}

/// Makes shards; what `dataset.json` says of each, or none where all of its pictures are unreadable.
fn shards(
    source: &Source,
    lacking: &[(&Part, &Shard)],
    options: &Options,
    bad: &mut Bad,
) -> Result<Vec<Option<Listed>>> {
    let order: Vec<usize> = lacking.iter().flat_map(|(_, shard)| shard.pictures.clone()).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads > 0 { options.threads } else { source.lanes(cores) };
    let bar = progress(order.len() as u64);
    let made = std::thread::scope(|scope| {
        let order = &order;
        // Thread n shapes every n-th picture, and the writer asks them by turns: the order needs no sorting, and
        // nobody runs far ahead.
        let lane = |lane: usize| -> Receiver<Result<Shaped>> {
            let (sender, receiver) = sync_channel(AHEAD);
            scope.spawn(move || {
                let mut shaper = Shaper::new(options);
                let mut mine = order.iter().skip(lane).step_by(threads);
                // The writer hangs up when it fails.
                mine.all(|&at| sender.send(shaper.shape(source, &source.pictures[at])).is_ok());
            });
            receiver
        };
        let lanes: Vec<_> = (0..threads.min(order.len())).map(lane).collect();
        let mut turns = lanes.iter().cycle();
        let mut made = Vec::new();
        let mut closing: Option<ScopedJoinHandle<Result<Listed>>> = None;
        for (part, shard) in lacking {
            let mut tar = Writer::create(&part.store, &shard.file, shard.bytes)?;
            for at in shard.pictures.clone() {
                bar.inc(1);
                let picture = &source.pictures[at];
                match turns.next().expect("a thread").recv().expect("threads end after their last picture")? {
                    Shaped::Members(members) => tar.sample(&picture.key, &members)?,
                    Shaped::Bad(why) => bad.push(source.name(picture), why)?,
                }
            }
            made.extend(closing.take().map(closed).transpose()?.map(Some));
            match tar.samples() {
                0 => {
                    tar.discard()?;
                    made.push(None);
                }
                _ => closing = Some(scope.spawn(move || tar.close())),
            }
        }
        made.extend(closing.map(closed).transpose()?.map(Some));
        Ok(made)
    });
    bar.finish_and_clear();
    made
}

fn closed(closing: ScopedJoinHandle<Result<Listed>>) -> Result<Listed> {
    closing.join().expect("no panic in a writer")
}

/// Drawn on a terminal only.
fn progress(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("packing {bar:40} {pos}/{len}, {per_sec}, {eta} left");
    ProgressBar::new(length).with_style(style.expect("a valid template"))
}
