//! The tables: key facts, differences between configs, probe results, and accuracy against the only key that differs.

use super::page::{self, Section, escape};
use super::read::{ProbeRecord, RunData};
use crate::log::MetricsLine;
use crate::log::chart::{self, LineStyle, Series};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A row of the key facts: its name, and its text for a run (`None` where it is not known).
type Fact = (&'static str, fn(&RunData) -> Option<String>);

const FACTS: [Fact; 11] = [
    ("Steps", |run| {
        let done = format_integer(run.lines.last()?.step as f64);
        let total = run.config_number("train.steps");
        Some(total.map_or(done.clone(), |total| format!("{done} of {}", format_integer(total))))
    }),
    ("Global batch", |run| {
        run.config_number("train.global_batch").or_else(|| samples_per_step(&run.lines)).map(format_integer)
    }),
    ("Samples seen", |run| Some(format_integer(run.lines.last()?.samples as f64))),
    ("Epochs", |run| Some(format!("{:.2}", run.lines.last()?.epoch))),
    ("First loss", |run| Some(format_significant(run.lines.first()?.loss))),
    ("Final loss", |run| Some(format_significant(run.lines.last()?.loss))),
    ("Samples a second, median", |run| Some(format_significant(median(run, |line| Some(line.samples_per_s))?))),
    ("Waiting for data, median", |run| Some(format_percent(median(run, |line| Some(line.data_wait))?))),
    ("Waiting for ranks, median", |run| Some(format_percent(median(run, |line| Some(line.comm_wait))?))),
    ("Model FLOP utilization, median", |run| Some(format_percent(median(run, |line| line.mfu)?))),
    ("Time in steps", |run| {
        let seconds: f64 = run.lines.iter().map(|line| line.seconds).filter(|seconds| seconds.is_finite()).sum();
        (!run.lines.is_empty()).then(|| format_duration(seconds))
    }),
];

/// Renders a table with a row for each fact and a column for each run. A fact that is known of no run is left out.
pub fn key_facts(runs: &[RunData]) -> Section {
    let mut rows = Vec::new();
    for (name, value) in FACTS {
        let cells: Vec<_> = runs.iter().map(value).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|cell| cell.unwrap_or_else(|| "unknown".into()));
            rows.push(std::iter::once(name.to_owned()).chain(cells).collect());
        }
    }
    let head = if runs.len() > 1 { run_heads(runs) } else { Vec::new() };
    let body = if rows.is_empty() { String::new() } else { page::table(&head, &rows, 1) };
    Section { title: "Key facts".into(), body }
}

/// Renders the config keys whose values differ, as dotted paths.
pub fn config_differences(runs: &[RunData]) -> Option<Section> {
    if runs.iter().filter(|run| run.config.is_some()).count() < 2 {
        return None;
    }
    let cell = |value: &Option<Value>| value.as_ref().map_or("absent".into(), |value| escape(&value.to_string()));
    let rows: Vec<Vec<String>> = differing_keys(runs)
        .iter()
        .map(|(path, values)| std::iter::once(escape(path)).chain(values.iter().map(cell)).collect())
        .collect();
    let body = if rows.is_empty() {
        "<p>The configs are alike.</p>\n".into()
    } else {
        page::table(&run_heads(runs), &rows, 1)
    };
    Some(Section { title: "What differs".into(), body })
}

/// Renders the probe results of pretrained and random weights, a row for each protocol.
pub fn probe_results(runs: &[RunData]) -> Option<Section> {
    if runs.iter().all(|run| run.probes.is_empty()) {
        return None;
    }
    let many_runs = runs.len() > 1;
    let count = |count: Option<u64>| count.map_or("unknown".into(), |count| format_integer(count as f64));
    let mut rows = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        for probe in &run.probes {
            // Random weights are gray in every run, since they are the same baseline.
            let color = if probe.checkpoint == "random" { chart::PALETTE.len() - 1 } else { index };
            let name = many_runs.then(|| escape(&run.name));
            let cells = [escape(&probe.protocol), escape(&probe.checkpoint), page::bar(probe.top1, color)];
            rows.push(name.into_iter().chain(cells).chain([count(probe.n_train), count(probe.n_test)]).collect());
        }
    }
    let head = many_runs.then_some("Run").into_iter();
    let head = head.chain(["Protocol", "Weights", "Top-1 accuracy", "Training samples", "Test samples"]);
    let head: Vec<_> = head.map(str::to_owned).collect();
    let body = page::table(&head, &rows, head.len() - 2);
    Some(Section { title: "What the features are worth".into(), body })
}

/// Renders accuracy over a config key, with one curve for each protocol and kind of weights, if the runs differ in
/// exactly one key and it is a number.
pub fn accuracy_against_key(runs: &[RunData]) -> Option<Section> {
    let differing = differing_keys(runs);
    let [(path, values)] = differing.as_slice() else { return None };
    let values: Vec<f64> = values.iter().map(|value| value.as_ref()?.as_f64()).collect::<Option<_>>()?;
    let mut points_by_name = BTreeMap::<String, Vec<(f64, f64)>>::new();
    for (run, value) in runs.iter().zip(values) {
        for ProbeRecord { checkpoint, protocol, top1, .. } in &run.probes {
            let name = format!("{protocol}, {checkpoint} weights");
            points_by_name.entry(name).or_default().push((value, top1 * 100.0));
        }
    }
    if points_by_name.is_empty() {
        return None;
    }
    let names: Vec<&str> = points_by_name.keys().map(String::as_str).collect();
    let legend = page::legend(&names);
    let series = |(color, points): (usize, &Vec<(f64, f64)>)| {
        let mut points = points.clone();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Series { points, color, style: LineStyle::Dots }
    };
    let series: Vec<_> = points_by_name.values().enumerate().map(series).collect();
    let caption = format!("top-1 accuracy in per cent over {path}");
    let body = format!("{legend}{}", page::figure(&chart::line_chart(&series, false), &caption, &caption));
    Some(Section { title: format!("Accuracy against {path}"), body })
}

/// Returns the dotted paths whose values are not equal in all runs, with each run's value. `about` is not a setting and
/// does not count.
fn differing_keys(runs: &[RunData]) -> Vec<(String, Vec<Option<Value>>)> {
    let configs: Vec<BTreeMap<String, Value>> = runs
        .iter()
        .map(|run| {
            let mut leaves = BTreeMap::new();
            flatten("", run.config.as_ref().unwrap_or(&Value::Null), &mut leaves);
            leaves
        })
        .collect();
    let paths: BTreeSet<_> = configs
        .iter()
        .flat_map(BTreeMap::keys)
        .filter(|path| *path != "about" && !path.starts_with("about."))
        .collect();
    let values = |path: &String| configs.iter().map(|leaves| leaves.get(path).cloned()).collect::<Vec<_>>();
    let rows = paths.into_iter().map(|path| (path.clone(), values(path)));
    rows.filter(|(_, values)| values.iter().any(|value| *value != values[0])).collect()
}

/// Collects the leaves of an object by dotted path; a list is a leaf.
fn flatten(path: &str, value: &Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(&path, value, leaves);
            }
        }
        Value::Null if path.is_empty() => {}
        leaf => drop(leaves.insert(path.into(), leaf.clone())),
    }
}

/// Returns the head of a table with a column for each run.
fn run_heads(runs: &[RunData]) -> Vec<String> {
    let names = runs.iter().enumerate().map(|(index, run)| page::swatch(index) + &escape(&run.name));
    std::iter::once(String::new()).chain(names).collect()
}

/// Computes the samples per step from the first and the last line.
fn samples_per_step(lines: &[MetricsLine]) -> Option<f64> {
    let first = lines.first()?;
    let last = lines.last()?;
    let steps = last.step.checked_sub(first.step).filter(|steps| *steps > 0)?;
    Some((last.samples.saturating_sub(first.samples) as f64 / steps as f64).round())
}

/// Returns the median of the finite values of a metric.
fn median(run: &RunData, value: fn(&MetricsLine) -> Option<f64>) -> Option<f64> {
    let mut values: Vec<f64> = run.lines.iter().filter_map(value).filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[half]),
        _ => Some((values[half - 1] + values[half]) / 2.0),
    }
}

/// Formats an integer with separators: `12,800`.
fn format_integer(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) && !out.ends_with('-') {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Formats a number with four significant digits.
fn format_significant(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "not finite".into(),
        size if size >= 1000.0 => format_integer(value),
        0.0 => "0".into(),
        size if size < 1e-3 => format!("{value:.3e}"),
        size => format!("{value:.*}", (3 - size.log10().floor() as i32).max(0) as usize),
    }
}

fn format_percent(fraction: f64) -> String {
    format!("{:.1} %", fraction * 100.0)
}

fn format_duration(seconds: f64) -> String {
    let total = seconds.round() as u64;
    match total {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", total / 60, total % 60),
        _ => format!("{} h {:02} min", format_integer((total / 3600) as f64), total / 60 % 60),
    }
}
