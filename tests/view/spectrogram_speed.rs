//! Timing of spectrograms. It needs an idle machine: `launch/bench/bench_sound` runs it.

use crate::data::audio::test_signals;
use crate::support::{Outcome, trial_name, write};
use libtest_mimic::Trial;
use occlude::data::audio::Waveform;
use occlude::grid::Grid;
use occlude::view::View;
use occlude::view::spectrogram::AudioView;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use tch::Tensor;

pub fn trials() -> Vec<Trial> {
    let name = trial_name(module_path!(), "spectrograms_are_at_least_three_times_as_fast_as_torchaudio");
    vec![Trial::test(name, spectrograms_are_at_least_three_times_as_fast_as_torchaudio).with_ignored_flag(true)]
}

/// Returns the CPU time of this thread in seconds.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn spectrograms_are_at_least_three_times_as_fast_as_torchaudio() -> Outcome {
    let folder = tempfile::tempdir()?;
    let request = folder.path().join("asked");
    let wave = &test_signals(16_000, 10.0)[1].1;
    write(&request, &[("16000/128".into(), Tensor::from_slice(wave))])?;
    let root = crate::support::root();
    let mut reference = Command::new(root.join(".deps/venv/bin/python"))
        .arg(root.join("tests/oracle/fbank.py"))
        .args(["time", request.to_str().expect("UTF-8")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut give = reference.stdin.take().expect("a pipe");
    let take = reference.stdout.take().expect("a pipe");
    let mut lines = BufReader::new(take).lines();
    let audio =
        AudioView { sample_rate: 16_000, seconds: None, mean: -4.267_739_3, std: 4.568_997_4, raw_waveform: false };
    let view = View { audio: Some(audio), ..View::default() };
    let grid = Grid { frames: 1, rows: 64, cols: 8, channels: 1, patch_frames: 1, patch: 16 };
    let mut out = vec![0; 4 * 1024 * 128];
    let mut pairs = Vec::new();
    for round in 0..45 {
        writeln!(give)?;
        let reference: f64 = lines.next().ok_or("torchaudio ended")??.parse()?;
        let start = cpu_seconds();
        view.eval_view(&grid, Waveform { sample_rate: 16_000, samples: wave }, &mut out)?;
        let ours = cpu_seconds() - start;
        // The first rounds warm up.
        if round >= 5 {
            pairs.push((ours, reference));
        }
    }
    drop(give);
    reference.wait()?;
    let quartiles = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
    };
    let ratio = quartiles(pairs.iter().map(|(ours, reference)| reference / ours).collect());
    let [ours, reference] =
        [quartiles(pairs.iter().map(|p| p.0).collect()), quartiles(pairs.iter().map(|p| p.1).collect())];
    println!(
        "10 s at 16 kHz to 1024 x 128, ms of one core (quartiles): ours {:.3?}, torchaudio {:.3?}; ratio {ratio:.2?}",
        ours.map(|s| s * 1e3),
        reference.map(|s| s * 1e3)
    );
    assert!(ratio[1] >= 3.0, "{ratio:?} times as fast as torchaudio");
    Ok(())
}
