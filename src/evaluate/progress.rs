//! Progress of a long task, shown by rank 0: a bar on a terminal, otherwise a line every ten seconds, so that short
//! tasks print nothing.

use indicatif::{FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows the progress of one task on standard error.
pub struct ProgressReporter {
    title: &'static str,
    total: u64,
    start: Instant,
    last_line: Instant,
    display: Display,
}

enum Display {
    Hidden,
    Lines,
    Bar(ProgressBar),
}

impl ProgressReporter {
    /// Starts a task of `total` parts; shows nothing unless `visible`.
    pub fn new(title: &'static str, total: u64, visible: bool) -> ProgressReporter {
        let display = if !visible {
            Display::Hidden
        } else if !std::io::stderr().is_terminal() {
            Display::Lines
        } else {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(12));
            let style = ProgressStyle::with_template("{prefix} {bar:20.cyan/dim} {percent} %  eta {eta}  {wide_msg}");
            bar.set_style(style.expect("a valid template"));
            bar.set_prefix(title);
            Display::Bar(bar)
        };
        let now = Instant::now();
        ProgressReporter { title, total, start: now, last_line: now, display }
    }

    /// Shows that `done` parts are done, with a `note` such as the current loss.
    pub fn update(&mut self, done: u64, note: &str) {
        match &self.display {
            Display::Hidden => {}
            Display::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(note.to_owned());
            }
            Display::Lines if self.last_line.elapsed() >= LINE_INTERVAL => {
                self.last_line = Instant::now();
                eprintln!("{}", format_line(self.title, done, self.total, self.start.elapsed(), note));
            }
            Display::Lines => {}
        }
    }
}

impl Drop for ProgressReporter {
    fn drop(&mut self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

/// Formats a line such as `training set: 12 %, eta 00:01:10, loss 0.5312`.
pub fn format_line(title: &str, done: u64, total: u64, elapsed: Duration, note: &str) -> String {
    let fraction = done as f64 / total.max(1) as f64;
    let eta = if done == 0 {
        "unknown".to_owned()
    } else {
        let seconds = elapsed.as_secs_f64() * (1.0 / fraction - 1.0).max(0.0);
        FormattedDuration(Duration::from_secs_f64(seconds)).to_string()
    };
    let comma = if note.is_empty() { "" } else { ", " };
    format!("{title}: {:.0} %, eta {eta}{comma}{note}", 100.0 * fraction)
}
