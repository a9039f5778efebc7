//! The tables: key facts, what differs between configs, probe results, and accuracy against the one key that differs.

use super::chart::{self, Curve, Pen};
use super::page::{self, Section, escape};
use super::read::{Probe, Run};
use crate::run::log::Line;
use serde_json::Value;
use std::collections::BTreeMap;

/// One row of the facts: its name, and what a run has there.
type Fact = (&'static str, fn(&Run) -> Option<String>);

const FACTS: [Fact; 11] = [
    ("Steps", |run| {
        let done = whole(run.lines.last()?.step as f64);
        Some(run.number("train.steps").map_or(done.clone(), |all| format!("{done} of {}", whole(all))))
    }),
    ("Global batch", |run| run.number("train.global_batch").or_else(|| batch(&run.lines)).map(whole)),
    ("Samples seen", |run| Some(whole(run.lines.last()?.samples as f64))),
    ("Epochs", |run| Some(format!("{:.2}", run.lines.last()?.epoch))),
    ("First loss", |run| Some(significant(run.lines.first()?.loss))),
    ("Final loss", |run| Some(significant(run.lines.last()?.loss))),
    ("Samples a second, median", |run| Some(significant(median(run, |line| Some(line.samples_per_s))?))),
    ("Waiting for data, median", |run| Some(percent(median(run, |line| Some(line.data_wait))?))),
    ("Waiting for ranks, median", |run| Some(percent(median(run, |line| Some(line.comm_wait))?))),
    ("Model FLOP utilisation, median", |run| Some(percent(median(run, |line| line.mfu)?))),
    ("Time in steps", |run| {
        let seconds: f64 = run.lines.iter().map(|line| line.seconds).filter(|seconds| seconds.is_finite()).sum();
        (!run.lines.is_empty()).then(|| duration(seconds))
    }),
];

/// A row a fact, a column a run. A fact that no run knows is left out.
pub fn facts(runs: &[Run]) -> Section {
    let mut rows = Vec::new();
    for (name, of) in FACTS {
        let cells: Vec<_> = runs.iter().map(of).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|cell| cell.unwrap_or_else(|| "unknown".into()));
            rows.push(std::iter::once(name.to_owned()).chain(cells).collect());
        }
    }
    let head = if runs.len() > 1 { heads(runs) } else { Vec::new() };
    let body = if rows.is_empty() { String::new() } else { page::table(&head, &rows, 1) };
    Section { title: "Key facts".into(), body }
}

/// Config keys whose values differ, as dotted paths.
pub fn differences(runs: &[Run]) -> Option<Section> {
    if runs.iter().filter(|run| run.config.is_some()).count() < 2 {
        return None;
    }
    let differing = differing(runs);
    let show = |value: &Option<Value>| value.as_ref().map_or("absent".into(), |value| escape(&value.to_string()));
    let rows: Vec<Vec<String>> = differing
        .iter()
        .map(|(path, values)| std::iter::once(escape(path)).chain(values.iter().map(show)).collect())
        .collect();
    let body =
        if rows.is_empty() { "<p>The configs are alike.</p>\n".into() } else { page::table(&heads(runs), &rows, 1) };
    Some(Section { title: "What differs".into(), body })
}

/// Pretrained against random weights, a row a protocol.
pub fn probes(runs: &[Run]) -> Option<Section> {
    if runs.iter().all(|run| run.probes.is_empty()) {
        return None;
    }
    let several = runs.len() > 1;
    let mut rows = Vec::new();
    for (number, run) in runs.iter().enumerate() {
        for probe in &run.probes {
            // Random weights in grey, whatever the run: they are the same yardstick.
            let colour = if probe.checkpoint == "random" { chart::PALETTE.len() - 1 } else { number };
            let count = |count: Option<u64>| count.map_or("unknown".into(), |count| whole(count as f64));
            let name = several.then(|| escape(&run.name));
            let cells = [escape(&probe.protocol), escape(&probe.checkpoint), page::bar(probe.top1, colour)];
            rows.push(name.into_iter().chain(cells).chain([count(probe.n_train), count(probe.n_test)]).collect());
        }
    }
    let head = several.then_some("Run").into_iter();
    let head = head.chain(["Protocol", "Weights", "Top-1 accuracy", "Training samples", "Test samples"]);
    let head: Vec<_> = head.map(str::to_owned).collect();
    let body = page::table(&head, &rows, head.len() - 2);
    Some(Section { title: "What the features are worth".into(), body })
}

/// Where the runs differ in exactly one numeric key: accuracy over that key, a curve for each protocol and weights.
pub fn accuracy_against_key(runs: &[Run]) -> Option<Section> {
    let differing = differing(runs);
    let [(path, values)] = differing.as_slice() else { return None };
    let at: Vec<f64> = values.iter().map(|value| value.as_ref()?.as_f64()).collect::<Option<_>>()?;
    let mut series = BTreeMap::<String, Vec<(f64, f64)>>::new();
    for (run, at) in runs.iter().zip(at) {
        for Probe { checkpoint, protocol, top1, .. } in &run.probes {
            series.entry(format!("{protocol}, {checkpoint} weights")).or_default().push((at, top1 * 100.0));
        }
    }
    if series.is_empty() {
        return None;
    }
    let names: Vec<&str> = series.keys().map(String::as_str).collect();
    let legend = page::legend(&names);
    let curve = |(colour, points): (usize, &Vec<(f64, f64)>)| {
        let mut points = points.clone();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Curve { points, colour, pen: Pen::Dots }
    };
    let curves: Vec<_> = series.values().enumerate().map(curve).collect();
    let caption = format!("top-1 accuracy in per cent over {path}");
    let body = format!("{legend}{}", page::figure(&chart::lines(&curves, false), &caption, &caption));
    Some(Section { title: format!("Accuracy against {path}"), body })
}

/// Dotted paths whose values are not the same in every run, with each run's value. What a config says about itself is
/// no setting.
fn differing(runs: &[Run]) -> Vec<(String, Vec<Option<Value>>)> {
    let flat: Vec<BTreeMap<String, Value>> = runs
        .iter()
        .map(|run| {
            let mut flat = BTreeMap::new();
            flatten("", run.config.as_ref().unwrap_or(&Value::Null), &mut flat);
            flat
        })
        .collect();
    let paths: std::collections::BTreeSet<_> =
        flat.iter().flat_map(BTreeMap::keys).filter(|path| *path != "about" && !path.starts_with("about.")).collect();
    let row = |path: &String| (path.clone(), flat.iter().map(|run| run.get(path).cloned()).collect::<Vec<_>>());
    paths.into_iter().map(row).filter(|(_, values)| values.iter().any(|value| *value != values[0])).collect()
}

/// Leaves of an object by dotted path; a list is a leaf.
fn flatten(path: &str, value: &Value, out: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(&path, value, out);
            }
        }
        Value::Null if path.is_empty() => {}
        leaf => drop(out.insert(path.into(), leaf.clone())),
    }
}

fn heads(runs: &[Run]) -> Vec<String> {
    let names = runs.iter().enumerate().map(|(number, run)| page::swatch(number) + &escape(&run.name));
    std::iter::once(String::new()).chain(names).collect()
}

/// Samples a step, from the counts of the first and the last line.
fn batch(lines: &[Line]) -> Option<f64> {
    let (first, last) = (lines.first()?, lines.last()?);
    let steps = last.step.checked_sub(first.step).filter(|steps| *steps > 0)?;
    Some((last.samples.saturating_sub(first.samples) as f64 / steps as f64).round())
}

fn median(run: &Run, reading: fn(&Line) -> Option<f64>) -> Option<f64> {
    let mut values: Vec<f64> = run.lines.iter().filter_map(reading).filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[half]),
        _ => Some((values[half - 1] + values[half]) / 2.0),
    }
}

/// `12,800`.
fn whole(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (number, digit) in digits.chars().enumerate() {
        if number > 0 && (digits.len() - number).is_multiple_of(3) && !out.ends_with('-') {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Four significant digits.
fn significant(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "not finite".into(),
        size if size >= 1000.0 => whole(value),
        0.0 => "0".into(),
        size if size < 1e-3 => format!("{value:.3e}"),
        size => format!("{value:.*}", (3 - size.log10().floor() as i32).max(0) as usize),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn duration(seconds: f64) -> String {
    let total = seconds.round() as u64;
    match total {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", total / 60, total % 60),
        _ => format!("{} h {:02} min", whole((total / 3600) as f64), total / 60 % 60),
    }
}
