//! Tests of audio: decoding, resampling and spectrograms against other implementations, and hostile files.

use crate::support::{Outcome, normal, oracle, read, write};
use libtest_mimic::Failed;
use occlude::data::audio::filterbank::{Filterbank, FrameLayout};
use occlude::data::audio::resample::Resampler;
use occlude::data::audio::{AudioDecoder, AudioFormat, AudioLimits, Waveform, probe, wav};
use occlude::error::ExitCode;
use occlude::grid::Grid;
use occlude::rng::{Philox, Purpose};
use occlude::view::log_mel::LogMel;
use occlude::view::spectrogram::AudioView;
use occlude::view::{View, ViewKey};
use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::sync::LazyLock;
use tch::{Device, Tensor};

crate::trials![
    every_format_decodes_like_libsndfile,
    the_header_gives_the_duration,
    other_formats_are_rejected_by_name,
    a_truncated_file_is_corrupt,
    flipped_bits_cause_no_crash,
    damaged_opus_costs_one_sample,
    costly_files_are_rejected,
    spectrograms_match_torchaudio,
    resampling_matches_torchaudio,
    a_view_is_a_window_of_a_long_clip,
    a_short_clip_is_padded,
];

/// Files in every format by name, and their samples as decoded by libsndfile.
type Files = (BTreeMap<String, Vec<u8>>, BTreeMap<String, Vec<f32>>);
static FILES: LazyLock<Result<Files, String>> = LazyLock::new(|| {
    let make = || -> Result<_, Failed> {
        let folder = tempfile::tempdir()?;
        oracle("fbank.py", &["files", folder.path().to_str().expect("UTF-8")])?;
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder.path())? {
            let entry = entry?;
            files.insert(entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path())?);
        }
        let samples = read(&folder.path().join("samples.safetensors"))?;
        let samples = samples.into_iter().map(|(name, tensor)| (name, values(&tensor))).collect();
        files.remove("samples.safetensors");
        Ok((files, samples))
    };
    make().map_err(|failed| failed.message().unwrap_or("no files").to_owned())
});

fn files() -> Result<&'static Files, Failed> {
    FILES.as_ref().map_err(|message| message.clone().into())
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.flatten(0, -1)).expect("floats")
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn every_format_decodes_like_libsndfile() -> Outcome {
    let (files, samples) = files()?;
    assert_eq!(samples.len(), 38, "three clips in twelve formats, and two in Opus");
    let mut decoder = AudioDecoder::new(AudioLimits::default());
    for (name, expected) in samples {
        let clip = decoder.decode(&files[name])?;
        assert_eq!(clip.sample_rate.to_string(), name.split('-').nth(1).expect("a rate"), "{name}");
        // PCM and FLAC are exact but for the rounding of a mean; the others are decoded with other arithmetic.
        let exact = name.ends_with("wav") || name.ends_with("flac");
        let bound = if exact { 1e-7 } else { 2e-5 };
        assert_eq!(clip.samples.len(), expected.len(), "{name}");
        let far = max_difference(clip.samples, expected);
        assert!(far <= bound, "{name}: {far}");
    }
    Ok(())
}

fn the_header_gives_the_duration() -> Outcome {
    let (files, samples) = files()?;
    for (name, expected) in samples {
        let header = probe(&files[name], &AudioLimits::default())?;
        let (channels, rest) = name.split_once('-').expect("channels");
        assert_eq!(
            (header.channels.to_string(), header.sample_rate.to_string()),
            (channels.into(), rest.split('-').next().expect("a rate").into()),
            "{name}"
        );
        assert!(name.ends_with(header.format.extension()), "{name}: {header:?}");
        match header.format {
            // The encoder fills whole frames, and one of them holds a tag.
            AudioFormat::Mp3 => assert!((header.seconds() - 0.6).abs() < 0.3, "{name}: {header:?}"),
            _ => assert_eq!(header.samples, expected.len() as u64, "{name}"),
        }
    }
    Ok(())
}

fn refused(bytes: &[u8], limits: AudioLimits) -> String {
    let error = AudioDecoder::new(limits).decode(bytes).expect_err("it went through");
    assert_eq!(error.code, ExitCode::Corrupt, "{error}");
    error.message
}

fn other_formats_are_rejected_by_name() -> Outcome {
    let (files, _) = files()?;
    let mp4 = b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0";
    let webm = b"\x1A\x45\xDF\xA3\x01\0\0\0\0\0\0\x1F";
    for (bytes, word) in [
        (&files["adpcm.wav"][..], "it is a WAV of compressed samples"),
        (&files["s16.aiff"], "it is AIFF"),
        (mp4, "it is an MP4"),
        (webm, "it is a Matroska or WebM"),
        (b"", "neither WAV, FLAC, MP3, Ogg Vorbis nor Ogg Opus"),
        (&[0xFF; 4096], "neither WAV, FLAC, MP3, Ogg Vorbis nor Ogg Opus"),
        (&[0; 4096], "neither WAV, FLAC, MP3, Ogg Vorbis nor Ogg Opus"),
    ] {
        let message = refused(bytes, AudioLimits::default());
        assert!(message.contains(word), "{message}");
    }
    Ok(())
}

/// Returns one small file of each format.
fn small_files() -> Result<Vec<(&'static str, &'static [u8])>, Failed> {
    let (files, _) = files()?;
    let names =
        ["1-16000-s16.wav", "1-16000-s16.flac", "1-16000-vorbis.ogg", "1-16000-layer3.mp3", "1-48000-coded.opus"];
    Ok(names.into_iter().map(|name| (name, &files[name][..])).collect())
}

fn a_truncated_file_is_corrupt() -> Outcome {
    for (name, bytes) in small_files()? {
        let mut draw = Philox::new(1, 0, 0, Purpose::Order, 0);
        let cuts =
            (0..64).chain((0..200).map(|_| draw.uniform_int(bytes.len() as u64) as usize)).chain([bytes.len() - 1]);
        for cut in cuts {
            let error = AudioDecoder::new(AudioLimits::default()).decode(&bytes[..cut]).err();
            // An MP3 without its last frame looks like one whose encoder counted the tag frame.
            if error.is_none() && name.ends_with("mp3") && bytes.len() - cut <= 108 {
                continue;
            }
            let error = error.ok_or_else(|| format!("{name} went through though cut at {cut} of {}", bytes.len()))?;
            assert_eq!(error.code, ExitCode::Corrupt, "{name} cut at {cut}: {error}");
        }
    }
    Ok(())
}

fn flipped_bits_cause_no_crash() -> Outcome {
    // A panic inside a decoder would be caught, but it should not happen.
    for (name, bytes) in small_files()? {
        let mut draw = Philox::new(2, 0, 0, Purpose::Order, 0);
        let full = AudioDecoder::new(AudioLimits::default()).decode(bytes)?.samples.to_vec();
        let mut passed = 0;
        for number in 0..400 {
            let mut bytes = bytes.to_vec();
            // Headers are short and matter most: every other flip falls into them.
            let reach = if number % 2 == 0 { 256 } else { bytes.len() as u64 };
            for _ in 0..=draw.uniform_int(4) {
                bytes[draw.uniform_int(reach) as usize] ^= 1 << draw.uniform_int(8);
            }
            match AudioDecoder::new(AudioLimits::default()).decode(&bytes) {
                Ok(clip) => {
                    assert!(clip.samples.len() <= 20 * full.len(), "{name}: {} samples", clip.samples.len());
                    passed += 1;
                }
                Err(error) => {
                    assert_eq!(error.code, ExitCode::Corrupt, "{name}: {error}");
                    assert!(!error.message.contains("panicked"), "{name}, flip {number}: {error}");
                }
            }
        }
        // Checksums detect changed samples: of a page in Ogg, of all samples in FLAC.
        match name {
            name if name.ends_with("ogg") || name.ends_with("opus") => assert_eq!(passed, 0, "{name}"),
            name if name.ends_with("flac") => assert!(passed < 200, "{name}: {passed} of 400"),
            _ => assert!(passed > 0, "{name}"),
        }
    }
    Ok(())
}

/// Returns the pages of an Ogg file with recomputed checksums.
fn with_checksums(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut at = 0;
    while at < bytes.len() {
        let table = at + 27..at + 27 + usize::from(bytes[at + 26]);
        let end = table.end + bytes[table].iter().map(|&length| usize::from(length)).sum::<usize>();
        bytes[at + 22..at + 26].fill(0);
        let bit = |crc: u32| (crc << 1) ^ if crc >> 31 == 1 { 0x04C1_1DB7 } else { 0 };
        let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte) << 24, |crc, _| bit(crc));
        let sum = bytes[at..end].iter().fold(0, byte);
        bytes[at + 22..at + 26].copy_from_slice(&sum.to_le_bytes());
        at = end;
    }
    bytes
}

/// Damage that checksums do not detect reaches FFmpeg, in its own process.
fn damaged_opus_costs_one_sample() -> Outcome {
    let (files, _) = files()?;
    let good = &files["2-48000-coded.opus"];
    assert!(with_checksums(good.clone()) == *good, "the checksums follow the definition of Ogg");
    let mut decoder = AudioDecoder::new(AudioLimits::default());
    let full = decoder.decode(good)?.samples.to_vec();
    let mut draw = Philox::new(4, 0, 0, Purpose::Order, 0);
    let mut passed = 0;
    // After the two header pages.
    let heads: Vec<usize> = (0..good.len()).filter(|&at| good[at..].starts_with(b"OggS")).collect();
    let begin = heads[2] + 27 + usize::from(good[heads[2] + 26]);
    for _ in 0..200 {
        let mut bytes = good.clone();
        for _ in 0..=draw.uniform_int(40) {
            let at = begin + draw.uniform_int((bytes.len() - begin) as u64) as usize;
            if heads.iter().all(|&head| !(head..head + 27 + usize::from(good[head + 26])).contains(&at)) {
                bytes[at] = draw.uniform_int(256) as u8;
            }
        }
        match decoder.decode(&with_checksums(bytes)) {
            Ok(clip) => {
                assert_eq!(clip.samples.len(), full.len());
                passed += 1;
            }
            Err(error) => assert_eq!(error.code, ExitCode::Corrupt, "{error}"),
        }
    }
    assert!(passed > 0, "nothing passed");
    let head = with_checksums([&good[..28 + 9], &[0], &good[28 + 10..]].concat());
    assert!(decoder.decode(&head).is_err_and(|error| error.message.contains("0 channels")));
    assert!(decoder.decode(good)?.samples == full, "the decoder still works");
    Ok(())
}

fn costly_files_are_rejected() -> Outcome {
    let audio = wav::encode(16_000, &vec![0.1; 16_000]);
    let limits = AudioLimits::default();
    assert!(AudioDecoder::new(limits).decode(&audio).is_ok());
    assert!(refused(&audio, AudioLimits { max_bytes: 20_000, ..limits }).contains("the limit is 20000"));
    assert!(refused(&audio, AudioLimits { max_samples: 15_999, ..limits }).contains("the limit is 15999"));
    assert!(
        refused(&audio, AudioLimits { sample_rate: [20_000, 48_000], ..limits }).contains("16000 samples a second")
    );
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = audio.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    // 64 channels of 16 bits.
    let many = with(22, &[64, 0]);
    let many = [&many[..32], &[128, 0], &many[34..]].concat();
    assert!(refused(&many, limits).contains("64 channels"));
    assert!(refused(&with(24, &[0; 4]), limits).contains("0 samples a second"));
    assert!(refused(&with(32, &[0; 2]), limits).contains("no whole number of bytes"));
    // An MP3 header does not give the duration: the frames do.
    let (files, _) = files()?;
    assert!(
        refused(&files["1-16000-layer3.mp3"], AudioLimits { max_samples: 5000, ..limits })
            .contains("the limit is 5000")
    );
    // A FLAC whose header gives no duration is stopped while it is decoded.
    let mut flac = files["1-16000-s16.flac"].clone();
    flac[21] &= 0xF0;
    flac[22..26].fill(0);
    assert_eq!(probe(&flac, &limits)?.samples, 0);
    assert!(refused(&flac, AudioLimits { max_samples: 5000, ..limits }).contains("samples or more, the limit is 5000"));
    Ok(())
}

/// Returns test signals: noise; a chirp with harmonics over noise, and over softer noise; clicks over soft noise.
pub fn test_signals(rate: u32, seconds: f64) -> Vec<(&'static str, Vec<f32>)> {
    let count = (f64::from(rate) * seconds) as usize;
    let noise = values(&normal(9, &[count as i64]));
    let chirp = |at: usize| {
        let t = at as f64 / f64::from(rate);
        let phase = TAU * (100.0 * t + 0.2 * f64::from(rate) * t * t / seconds);
        (0.3 * phase.sin() + 0.1 * (2.0 * phase).sin()) as f32
    };
    let mix = |f: &dyn Fn(usize) -> f32, fraction: f32| (0..count).map(|at| f(at) + fraction * noise[at]).collect();
    vec![
        ("noise", mix(&|_| 0.0, 0.1)),
        ("chirp", mix(&chirp, 3e-2)),
        ("deep", mix(&chirp, 1e-3)),
        ("clicks", mix(&|at| if at % (rate as usize / 3) == 0 { 0.9 } else { 0.0 }, 1e-4)),
    ]
}

fn spectrograms_match_torchaudio() -> Outcome {
    let folder = tempfile::tempdir()?;
    let request = folder.path().join("asked");
    let output = folder.path().join("output");
    let kinds = [(16_000, 128), (8_000, 128), (8_000, 64), (44_100, 80)];
    let waves: Vec<(String, u32, usize, Vec<f32>)> = kinds
        .iter()
        .flat_map(|&(rate, mels)| {
            test_signals(rate, 1.237)
                .into_iter()
                .map(move |(name, wave)| (format!("{rate}/{mels}/{name}"), rate, mels, wave))
        })
        .collect();
    let tensors: Vec<_> = waves.iter().map(|(name, _, _, wave)| (name.clone(), Tensor::from_slice(wave))).collect();
    write(&request, &tensors)?;
    oracle("fbank.py", &["features", request.to_str().expect("UTF-8"), output.to_str().expect("UTF-8")])?;
    let output = read(&output)?;
    for (name, rate, mels, wave) in waves {
        let frames = FrameLayout::from_sample_rate(rate).count(wave.len());
        let mut features = vec![0.0; frames * mels];
        assert_eq!(Filterbank::new(rate, mels).log_mel(&wave, &mut features), frames, "{name}");
        let expected = &output[&format!("{name}/fp32")];
        assert_eq!(expected.size(), [frames as i64, mels as i64], "{name}");
        let exact = values(&output[&format!("{name}/fp64")].to_kind(tch::Kind::Float));
        let ours = max_difference(&features, &exact);
        let reference = max_difference(&values(expected), &exact);
        let audio = AudioView { sample_rate: rate, seconds: None, mean: 0.0, std: 0.5, raw_waveform: true };
        let grid = Grid { frames: 1, rows: 1, cols: 1, channels: 1, patch_frames: 1, patch: mels as i64 };
        let batch = Tensor::from_slice(&wave).view([1, 1, 1, 1, -1]);
        let full = max_difference(&values(&LogMel::new(&audio, &grid, Device::Cpu)?.forward(&batch)?), &exact);
        println!(
            "{name}: {ours:.1e} and in whole batches {full:.1e} from torchaudio in fp64, {:.1e} in fp32",
            max_difference(&features, &values(expected))
        );
        // If a filter is 100 dB below the loudest, its value is the rounding error of the transform: the fp32 result
        // of torchaudio is as far off.
        let bound = if name.ends_with("deep") { 2.0 * reference } else { 1e-3 };
        assert!(ours <= bound, "{name}: distance to torchaudio in fp64 {ours}; torchaudio in fp32 has {reference}");
        assert!(full <= 1e-3, "{name}: in batches, distance to torchaudio in fp64 {full}");
    }
    Ok(())
}

/// Returns a quarter of a second at sample rate `from`, sampled at `rate`: tones of up to `top` of the lower Nyquist
/// frequency, `lower` / 2, faded in and out.
fn tones([from, lower, rate]: [u32; 3], top: f64) -> Vec<f32> {
    let count = f64::from(from / 4 + 7);
    let tone = |at: usize| {
        let t = at as f64 / f64::from(rate);
        let fade = (TAU / 2.0 * t * f64::from(from) / count).sin().powi(2);
        let each = |fraction: f64| (TAU * top * fraction * f64::from(lower) * 0.5 * t + fraction).sin();
        (fade * 0.2 * [0.02, 0.1, 0.4, 0.7, 1.0].map(each).iter().sum::<f64>()) as f32
    };
    (0..(count * f64::from(rate) / f64::from(from)).ceil() as usize).map(tone).collect()
}

fn resampling_matches_torchaudio() -> Outcome {
    let folder = tempfile::tempdir()?;
    let request = folder.path().join("asked");
    let output = folder.path().join("output");
    let rates =
        [[44_100, 16_000], [48_000, 16_000], [22_050, 16_000], [8_000, 16_000], [16_000, 8_000], [11_025, 16_000]];
    let name = |[from, to]: [u32; 2]| format!("{from}/{to}");
    let wave = |[from, to]: [u32; 2], rate, top| tones([from, from.min(to), rate], top);
    let tensors: Vec<_> =
        rates.iter().map(|&rates| (name(rates), Tensor::from_slice(&wave(rates, rates[0], 0.5)))).collect();
    write(&request, &tensors)?;
    oracle("fbank.py", &["resample", request.to_str().expect("UTF-8"), output.to_str().expect("UTF-8")])?;
    let output = read(&output)?;
    let mut resampler = Resampler::default();
    let size = |wave: &[f32]| wave.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let apart = |ours: &[f32], expected: &[f32]| {
        assert_eq!(ours.len(), expected.len());
        size(&ours.iter().zip(expected).map(|(a, b)| a - b).collect::<Vec<_>>()) / size(expected)
    };
    for rates in rates {
        // Up to half of the band the short kernel of torchaudio is good to a thousandth of the signal.
        let expected = values(&output[&name(rates)]);
        let fraction = apart(resampler.resample(&wave(rates, rates[0], 0.5), rates)?, &expected);
        assert!(fraction <= 2e-3, "{rates:?}: relative difference from torchaudio {fraction}");
        // Both should approximate the same tones at the other rate.
        for top in [0.5, 0.8] {
            let fraction = apart(resampler.resample(&wave(rates, rates[0], top), rates)?, &wave(rates, rates[1], top));
            assert!(
                fraction <= 1e-5,
                "{rates:?}: relative difference from the exact tones {fraction}, up to {top} of the band"
            );
        }
    }
    assert_eq!(resampler.resample(&[0.5; 10], [8000, 8000])?, [0.5; 10], "nothing to do");
    Ok(())
}

/// Views of 32 frames and 16 filters at 8 kHz: 2,680 samples.
pub fn small_view(seconds: Option<f64>) -> (View, Grid) {
    let audio = AudioView { sample_rate: 8000, seconds, mean: -3.0, std: 2.0, raw_waveform: false };
    let grid = Grid { frames: 1, rows: 2, cols: 1, channels: 1, patch_frames: 1, patch: 16 };
    (View { audio: Some(audio), ..View::default() }, grid)
}

/// Returns the values of a view and how many of its frames are valid.
fn view_values(options: impl FnOnce(&mut [u8]) -> occlude::error::Result<u32>) -> Result<(Vec<f32>, u32), Failed> {
    let mut out = vec![0; 4 * 32 * 16];
    let valid = options(&mut out)?;
    Ok((out.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect(), valid))
}

/// Returns the normalized spectrogram of samples at 8 kHz, without padding.
fn spectrogram(samples: &[f32]) -> Vec<f32> {
    let mut rows = vec![0.0; FrameLayout::from_sample_rate(8000).count(samples.len()) * 16];
    Filterbank::new(8000, 16).log_mel(samples, &mut rows);
    rows.iter().map(|value| (value + 3.0) / 4.0).collect()
}

fn a_view_is_a_window_of_a_long_clip() -> Outcome {
    let (view, grid) = small_view(None);
    let samples = values(&normal(4, &[9000]));
    let clip = Waveform { sample_rate: 8000, samples: &samples };
    let (middle, valid) = view_values(|out| view.eval_view(&grid, clip, out))?;
    assert_eq!(valid, 32);
    assert!(max_difference(&middle, &spectrogram(&samples[3160..5840])) < 1e-3, "evaluation uses the center");
    let mut starts = Vec::new();
    for (id, epoch) in [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (5, 0)] {
        let (window, valid) = view_values(|out| view.train_view(&grid, clip, ViewKey { seed: 7, id, epoch }, 0, out))?;
        assert_eq!(valid, 32);
        assert_eq!(
            view_values(|out| view.train_view(&grid, clip, ViewKey { seed: 7, id, epoch }, 0, out))?.0,
            window,
            "the same again"
        );
        let start =
            (0..=6320).find(|&start| max_difference(&window[..16], &spectrogram(&samples[start..start + 200])) < 1e-3);
        let start = start.ok_or("the window is no part of the sound")?;
        assert!(max_difference(&window, &spectrogram(&samples[start..start + 2680])) < 1e-3, "one run of samples");
        starts.push(start);
    }
    starts.sort_unstable();
    starts.dedup();
    assert!(starts.len() == 6 && starts[5] - starts[0] > 2000, "windows start anywhere: {starts:?}");
    Ok(())
}

fn a_short_clip_is_padded() -> Outcome {
    let (full, grid) = small_view(None);
    let samples = values(&normal(5, &[1000]));
    let clip = Waveform { sample_rate: 8000, samples: &samples };
    // 1 + (1000 - 200) / 80 frames.
    let expected = spectrogram(&samples);
    assert_eq!(expected.len(), 11 * 16);
    for options in [0, 1] {
        let (ours, valid) = view_values(|out| match options {
            0 => full.train_view(&grid, clip, ViewKey { seed: 7, id: 1, epoch: 0 }, 0, out),
            _ => full.eval_view(&grid, clip, out),
        })?;
        assert_eq!(valid, 11);
        assert!(max_difference(&ours[..expected.len()], &expected) < 1e-3);
        // (0 − mean) / (2 · std): the reference pads before it normalizes.
        assert!(ours[expected.len()..].iter().all(|value| *value == 0.75), "{:?}", &ours[expected.len()..][..4]);
    }
    // The same duration at another sample rate.
    let slow = Waveform { sample_rate: 4000, samples: &samples[..500] };
    assert_eq!(view_values(|out| full.eval_view(&grid, slow, out))?.1, 11);
    // `seconds` selects less than the frames cover.
    let long = values(&normal(6, &[9000]));
    let (part, grid) = small_view(Some(0.25));
    let (ours, valid) = view_values(|out| part.eval_view(&grid, Waveform { sample_rate: 8000, samples: &long }, out))?;
    assert_eq!(valid, 23);
    assert!(max_difference(&ours[..23 * 16], &spectrogram(&long[3500..5500])) < 1e-3);
    // A clip shorter than one frame is rejected.
    let error = full
        .eval_view(&grid, Waveform { sample_rate: 8000, samples: &samples[..199] }, &mut [0; 2048])
        .expect_err("nothing");
    assert!(error.code == ExitCode::Corrupt && error.message.contains("shorter than one frame"), "{error}");
    Ok(())
}
