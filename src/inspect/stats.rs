//! Counts and histograms over the samples of a data set.

use super::InspectReport;
use crate::data::audio::AudioHeader;
use crate::data::video::VideoInfo;
use serde::Serialize;
use std::collections::BTreeMap;

/// Maximum number of listed damaged or unreadable members; all are counted.
const MAX_LISTED: usize = 100;

/// Lower bounds of the bins of the shorter side, pixels.
const SIDE_BOUNDS: [f64; 15] =
    [0.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0, 1536.0, 2048.0, 4096.0, 8192.0];
/// Lower bounds of the bins of width / height.
const ASPECT_BOUNDS: [f64; 10] = [0.0, 1.0 / 3.0, 0.5, 2.0 / 3.0, 0.75, 1.0, 4.0 / 3.0, 1.5, 2.0, 3.0];
/// Lower bounds of the bins of audio durations, seconds.
const SECONDS_BOUNDS: [f64; 13] = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, 30.0, 60.0, 300.0];

/// A bin of a histogram.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bin {
    /// Lower bound, inclusive.
    pub from: f64,
    /// Upper bound, exclusive; `None` for the last bin.
    pub to: Option<f64>,
    pub count: u64,
}

/// Minimum, mean and maximum file size in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SizeStats {
    pub min: u64,
    pub mean: f64,
    pub max: u64,
}

/// Statistics of videos from their headers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VideoStats {
    pub count: u64,
    /// Frames of all videos.
    pub frames: u64,
    /// Duration of all videos in seconds.
    pub seconds: f64,
    /// Duration of the shortest video in seconds.
    pub shortest: f64,
    /// Duration of the longest video in seconds.
    pub longest: f64,
    /// Videos by codec and container, such as `h264 in mov`.
    pub codecs: BTreeMap<String, u64>,
    /// Videos by frame rate in Hz, rounded to two decimals.
    pub frame_rates: BTreeMap<String, u64>,
    /// Videos by width and height after rotation, such as `320x240`.
    pub sizes: BTreeMap<String, u64>,
}

impl VideoStats {
    fn add(&mut self, info: &VideoInfo) {
        let frame_rate = format!("{:.2}", info.fps);
        let frame_rate = frame_rate.trim_end_matches('0').trim_end_matches('.');
        self.merge(VideoStats {
            count: 1,
            frames: info.frames,
            seconds: info.seconds,
            shortest: info.seconds,
            longest: info.seconds,
            codecs: BTreeMap::from([(format!("{} in {}", info.codec, info.container), 1)]),
            frame_rates: BTreeMap::from([(frame_rate.to_owned(), 1)]),
            sizes: BTreeMap::from([(format!("{}x{}", info.width, info.height), 1)]),
        });
    }

    fn merge(&mut self, other: VideoStats) {
        if other.count == 0 {
            return;
        }
        self.shortest = if self.count == 0 { other.shortest } else { self.shortest.min(other.shortest) };
        self.longest = self.longest.max(other.longest);
        self.count += other.count;
        self.frames += other.frames;
        self.seconds += other.seconds;
        merge_counts(&mut self.codecs, other.codecs);
        merge_counts(&mut self.frame_rates, other.frame_rates);
        merge_counts(&mut self.sizes, other.sizes);
    }
}

fn merge_counts<K: Ord>(counts: &mut BTreeMap<K, u64>, other: BTreeMap<K, u64>) {
    for (key, count) in other {
        *counts.entry(key).or_default() += count;
    }
}

/// A histogram over fixed bounds.
#[derive(Clone, Debug)]
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
}

/// Statistics of the samples read so far.
#[derive(Clone, Debug)]
pub struct DatasetStats {
    samples: u64,
    members: BTreeMap<String, u64>,
    unchecked: u64,
    classes: BTreeMap<i64, u64>,
    images: u64,
    min_bytes: u64,
    total_bytes: u64,
    max_bytes: u64,
    sides: Histogram,
    aspects: Histogram,
    videos: VideoStats,
    audio_files: u64,
    seconds: Histogram,
    seconds_total: f64,
    sample_rates: BTreeMap<u32, u64>,
    channels: BTreeMap<u32, u64>,
    damaged: CappedList,
    unreadable: CappedList,
}

/// A list of names that stores at most [`MAX_LISTED`] per thread and counts all.
#[derive(Clone, Debug, Default)]
struct CappedList {
    names: Vec<String>,
    count: u64,
}

impl Default for DatasetStats {
    fn default() -> Self {
        DatasetStats {
            samples: 0,
            members: BTreeMap::new(),
            unchecked: 0,
            classes: BTreeMap::new(),
            images: 0,
            min_bytes: u64::MAX,
            total_bytes: 0,
            max_bytes: 0,
            sides: Histogram::new(&SIDE_BOUNDS),
            aspects: Histogram::new(&ASPECT_BOUNDS),
            videos: VideoStats::default(),
            audio_files: 0,
            seconds: Histogram::new(&SECONDS_BOUNDS),
            seconds_total: 0.0,
            sample_rates: BTreeMap::new(),
            channels: BTreeMap::new(),
            damaged: CappedList::default(),
            unreadable: CappedList::default(),
        }
    }
}

impl DatasetStats {
    /// Adds a sample.
    pub fn add_sample(&mut self) {
        self.samples += 1;
    }

    /// Adds a member of a sample.
    pub fn add_member(&mut self, extension: &str, has_digest: bool) {
        match self.members.get_mut(extension) {
            Some(count) => *count += 1,
            None => drop(self.members.insert(extension.to_owned(), 1)),
        }
        self.unchecked += u64::from(!has_digest);
    }

    /// Adds the label of a sample.
    pub fn add_label(&mut self, label: i64) {
        *self.classes.entry(label).or_default() += 1;
    }

    /// Adds an image or video by its size in pixels and the size of its file.
    pub fn add_image(&mut self, width: u32, height: u32, bytes: u64) {
        self.images += 1;
        self.add_file(bytes);
        self.sides.add(f64::from(width.min(height)));
        self.aspects.add(f64::from(width) / f64::from(height));
    }

    /// Adds an audio file by its header and the size of its file.
    pub fn add_audio(&mut self, header: &AudioHeader, bytes: u64) {
        self.audio_files += 1;
        self.add_file(bytes);
        self.seconds.add(header.seconds());
        self.seconds_total += header.seconds();
        *self.sample_rates.entry(header.sample_rate).or_default() += 1;
        *self.channels.entry(header.channels).or_default() += 1;
    }

    fn add_file(&mut self, bytes: u64) {
        self.total_bytes += bytes;
        self.min_bytes = self.min_bytes.min(bytes);
        self.max_bytes = self.max_bytes.max(bytes);
    }

    /// Adds a video, which was also added as an image.
    pub fn add_video(&mut self, info: &VideoInfo) {
        self.videos.add(info);
    }

    /// Adds a member or shard whose bytes are corrupt.
    pub fn add_damaged(&mut self, name: String) {
        self.damaged.add(name);
    }

    /// Adds a member that is invalid although its digest matches.
    pub fn add_unreadable(&mut self, name: String) {
        self.unreadable.add(name);
    }

    /// Merges the statistics of two sets of samples.
    pub fn merge(mut self, other: DatasetStats) -> DatasetStats {
        self.samples += other.samples;
        self.unchecked += other.unchecked;
        self.images += other.images;
        self.total_bytes += other.total_bytes;
        self.min_bytes = self.min_bytes.min(other.min_bytes);
        self.max_bytes = self.max_bytes.max(other.max_bytes);
        merge_counts(&mut self.members, other.members);
        merge_counts(&mut self.classes, other.classes);
        self.sides.merge(&other.sides);
        self.aspects.merge(&other.aspects);
        self.videos.merge(other.videos);
        self.audio_files += other.audio_files;
        self.seconds.merge(&other.seconds);
        self.seconds_total += other.seconds_total;
        merge_counts(&mut self.sample_rates, other.sample_rates);
        merge_counts(&mut self.channels, other.channels);
        self.damaged.merge(other.damaged);
        self.unreadable.merge(other.unreadable);
        self
    }

    /// Converts to a report with the class names of the data set.
    pub fn into_report(self, class_names: &[String]) -> InspectReport {
        let verdict = match (self.damaged.count, self.unchecked) {
            (0, 0) => "ok",
            (0, _) => "unchecked",
            _ => "damaged",
        };
        InspectReport {
            inspected: self.samples,
            file_bytes: self.file_sizes(),
            members: self.members,
            classes: name_classes(self.classes, class_names),
            images: self.images,
            audio_files: self.audio_files,
            shorter_side: self.sides.bins(),
            aspect: self.aspects.bins(),
            videos: self.videos,
            seconds: self.seconds.bins(),
            seconds_total: self.seconds_total,
            sample_rates: self.sample_rates,
            channels: self.channels,
            verdict: verdict.into(),
            unchecked: self.unchecked,
            damaged_count: self.damaged.count,
            damaged: self.damaged.into_sorted(),
            unreadable_count: self.unreadable.count,
            unreadable: self.unreadable.into_sorted(),
            ..InspectReport::default()
        }
    }

    fn file_sizes(&self) -> SizeStats {
        let files = self.images + self.audio_files;
        if files == 0 {
            return SizeStats::default();
        }
        SizeStats { min: self.min_bytes, mean: self.total_bytes as f64 / files as f64, max: self.max_bytes }
    }
}

/// Replaces labels by class names; a label without a name becomes a number.
fn name_classes(counts: BTreeMap<i64, u64>, class_names: &[String]) -> BTreeMap<String, u64> {
    let named = counts.into_iter().map(|(label, count)| {
        let name = usize::try_from(label).ok().and_then(|label| class_names.get(label));
        (name.cloned().unwrap_or_else(|| label.to_string()), count)
    });
    named.collect()
}

impl CappedList {
    fn add(&mut self, name: String) {
        self.count += 1;
        if self.names.len() < MAX_LISTED {
            self.names.push(name);
        }
    }

    fn merge(&mut self, other: CappedList) {
        self.count += other.count;
        self.names.extend(other.names);
    }

    fn into_sorted(mut self) -> Vec<String> {
        self.names.sort();
        self.names.truncate(MAX_LISTED);
        self.names
    }
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len()] }
    }

    fn add(&mut self, value: f64) {
        self.counts[self.bounds.partition_point(|&bound| bound <= value) - 1] += 1;
    }

    fn merge(&mut self, other: &Histogram) {
        for (count, other) in self.counts.iter_mut().zip(&other.counts) {
            *count += other;
        }
    }

    /// Returns the bins from the first to the last that is not empty.
    fn bins(&self) -> Vec<Bin> {
        let first = self.counts.iter().position(|count| *count > 0).unwrap_or(0);
        let end = self.counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        let bin = |i: usize| Bin { from: self.bounds[i], to: self.bounds.get(i + 1).copied(), count: self.counts[i] };
        (first..end).map(bin).collect()
    }
}
