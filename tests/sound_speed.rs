//! How long a spectrogram takes. It wants a machine to itself: `launch/bench_sound` asks for it.

use crate::sound::waves;
use crate::support::{Outcome, trial, write};
use occlude::data::sound::Clip;
use occlude::grid::Grid;
use occlude::part::view::View;
use occlude::part::view::spectrogram::Sound;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use tch::Tensor;

pub fn trials() -> Vec<libtest_mimic::Trial> {
    let name = "sound_speed::a_spectrogram_is_at_least_three_times_as_fast_as_torchaudio_s";
    let case = a_spectrogram_is_at_least_three_times_as_fast_as_torchaudio_s;
    vec![trial(name, case).with_ignored_flag(true)]
}

/// Seconds of processor of this thread.
fn processor() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn a_spectrogram_is_at_least_three_times_as_fast_as_torchaudio_s() -> Outcome {
    let folder = tempfile::tempdir()?;
    let asked = folder.path().join("asked");
    let wave = &waves(16_000, 10.0)[1].1;
    write(&asked, &[("16000/128".into(), Tensor::from_slice(wave))])?;
    let root = crate::support::root();
    let mut theirs = Command::new(root.join(".deps/venv/bin/python"))
        .arg(root.join("tests/oracle/fbank.py"))
        .args(["time", asked.to_str().expect("UTF-8")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut give, take) = (theirs.stdin.take().expect("a pipe"), theirs.stdout.take().expect("a pipe"));
    let mut lines = BufReader::new(take).lines();
    let sound = Sound { rate: 16_000, seconds: None, mean: -4.267_739_3, std: 4.568_997_4, raw: false };
    let view = View { sound: Some(sound), ..View::default() };
    let grid = Grid { frames: 1, rows: 64, cols: 8, channels: 1, patch_frames: 1, patch: 16 };
    let mut out = vec![0; 4 * 1024 * 128];
    let mut pairs = Vec::new();
    for turn in 0..45 {
        writeln!(give)?;
        let theirs: f64 = lines.next().ok_or("torchaudio ended")??.parse()?;
        let began = processor();
        view.eval(&grid, Clip { rate: 16_000, samples: wave }, &mut out)?;
        let ours = processor() - began;
        // The first turns warm up.
        if turn >= 5 {
            pairs.push((ours, theirs));
        }
    }
    drop(give);
    theirs.wait()?;
    let quartiles = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
    };
    let ratio = quartiles(pairs.iter().map(|(ours, theirs)| theirs / ours).collect());
    let [ours, theirs] =
        [quartiles(pairs.iter().map(|p| p.0).collect()), quartiles(pairs.iter().map(|p| p.1).collect())];
    println!(
        "10 s at 16 kHz to 1024 x 128, ms of one core (quartiles): ours {:.3?}, torchaudio {:.3?}; ratio {ratio:.2?}",
        ours.map(|s| s * 1e3),
        theirs.map(|s| s * 1e3)
    );
    assert!(ratio[1] >= 3.0, "{ratio:?} times as fast as torchaudio");
    Ok(())
}
