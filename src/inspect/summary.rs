//! The report as text.

use super::{Bin, InspectReport};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Maximum number of listed classes or names.
const MAX_LISTED: usize = 20;
/// Length of the longest bar of a histogram in characters.
const BAR_CHARS: u64 = 40;

impl InspectReport {
    /// Returns the report as lines of text.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("writing to a String cannot fail");
        text.trim_end().to_owned()
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        if self.samples > 0 {
            let bytes = format_bytes(self.bytes as f64);
            writeln!(text, "{}: {} samples in {} shards, {bytes}", self.name, self.samples, self.shards)?;
        }
        if self.indices_written > 0 {
            writeln!(text, "wrote {} indices", self.indices_written)?;
        }
        if self.inspected < self.samples {
            writeln!(text, "inspected {} samples:", self.inspected)?;
        }
        let members: Vec<String> = self.members.iter().map(|(name, count)| format!("{count} .{name}")).collect();
        if !members.is_empty() {
            writeln!(text, "members: {}", members.join(", "))?;
        }
        self.write_classes(text)?;
        self.write_files(text)?;
        self.write_videos(text)?;
        self.write_audio(text)?;
        write_names(text, "damaged", &self.damaged, self.damaged_count)?;
        write_names(text, "unreadable", &self.unreadable, self.unreadable_count)?;
        if let Some(sheet) = &self.sheet {
            writeln!(text, "contact sheet: {}", sheet.display())?;
        }
        match &self.verdict[..] {
            "ok" => writeln!(text, "verdict: ok, all digests match"),
            "damaged" => writeln!(text, "verdict: damaged"),
            _ => writeln!(
                text,
                "verdict: unchecked, {} members have no digest; `occlude inspect --index` writes them",
                self.unchecked
            ),
        }
    }

    fn write_classes(&self, text: &mut String) -> std::fmt::Result {
        let (Some(min), Some(max)) = (self.classes.values().min(), self.classes.values().max()) else {
            return Ok(());
        };
        writeln!(text, "{} classes of {min} to {max} samples", self.classes.len())?;
        if self.classes.len() <= MAX_LISTED {
            for (name, count) in &self.classes {
                writeln!(text, "  {name}: {count}")?;
            }
        }
        Ok(())
    }

    fn write_files(&self, text: &mut String) -> std::fmt::Result {
        if self.images + self.audio_files > 0 {
            let min = format_bytes(self.file_bytes.min as f64);
            let max = format_bytes(self.file_bytes.max as f64);
            let mean = format_bytes(self.file_bytes.mean);
            let what = if self.audio_files == 0 { "image" } else { "audio" };
            writeln!(text, "{what} files: {min} to {max}, {mean} on average")?;
        }
        if self.images > 0 {
            writeln!(text, "shorter side, pixels:")?;
            write_histogram(text, &self.shorter_side, |value| format!("{value:.0}"))?;
            writeln!(text, "width / height:")?;
            write_histogram(text, &self.aspect, |value| format!("{value:.2}"))?;
        }
        Ok(())
    }

    fn write_videos(&self, text: &mut String) -> std::fmt::Result {
        let videos = &self.videos;
        if videos.count == 0 {
            return Ok(());
        }
        let mean = videos.seconds / videos.count as f64;
        writeln!(
            text,
            "{} videos, {} frames: {:.1} to {:.1} s, {mean:.1} s on average",
            videos.count, videos.frames, videos.shortest, videos.longest
        )?;
        write_most_frequent(text, "codecs", &videos.codecs)?;
        write_most_frequent(text, "frames per second", &videos.frame_rates)?;
        write_most_frequent(text, "pixels", &videos.sizes)
    }

    fn write_audio(&self, text: &mut String) -> std::fmt::Result {
        if self.audio_files == 0 {
            return Ok(());
        }
        writeln!(text, "{:.2} hours of audio", self.seconds_total / 3600.0)?;
        let sample_rates = format_counts(&self.sample_rates);
        let channels = format_counts(&self.channels);
        writeln!(text, "sample rates: {sample_rates}; channels: {channels}")?;
        writeln!(text, "seconds:")?;
        write_histogram(text, &self.seconds, |value| format!("{value}"))
    }
}

fn format_counts(counts: &BTreeMap<u32, u64>) -> String {
    counts.iter().map(|(value, count)| format!("{value} ({count})")).collect::<Vec<_>>().join(", ")
}

/// Writes the values with the highest counts.
fn write_most_frequent(text: &mut String, what: &str, counts: &BTreeMap<String, u64>) -> std::fmt::Result {
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let listed: Vec<String> = counts.iter().take(MAX_LISTED).map(|(name, count)| format!("{name}: {count}")).collect();
    let more = if counts.len() > MAX_LISTED { ", …" } else { "" };
    writeln!(text, "  {what}: {}{more}", listed.join(", "))
}

/// Writes the first of `count` names.
fn write_names(text: &mut String, what: &str, names: &[String], count: u64) -> std::fmt::Result {
    if count == 0 {
        return Ok(());
    }
    writeln!(text, "{what}: {count}")?;
    for name in names.iter().take(MAX_LISTED) {
        writeln!(text, "  {name}")?;
    }
    if count as usize > names.len().min(MAX_LISTED) { writeln!(text, "  …") } else { Ok(()) }
}

fn write_histogram(text: &mut String, bins: &[Bin], format_value: impl Fn(f64) -> String) -> std::fmt::Result {
    let max = bins.iter().map(|bin| bin.count).max().unwrap_or(1).max(1);
    for bin in bins {
        let from = format_value(bin.from);
        let to = bin.to.map_or("more".to_owned(), &format_value);
        let bar = "#".repeat((bin.count * BAR_CHARS).div_ceil(max) as usize);
        writeln!(text, "  {from:>6} to {to:<6} {:>9} {bar}", bin.count)?;
    }
    Ok(())
}

/// Formats a number of bytes in the largest binary unit that it reaches.
fn format_bytes(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..UNITS.len() - 1).take_while(|&unit| bytes >= 1024f64.powi(unit as i32 + 1)).count();
    if unit == 0 {
        return format!("{bytes:.0} B");
    }
    format!("{:.1} {}", bytes / 1024f64.powi(unit as i32), UNITS[unit])
}
