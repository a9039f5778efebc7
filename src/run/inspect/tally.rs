//! Counts of what was seen, and their histograms.

use super::Report;
use crate::data::clip::Facts;
use crate::data::sound::Header;
use serde::Serialize;
use std::collections::BTreeMap;

/// Names that are kept of damaged or unreadable members; the others are counted.
const NAMED: usize = 100;

/// Lower bounds of the shorter side's bins, pixels.
const SIDES: [f64; 15] =
    [0.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0, 1536.0, 2048.0, 4096.0, 8192.0];
/// Lower bounds of the bins of width / height.
const ASPECTS: [f64; 10] = [0.0, 1.0 / 3.0, 0.5, 2.0 / 3.0, 0.75, 1.0, 4.0 / 3.0, 1.5, 2.0, 3.0];

/// Lower bounds of the bins of a sound's length, seconds.
const SECONDS: [f64; 13] = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, 30.0, 60.0, 300.0];

/// One bar of a histogram.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bin {
    /// Values from this one on …
    pub from: f64,
    /// … and below this one; none for the last bin.
    pub to: Option<f64>,
    pub count: u64,
}

/// The least, the mean and the greatest of some values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    pub least: u64,
    pub mean: f64,
    pub most: u64,
}

/// What is known of videos before any frame is decoded.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Videos {
    pub count: u64,
    /// Over all of them.
    pub frames: u64,
    pub seconds: f64,
    /// Of one, in seconds.
    pub shortest: f64,
    pub longest: f64,
    /// Videos by coding and container, such as `h264 in mov`.
    pub codings: BTreeMap<String, u64>,
    /// Videos by frames a second, to two places.
    pub rates: BTreeMap<String, u64>,
    /// Videos by width and height, upright, such as `320x240`.
    pub sizes: BTreeMap<String, u64>,
}

impl Videos {
    fn add(&mut self, facts: &Facts) {
        let named = |name: String| BTreeMap::from([(name, 1)]);
        let rate = format!("{:.2}", facts.fps);
        self.join(Videos {
            count: 1,
            frames: facts.frames,
            seconds: facts.seconds,
            shortest: facts.seconds,
            longest: facts.seconds,
            codings: named(format!("{} in {}", facts.codec, facts.container)),
            rates: named(rate.trim_end_matches('0').trim_end_matches('.').to_owned()),
            sizes: named(format!("{}x{}", facts.width, facts.height)),
        });
    }

    fn join(&mut self, other: Videos) {
        if other.count == 0 {
            return;
        }
        self.shortest = if self.count == 0 { other.shortest } else { self.shortest.min(other.shortest) };
        self.longest = self.longest.max(other.longest);
        self.count += other.count;
        self.frames += other.frames;
        self.seconds += other.seconds;
        let all = [(&mut self.codings, other.codings), (&mut self.rates, other.rates), (&mut self.sizes, other.sizes)];
        for (mine, theirs) in all {
            theirs.into_iter().for_each(|(name, count)| *mine.entry(name).or_default() += count);
        }
    }
}

/// A histogram over fixed bounds.
#[derive(Clone, Debug)]
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
}

/// What was seen so far.
#[derive(Clone, Debug)]
pub struct Tally {
    samples: u64,
    members: BTreeMap<String, u64>,
    unchecked: u64,
    classes: BTreeMap<i64, u64>,
    pictures: u64,
    least: u64,
    total: u64,
    most: u64,
    sides: Histogram,
    aspects: Histogram,
    videos: Videos,
    sounds: u64,
    seconds: Histogram,
    seconds_total: f64,
    rates: BTreeMap<u32, u64>,
    channels: BTreeMap<u32, u64>,
    damaged: Named,
    unreadable: Named,
}

/// Some names, and how many there are.
#[derive(Clone, Debug, Default)]
struct Named {
    names: Vec<String>,
    count: u64,
}

impl Default for Tally {
    fn default() -> Self {
        Tally {
            samples: 0,
            members: BTreeMap::new(),
            unchecked: 0,
            classes: BTreeMap::new(),
            pictures: 0,
            least: u64::MAX,
            total: 0,
            most: 0,
            sides: Histogram::over(&SIDES),
            aspects: Histogram::over(&ASPECTS),
            videos: Videos::default(),
            sounds: 0,
            seconds: Histogram::over(&SECONDS),
            seconds_total: 0.0,
            rates: BTreeMap::new(),
            channels: BTreeMap::new(),
            damaged: Named::default(),
            unreadable: Named::default(),
        }
    }
}

impl Tally {
    pub fn sample(&mut self) {
        self.samples += 1;
    }

    pub fn member(&mut self, extension: &str, checked: bool) {
        match self.members.get_mut(extension) {
            Some(count) => *count += 1,
            None => drop(self.members.insert(extension.to_owned(), 1)),
        }
        self.unchecked += u64::from(!checked);
    }

    pub fn class(&mut self, class: i64) {
        *self.classes.entry(class).or_default() += 1;
    }

    /// A picture of this width and height, and the bytes of its file.
    pub fn picture(&mut self, (width, height): (u32, u32), bytes: u64) {
        self.pictures += 1;
        self.file(bytes);
        self.sides.add(f64::from(width.min(height)));
        self.aspects.add(f64::from(width) / f64::from(height));
    }

    /// A sound, and the bytes of its file.
    pub fn sound(&mut self, header: &Header, bytes: u64) {
        self.sounds += 1;
        self.file(bytes);
        self.seconds.add(header.seconds());
        self.seconds_total += header.seconds();
        *self.rates.entry(header.rate).or_default() += 1;
        *self.channels.entry(header.channels).or_default() += 1;
    }

    fn file(&mut self, bytes: u64) {
        self.total += bytes;
        self.least = self.least.min(bytes);
        self.most = self.most.max(bytes);
    }

    /// That the last picture moves.
    pub fn video(&mut self, facts: &Facts) {
        self.videos.add(facts);
    }

    pub fn damaged(&mut self, name: String) {
        self.damaged.add(name);
    }

    pub fn unreadable(&mut self, name: String) {
        self.unreadable.add(name);
    }

    /// Both together.
    pub fn with(mut self, other: Tally) -> Tally {
        self.samples += other.samples;
        self.unchecked += other.unchecked;
        self.pictures += other.pictures;
        self.total += other.total;
        self.least = self.least.min(other.least);
        self.most = self.most.max(other.most);
        other.members.into_iter().for_each(|(name, count)| *self.members.entry(name).or_default() += count);
        other.classes.into_iter().for_each(|(class, count)| *self.classes.entry(class).or_default() += count);
        self.sides.join(&other.sides);
        self.aspects.join(&other.aspects);
        self.videos.join(other.videos);
        self.sounds += other.sounds;
        self.seconds.join(&other.seconds);
        self.seconds_total += other.seconds_total;
        other.rates.into_iter().for_each(|(rate, count)| *self.rates.entry(rate).or_default() += count);
        other.channels.into_iter().for_each(|(channels, count)| *self.channels.entry(channels).or_default() += count);
        self.damaged.join(other.damaged);
        self.unreadable.join(other.unreadable);
        self
    }

    /// The part of a report that was counted; `classes` names the labels.
    pub fn report(self, classes: &[String]) -> Report {
        let class = |(class, count): (i64, u64)| {
            let name = usize::try_from(class).ok().and_then(|class| classes.get(class));
            (name.cloned().unwrap_or_else(|| class.to_string()), count)
        };
        let verdict = match (self.damaged.count, self.unchecked) {
            (0, 0) => "ok",
            (0, _) => "unchecked",
            _ => "damaged",
        };
        let spread = |count: u64| Spread { least: self.least, mean: self.total as f64 / count as f64, most: self.most };
        let files = self.pictures + self.sounds;
        Report {
            looked_at: self.samples,
            members: self.members,
            classes: self.classes.into_iter().map(class).collect(),
            pictures: self.pictures,
            sounds: self.sounds,
            file_bytes: if files > 0 { spread(files) } else { Spread::default() },
            shorter_side: self.sides.bins(),
            aspect: self.aspects.bins(),
            videos: self.videos,
            seconds: self.seconds.bins(),
            seconds_total: self.seconds_total,
            rates: self.rates,
            channels: self.channels,
            verdict: verdict.into(),
            unchecked: self.unchecked,
            damaged_count: self.damaged.count,
            damaged: self.damaged.sorted(),
            unreadable_count: self.unreadable.count,
            unreadable: self.unreadable.sorted(),
            ..Report::default()
        }
    }
}

impl Named {
    fn add(&mut self, name: String) {
        self.count += 1;
        if self.names.len() < NAMED {
            self.names.push(name);
        }
    }

    fn join(&mut self, other: Named) {
        self.count += other.count;
        self.names.extend(other.names);
    }

    fn sorted(mut self) -> Vec<String> {
        self.names.sort();
        self.names.truncate(NAMED);
        self.names
    }
}

impl Histogram {
    fn over(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len()] }
    }

    fn add(&mut self, value: f64) {
        self.counts[self.bounds.partition_point(|&bound| bound <= value) - 1] += 1;
    }

    fn join(&mut self, other: &Histogram) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// From the first bin that holds something to the last.
    fn bins(&self) -> Vec<Bin> {
        let held = |count: &u64| *count > 0;
        let first = self.counts.iter().position(held).unwrap_or(0);
        let last = self.counts.iter().rposition(held).map_or(0, |last| last + 1);
        let bin =
            |at: usize| Bin { from: self.bounds[at], to: self.bounds.get(at + 1).copied(), count: self.counts[at] };
        (first..last).map(bin).collect()
    }
}
