//! `occlude report`: one self-contained HTML page about a run, or about several runs side by side.
//!
//! The page opens offline and runs no script: curves are inline SVG, and images are embedded. The contents of a run
//! folder are untrusted: all text is escaped, and the page's content security policy forbids everything but its styles.

mod compare;
mod page;
mod read;

use crate::error::{Error, Result};
use crate::log::MetricsLine;
use crate::log::chart::{self, LineStyle, Series};
use page::{Section, escape};
use read::RunData;
use std::path::{Path, PathBuf};

/// Writes the report about the run folders `runs` to the file `out`. Whatever a run lacks (images, probe results, even
/// its config) is skipped with a note.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if no run is given or a folder is not a run;
/// [`ExitCode::Disk`](crate::error::ExitCode::Disk) if a file cannot be read or written.
pub fn write(runs: &[PathBuf], out: &Path) -> Result<()> {
    if runs.is_empty() {
        return Err(Error::usage("report got no run folder; name at least one."));
    }
    let mut runs = runs.iter().map(|dir| read::read_run(dir)).collect::<Result<Vec<_>>>()?;
    read::make_names_unique(&mut runs);
    std::fs::write(out, html(&runs)).map_err(|error| Error::disk(out.display(), error))
}

fn html(runs: &[RunData]) -> String {
    let title = match runs {
        [run] => run.name.clone(),
        _ => format!("{} runs compared", runs.len()),
    };
    let mut sections = vec![about(runs), compare::key_facts(runs)];
    sections.extend(compare::config_differences(runs));
    sections.extend(curves(runs));
    sections.extend(compare::probe_results(runs));
    sections.extend(compare::accuracy_against_key(runs));
    sections.extend(runs.iter().filter_map(|run| images(run, runs.len() > 1)));
    sections.push(configs(runs));
    page::render(&title, &sections)
}

/// Returns the `about` texts of the configs (once if all are equal) and the notes about missing or damaged files.
fn about(runs: &[RunData]) -> Section {
    let all_equal = runs.iter().all(|run| run.about() == runs[0].about());
    let mut body = runs[0].about().filter(|_| all_equal).map_or(String::new(), |about| paragraph("", &about));
    for (index, run) in runs.iter().enumerate() {
        let mut text = run.about().filter(|_| !all_equal).map_or(String::new(), |about| paragraph("", &about));
        text.extend(run.notes.iter().map(|note| paragraph(" class=\"note\"", note)));
        if runs.len() > 1 && !text.is_empty() {
            body += &format!("<h3>{}{}</h3>\n", page::swatch(index), escape(&run.name));
        }
        body += &text;
    }
    Section { title: String::new(), body }
}

fn paragraph(class: &str, text: &str) -> String {
    format!("<p{class}>{}</p>\n", escape(text))
}

/// A chart of one metric over steps.
struct MetricChart {
    title: &'static str,
    caption: &'static str,
    value: fn(&MetricsLine) -> f64,
    /// Draws a moving average over the raw values.
    smooth: bool,
    /// Starts the y axis at zero.
    from_zero: bool,
}

const CHARTS: [MetricChart; 4] = [
    MetricChart {
        title: "Loss",
        caption: "over steps; thin: every step, thick: the mean of its neighbors; a rare spike is cut off",
        value: |line| line.loss,
        smooth: true,
        from_zero: false,
    },
    MetricChart {
        title: "Learning rate",
        caption: "over steps",
        value: |line| line.lr,
        smooth: false,
        from_zero: true,
    },
    MetricChart {
        title: "Gradient norm",
        caption: "over steps, before clipping; a rare spike is cut off",
        value: |line| line.grad_norm,
        smooth: true,
        from_zero: true,
    },
    MetricChart {
        title: "Throughput",
        caption: "samples a second over steps, all ranks",
        value: |line| line.samples_per_s,
        smooth: true,
        from_zero: true,
    },
];

fn curves(runs: &[RunData]) -> Vec<Section> {
    if runs.iter().all(|run| run.lines.is_empty()) {
        return Vec::new();
    }
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let legend = if runs.len() > 1 { page::legend(&names) } else { String::new() };
    CHARTS.iter().map(|chart| metric_section(chart, runs, &legend)).collect()
}

fn metric_section(chart: &MetricChart, runs: &[RunData], legend: &str) -> Section {
    let mut series = Vec::new();
    for (color, run) in runs.iter().enumerate() {
        let points: Vec<_> = run.lines.iter().map(|line| (line.step as f64, (chart.value)(line))).collect();
        if chart.smooth && points.len() >= chart::MIN_POINTS_TO_SMOOTH {
            let mean = chart::smooth(&points);
            series.push(Series { points: chart::downsample(&points), color, style: LineStyle::Thin });
            series.push(Series { points: chart::downsample(&mean), color, style: LineStyle::Thick });
        } else {
            series.push(Series { points: chart::downsample(&points), color, style: LineStyle::Thick });
        }
    }
    let svg = chart::line_chart(&series, chart.from_zero);
    let figure = page::figure(&svg, chart.title, chart.caption);
    Section { title: chart.title.to_owned(), body: format!("{legend}{figure}") }
}

fn images(run: &RunData, with_name: bool) -> Option<Section> {
    if run.pictures.is_empty() {
        return None;
    }
    let title = if with_name { format!("Pictures of {}", run.name) } else { "Pictures".into() };
    let body = run.pictures.iter().map(|(name, png)| page::image(name, png)).collect();
    Some(Section { title, body })
}

fn configs(runs: &[RunData]) -> Section {
    let mut body = String::new();
    for run in runs {
        let Some(config) = &run.config else { continue };
        let text = serde_json::to_string_pretty(config).expect("a JSON value is plain data");
        let text = escape(&text);
        let title = if runs.len() > 1 { format!("Config of {}", run.name) } else { "Resolved config".into() };
        let title = escape(&title);
        body += &format!("<details><summary>{title}</summary><pre>{text}</pre></details>\n");
    }
    Section { title: String::new(), body }
}
