//! The report as people read it.

use super::{Bin, Report, Videos};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Classes and names that are shown one by one.
const SHOWN: usize = 20;
/// The longest bar of a histogram, letters.
const BAR: u64 = 40;

impl Report {
    /// Some lines of text.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a text takes all that is written");
        text.trim_end().to_owned()
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        if self.samples > 0 {
            writeln!(
                text,
                "{}: {} samples in {} shards, {}",
                self.name,
                self.samples,
                self.shards,
                size(self.bytes as f64)
            )?;
        }
        if self.indexed > 0 {
            writeln!(text, "{} indices were written", self.indexed)?;
        }
        if self.looked_at < self.samples {
            writeln!(text, "looked at {} samples:", self.looked_at)?;
        }
        let members: Vec<String> = self.members.iter().map(|(name, count)| format!("{count} .{name}")).collect();
        if !members.is_empty() {
            writeln!(text, "members: {}", members.join(", "))?;
        }
        self.classes(text)?;
        if self.pictures + self.sounds > 0 {
            let [least, mean, most] =
                [self.file_bytes.least as f64, self.file_bytes.mean, self.file_bytes.most as f64].map(size);
            let what = if self.sounds == 0 { "picture" } else { "sound" };
            writeln!(text, "a {what}'s file: {least} to {most}, {mean} on average")?;
        }
        if self.pictures > 0 {
            writeln!(text, "shorter side, pixels:")?;
            histogram(text, &self.shorter_side, |value| format!("{value:.0}"))?;
            writeln!(text, "width / height:")?;
            histogram(text, &self.aspect, |value| format!("{value:.2}"))?;
        }
        self.videos(text)?;
        self.sounds(text)?;
        named(text, "damaged", &self.damaged, self.damaged_count)?;
        named(text, "unreadable", &self.unreadable, self.unreadable_count)?;
        if let Some(sheet) = &self.sheet {
            writeln!(text, "contact sheet: {}", sheet.display())?;
        }
        match &self.verdict[..] {
            "ok" => writeln!(text, "verdict: ok, all digests are right"),
            "damaged" => writeln!(text, "verdict: damaged"),
            _ => writeln!(
                text,
                "verdict: unchecked, {} members have no digest; `occlude inspect --index` writes them",
                self.unchecked
            ),
        }
    }

    fn classes(&self, text: &mut String) -> std::fmt::Result {
        let (Some(least), Some(most)) = (self.classes.values().min(), self.classes.values().max()) else {
            return Ok(());
        };
        writeln!(text, "{} classes of {least} to {most} samples", self.classes.len())?;
        if self.classes.len() <= SHOWN {
            self.classes.iter().try_for_each(|(name, count)| writeln!(text, "  {name}: {count}"))?;
        }
        Ok(())
    }

    fn videos(&self, text: &mut String) -> std::fmt::Result {
        let videos = &self.videos;
        if videos.count == 0 {
            return Ok(());
        }
        let (shortest, mean, longest) = (videos.shortest, videos.seconds / videos.count as f64, videos.longest);
        let Videos { count, frames, .. } = videos;
        writeln!(text, "{count} videos, {frames} frames: {shortest:.1} to {longest:.1} s, {mean:.1} s on average")?;
        for (what, counts) in
            [("coded as", &videos.codings), ("frames a second", &videos.rates), ("pixels", &videos.sizes)]
        {
            let mut counts: Vec<_> = counts.iter().collect();
            counts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            let shown: Vec<String> =
                counts.iter().take(SHOWN).map(|(name, count)| format!("{name}: {count}")).collect();
            let more = if counts.len() > SHOWN { ", …" } else { "" };
            writeln!(text, "  {what}: {}{more}", shown.join(", "))?;
        }
        Ok(())
    }

    fn sounds(&self, text: &mut String) -> std::fmt::Result {
        if self.sounds == 0 {
            return Ok(());
        }
        let counts = |of: &BTreeMap<u32, u64>| -> String {
            of.iter().map(|(value, count)| format!("{value} ({count})")).collect::<Vec<_>>().join(", ")
        };
        writeln!(text, "{:.2} hours of sound", self.seconds_total / 3600.0)?;
        writeln!(text, "samples a second: {}; channels: {}", counts(&self.rates), counts(&self.channels))?;
        writeln!(text, "seconds:")?;
        histogram(text, &self.seconds, |value| format!("{value}"))
    }
}

fn named(text: &mut String, what: &str, names: &[String], count: u64) -> std::fmt::Result {
    if count == 0 {
        return Ok(());
    }
    writeln!(text, "{what}: {count}")?;
    names.iter().take(SHOWN).try_for_each(|name| writeln!(text, "  {name}"))?;
    if count as usize > names.len().min(SHOWN) { writeln!(text, "  …") } else { Ok(()) }
}

fn histogram(text: &mut String, bins: &[Bin], show: impl Fn(f64) -> String) -> std::fmt::Result {
    let most = bins.iter().map(|bin| bin.count).max().unwrap_or(1).max(1);
    for bin in bins {
        let to = bin.to.map_or("more".to_owned(), &show);
        let bar = "#".repeat((bin.count * BAR).div_ceil(most) as usize);
        writeln!(text, "  {:>6} to {to:<6} {:>9} {bar}", show(bin.from), bin.count)?;
    }
    Ok(())
}

fn size(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = (0..units.len() - 1).take_while(|&at| bytes >= 1024f64.powi(at as i32 + 1)).count();
    match at {
        0 => format!("{bytes:.0} B"),
        _ => format!("{:.1} {}", bytes / 1024f64.powi(at as i32), units[at]),
    }
}
