//! `occlude report`: one self-contained page about a run, or about several side by side.
//!
//! The page opens offline and runs no script: curves are inline SVG, pictures are embedded. What a run folder holds is
//! somebody's data and not ours: all of it is escaped, and the page's own policy forbids everything but its styles.

mod chart;
mod compare;
mod page;
mod read;

use crate::fault::{Fault, Result};
use chart::{Curve, Pen};
use page::{Section, escape};
use read::Run;
use std::path::{Path, PathBuf};

/// Writes the report about the run folders `runs` to the file `out`. What a run lacks (pictures, probe results, even its
/// config) is left out with a note.
///
/// # Errors
/// [`Code::Usage`](crate::fault::Code::Usage) where no run is given or a folder is none;
/// [`Code::Disk`](crate::fault::Code::Disk) where a file cannot be read or written.
pub fn write(runs: &[PathBuf], out: &Path) -> Result<()> {
    if runs.is_empty() {
        return Err(Fault::usage("report got no run folder; name at least one."));
    }
    let mut runs = runs.iter().map(|dir| read::run(dir)).collect::<Result<Vec<_>>>()?;
    read::name_apart(&mut runs);
    std::fs::write(out, html(&runs)).map_err(|error| Fault::disk(out.display(), error))
}

fn html(runs: &[Run]) -> String {
    let title = match runs {
        [run] => run.name.clone(),
        _ => format!("{} runs compared", runs.len()),
    };
    let mut sections = vec![about(runs), compare::facts(runs)];
    sections.extend(compare::differences(runs));
    sections.extend(curves(runs));
    sections.extend(compare::probes(runs));
    sections.extend(compare::accuracy_against_key(runs));
    sections.extend(runs.iter().filter_map(|run| pictures(run, runs.len() > 1)));
    sections.push(configs(runs));
    page::page(&title, &sections)
}

/// What each run says about itself, once where all say the same, and what was found amiss.
fn about(runs: &[Run]) -> Section {
    let paragraph = |class: &str, text: &str| format!("<p{class}>{}</p>\n", escape(text));
    let same = runs.iter().all(|run| run.about() == runs[0].about());
    let mut body = runs[0].about().filter(|_| same).map_or(String::new(), |about| paragraph("", &about));
    for (number, run) in runs.iter().enumerate() {
        let mut own = run.about().filter(|_| !same).map_or(String::new(), |about| paragraph("", &about));
        own.extend(run.notes.iter().map(|note| paragraph(" class=\"note\"", note)));
        if runs.len() > 1 && !own.is_empty() {
            body += &format!("<h3>{}{}</h3>\n", page::swatch(number), escape(&run.name));
        }
        body += &own;
    }
    Section { title: String::new(), body }
}

/// What a step's line says, as a curve.
type Reading = fn(&crate::run::log::Line) -> f64;

/// The curves over steps: name, caption, reading, whether neighbours are averaged, whether the axis begins at zero.
const CURVES: [(&str, &str, Reading, bool, bool); 4] = [
    (
        "Loss",
        "over steps; thin: every step, thick: the mean of its neighbours; a rare spike is cut off",
        |line| line.loss,
        true,
        false,
    ),
    ("Learning rate", "over steps", |line| line.lr, false, true),
    ("Gradient norm", "over steps, before clipping; a rare spike is cut off", |line| line.grad_norm, true, true),
    ("Throughput", "samples a second over steps, all ranks", |line| line.samples_per_s, true, true),
];

fn curves(runs: &[Run]) -> Vec<Section> {
    if runs.iter().all(|run| run.lines.is_empty()) {
        return Vec::new();
    }
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let legend = if runs.len() > 1 { page::legend(&names) } else { String::new() };
    let draw = |(name, caption, reading, smooth, zero): &(&str, &str, Reading, bool, bool)| {
        let mut curves = Vec::new();
        for (colour, run) in runs.iter().enumerate() {
            let points: Vec<_> = run.lines.iter().map(|line| (line.step as f64, reading(line))).collect();
            if *smooth && points.len() >= chart::SMOOTHED_FROM {
                let mean = chart::smooth(&points);
                curves.push(Curve { points: chart::thin(&points), colour, pen: Pen::Thin });
                curves.push(Curve { points: chart::thin(&mean), colour, pen: Pen::Thick });
            } else {
                curves.push(Curve { points: chart::thin(&points), colour, pen: Pen::Thick });
            }
        }
        let svg = chart::lines(&curves, *zero);
        Section { title: name.to_string(), body: format!("{legend}{}", page::figure(&svg, name, caption)) }
    };
    CURVES.iter().map(draw).collect()
}

fn pictures(run: &Run, named: bool) -> Option<Section> {
    if run.pictures.is_empty() {
        return None;
    }
    let title = if named { format!("Pictures of {}", run.name) } else { "Pictures".into() };
    let body = run.pictures.iter().map(|(name, png)| page::picture(name, png)).collect();
    Some(Section { title, body })
}

fn configs(runs: &[Run]) -> Section {
    let mut body = String::new();
    for run in runs {
        let Some(config) = &run.config else { continue };
        let text = serde_json::to_string_pretty(config).expect("a JSON value is plain data");
        let title = if runs.len() > 1 { format!("Config of {}", run.name) } else { "Resolved config".into() };
        let (title, text) = (escape(&title), escape(&text));
        body += &format!("<details><summary>{title}</summary><pre>{text}</pre></details>\n");
    }
    Section { title: String::new(), body }
}
