//! How far a long piece of work is, told by rank 0: a bar on a terminal, else a plain line every ten seconds, so that
//! short work says nothing.

use indicatif::{FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(10);

/// One piece of work of `total` parts.
pub struct Progress {
    title: &'static str,
    total: u64,
    begun: Instant,
    told: Instant,
    show: Show,
}

enum Show {
    Nothing,
    Lines,
    Bar(ProgressBar),
}

impl Progress {
    /// Begins to tell of `title` on standard error, or keeps quiet where the rank is not the one that `tells`.
    pub fn begin(title: &'static str, total: u64, tells: bool) -> Progress {
        let show = match (tells, std::io::stderr().is_terminal()) {
            (false, _) => Show::Nothing,
            (true, false) => Show::Lines,
            (true, true) => {
                let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(12));
                let style =
                    ProgressStyle::with_template("{prefix} {bar:20.cyan/dim} {percent} %  eta {eta}  {wide_msg}");
                bar.set_style(style.expect("a fixed template"));
                bar.set_prefix(title);
                Show::Bar(bar)
            }
        };
        let now = Instant::now();
        Progress { title, total, begun: now, told: now, show }
    }

    /// `done` of the parts are done; `note` is what else is worth telling.
    pub fn at(&mut self, done: u64, note: &str) {
        match &self.show {
            Show::Nothing => {}
            Show::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(note.to_owned());
            }
            Show::Lines if self.told.elapsed() >= EVERY => {
                self.told = Instant::now();
                eprintln!("{}", line(self.title, done, self.total, self.begun.elapsed(), note));
            }
            Show::Lines => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
        }
    }
}

/// `training set: 12 %, eta 00:01:10, loss 0.5312`
pub fn line(title: &str, done: u64, total: u64, taken: Duration, note: &str) -> String {
    let share = done as f64 / total.max(1) as f64;
    let left = match done {
        0 => "unknown".into(),
        _ => FormattedDuration(Duration::from_secs_f64(taken.as_secs_f64() * (1.0 / share - 1.0).max(0.0))).to_string(),
    };
    let comma = if note.is_empty() { "" } else { ", " };
    format!("{title}: {:.0} %, eta {left}{comma}{note}", 100.0 * share)
}
