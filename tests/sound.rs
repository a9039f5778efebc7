//! Sounds: decoded, resampled and made spectrograms as other people's code does it, and never trusted.

use crate::support::{Outcome, normal, oracle, read, write};
use libtest_mimic::Failed;
use occlude::data::sound::filterbank::{Filterbank, Frames};
use occlude::data::sound::resample::Resampler;
use occlude::data::sound::{Clip, Decoder, Format, Limits, probe, wav};
use occlude::fault::Code;
use occlude::grid::Grid;
use occlude::part::view::View;
use occlude::part::view::log_mel::LogMel;
use occlude::part::view::spectrogram::Sound;
use occlude::rng::{Draw, Purpose};
use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::sync::LazyLock;
use tch::{Device, Tensor};

crate::trials![
    every_format_decodes_as_libsndfile_does,
    a_header_says_how_long_a_sound_is,
    other_formats_are_refused_by_name,
    a_cut_file_is_corrupt,
    flipped_bits_do_no_harm,
    damaged_opus_costs_one_sample,
    what_costs_too_much_is_refused,
    a_spectrogram_is_torchaudio_s,
    resampling_is_torchaudio_s,
    a_view_shows_a_window_of_a_long_sound,
    a_short_sound_is_padded,
];

/// Files in every format by name, and what libsndfile decodes of them.
type Files = (BTreeMap<String, Vec<u8>>, BTreeMap<String, Vec<f32>>);
static FILES: LazyLock<Result<Files, String>> = LazyLock::new(|| {
    let made = || -> Result<_, Failed> {
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
    made().map_err(|failed| failed.message().unwrap_or("no files").to_owned())
});

fn files() -> Result<&'static Files, Failed> {
    FILES.as_ref().map_err(|message| message.clone().into())
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.flatten(0, -1)).expect("floats")
}

pub fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn every_format_decodes_as_libsndfile_does() -> Outcome {
    let (files, samples) = files()?;
    assert_eq!(samples.len(), 38, "three sounds in twelve formats, and two in Opus");
    let mut decoder = Decoder::new(Limits::default());
    for (name, wanted) in samples {
        let clip = decoder.decode(&files[name])?;
        assert_eq!(clip.rate.to_string(), name.split('-').nth(1).expect("a rate"), "{name}");
        // PCM and FLAC are exact but for the rounding of a mean; the others are decoded in other arithmetic.
        let exact = name.ends_with("wav") || name.ends_with("flac");
        let bound = if exact { 1e-7 } else { 2e-5 };
        assert_eq!(clip.samples.len(), wanted.len(), "{name}");
        let far = furthest(clip.samples, wanted);
        assert!(far <= bound, "{name}: {far}");
    }
    Ok(())
}

fn a_header_says_how_long_a_sound_is() -> Outcome {
    let (files, samples) = files()?;
    for (name, wanted) in samples {
        let header = probe(&files[name], &Limits::default())?;
        let (channels, rest) = name.split_once('-').expect("channels");
        assert_eq!(
            (header.channels.to_string(), header.rate.to_string()),
            (channels.into(), rest.split('-').next().expect("a rate").into()),
            "{name}"
        );
        assert!(name.ends_with(header.format.extension()), "{name}: {header:?}");
        match header.format {
            // Its encoder fills whole frames, and one of them holds a tag.
            Format::Mp3 => assert!((header.seconds() - 0.6).abs() < 0.3, "{name}: {header:?}"),
            _ => assert_eq!(header.samples, wanted.len() as u64, "{name}"),
        }
    }
    Ok(())
}

fn refused(bytes: &[u8], limits: Limits) -> String {
    let fault = Decoder::new(limits).decode(bytes).expect_err("it went through");
    assert_eq!(fault.code, Code::Corrupt, "{fault}");
    fault.message
}

fn other_formats_are_refused_by_name() -> Outcome {
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
        let message = refused(bytes, Limits::default());
        assert!(message.contains(word), "{message}");
    }
    Ok(())
}

/// One file of each format and of few bytes.
fn some() -> Result<Vec<(&'static str, &'static [u8])>, Failed> {
    let (files, _) = files()?;
    let names =
        ["1-16000-s16.wav", "1-16000-s16.flac", "1-16000-vorbis.ogg", "1-16000-layer3.mp3", "1-48000-coded.opus"];
    Ok(names.into_iter().map(|name| (name, &files[name][..])).collect())
}

fn a_cut_file_is_corrupt() -> Outcome {
    for (name, bytes) in some()? {
        let mut draw = Draw::new(1, 0, 0, Purpose::Order, 0);
        let cuts = (0..64).chain((0..200).map(|_| draw.below(bytes.len() as u64) as usize)).chain([bytes.len() - 1]);
        for cut in cuts {
            let fault = Decoder::new(Limits::default()).decode(&bytes[..cut]).err();
            // An MP3 that lacks its last frame is one whose encoder counted the frame of the tag.
            if fault.is_none() && name.ends_with("mp3") && bytes.len() - cut <= 108 {
                continue;
            }
            let fault = fault.ok_or_else(|| format!("{name} went through though cut at {cut} of {}", bytes.len()))?;
            assert_eq!(fault.code, Code::Corrupt, "{name} cut at {cut}: {fault}");
        }
    }
    Ok(())
}

fn flipped_bits_do_no_harm() -> Outcome {
    // A panic inside of a decoder would be caught, and is still worth knowing of.
    for (name, bytes) in some()? {
        let mut draw = Draw::new(2, 0, 0, Purpose::Order, 0);
        let whole = Decoder::new(Limits::default()).decode(bytes)?.samples.to_vec();
        let mut passed = 0;
        for number in 0..400 {
            let mut bytes = bytes.to_vec();
            // Headers are short and hold what counts: every other flip falls into them.
            let reach = if number % 2 == 0 { 256 } else { bytes.len() as u64 };
            for _ in 0..=draw.below(4) {
                bytes[draw.below(reach) as usize] ^= 1 << draw.below(8);
            }
            match Decoder::new(Limits::default()).decode(&bytes) {
                Ok(clip) => {
                    assert!(clip.samples.len() <= 20 * whole.len(), "{name}: {} samples", clip.samples.len());
                    passed += 1;
                }
                Err(fault) => {
                    assert_eq!(fault.code, Code::Corrupt, "{name}: {fault}");
                    assert!(!fault.message.contains("panicked"), "{name}, flip {number}: {fault}");
                }
            }
        }
        // Check sums see what changes sound: of a page in Ogg, of all samples in FLAC.
        match name {
            name if name.ends_with("ogg") || name.ends_with("opus") => assert_eq!(passed, 0, "{name}"),
            name if name.ends_with("flac") => assert!(passed < 200, "{name}: {passed} of 400"),
            _ => assert!(passed > 0, "{name}"),
        }
    }
    Ok(())
}

/// The pages of an Ogg file with their check sums made anew.
fn summed(mut bytes: Vec<u8>) -> Vec<u8> {
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

/// Damage that check sums do not tell reaches FFmpeg, in a process of its own.
fn damaged_opus_costs_one_sample() -> Outcome {
    let (files, _) = files()?;
    let good = &files["2-48000-coded.opus"];
    assert!(summed(good.clone()) == *good, "the sums are made as Ogg makes them");
    let mut decoder = Decoder::new(Limits::default());
    let whole = decoder.decode(good)?.samples.to_vec();
    let (mut draw, mut passed) = (Draw::new(4, 0, 0, Purpose::Order, 0), 0);
    // Behind the two pages of headers.
    let heads: Vec<usize> = (0..good.len()).filter(|&at| good[at..].starts_with(b"OggS")).collect();
    let begin = heads[2] + 27 + usize::from(good[heads[2] + 26]);
    for _ in 0..200 {
        let mut bytes = good.clone();
        for _ in 0..=draw.below(40) {
            let at = begin + draw.below((bytes.len() - begin) as u64) as usize;
            if heads.iter().all(|&head| !(head..head + 27 + usize::from(good[head + 26])).contains(&at)) {
                bytes[at] = draw.below(256) as u8;
            }
        }
        match decoder.decode(&summed(bytes)) {
            Ok(clip) => {
                assert_eq!(clip.samples.len(), whole.len());
                passed += 1;
            }
            Err(fault) => assert_eq!(fault.code, Code::Corrupt, "{fault}"),
        }
    }
    assert!(passed > 0, "nothing passed");
    let head = summed([&good[..28 + 9], &[0], &good[28 + 10..]].concat());
    assert!(decoder.decode(&head).is_err_and(|fault| fault.message.contains("0 channels")));
    assert!(decoder.decode(good)?.samples == whole, "afterwards it decodes as before");
    Ok(())
}

fn what_costs_too_much_is_refused() -> Outcome {
    let sound = wav::encode(16_000, &vec![0.1; 16_000]);
    let limits = Limits::default();
    assert!(Decoder::new(limits).decode(&sound).is_ok());
    assert!(refused(&sound, Limits { max_bytes: 20_000, ..limits }).contains("the limit is 20000"));
    assert!(refused(&sound, Limits { max_samples: 15_999, ..limits }).contains("the limit is 15999"));
    assert!(refused(&sound, Limits { rate: [20_000, 48_000], ..limits }).contains("16000 samples a second"));
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = sound.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    // 64 channels of 16 bits.
    let many = with(22, &[64, 0]);
    let many = [&many[..32], &[128, 0], &many[34..]].concat();
    assert!(refused(&many, limits).contains("64 channels"));
    assert!(refused(&with(24, &[0; 4]), limits).contains("0 samples a second"));
    assert!(refused(&with(32, &[0; 2]), limits).contains("no whole number of bytes"));
    // An MP3 does not say how long it is: the frames do.
    let (files, _) = files()?;
    assert!(
        refused(&files["1-16000-layer3.mp3"], Limits { max_samples: 5000, ..limits }).contains("the limit is 5000")
    );
    // A FLAC that says nothing of its length is stopped on the way.
    let mut flac = files["1-16000-s16.flac"].clone();
    flac[21] &= 0xF0;
    flac[22..26].fill(0);
    assert_eq!(probe(&flac, &limits)?.samples, 0);
    assert!(refused(&flac, Limits { max_samples: 5000, ..limits }).contains("samples or more, the limit is 5000"));
    Ok(())
}

/// Noise; a chirp with harmonics over noise, and over softer noise; clicks over soft noise.
pub fn waves(rate: u32, seconds: f64) -> Vec<(&'static str, Vec<f32>)> {
    let count = (f64::from(rate) * seconds) as usize;
    let noise = values(&normal(9, &[count as i64]));
    let chirp = |at: usize| {
        let t = at as f64 / f64::from(rate);
        let phase = TAU * (100.0 * t + 0.2 * f64::from(rate) * t * t / seconds);
        (0.3 * phase.sin() + 0.1 * (2.0 * phase).sin()) as f32
    };
    let mix = |f: &dyn Fn(usize) -> f32, share: f32| (0..count).map(|at| f(at) + share * noise[at]).collect();
    vec![
        ("noise", mix(&|_| 0.0, 0.1)),
        ("chirp", mix(&chirp, 3e-2)),
        ("deep", mix(&chirp, 1e-3)),
        ("clicks", mix(&|at| if at % (rate as usize / 3) == 0 { 0.9 } else { 0.0 }, 1e-4)),
    ]
}

fn a_spectrogram_is_torchaudio_s() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (asked, told) = (folder.path().join("asked"), folder.path().join("told"));
    let kinds = [(16_000, 128), (8_000, 128), (8_000, 64), (44_100, 80)];
    let waves: Vec<(String, u32, usize, Vec<f32>)> = kinds
        .iter()
        .flat_map(|&(rate, mels)| {
            waves(rate, 1.237).into_iter().map(move |(name, wave)| (format!("{rate}/{mels}/{name}"), rate, mels, wave))
        })
        .collect();
    let tensors: Vec<_> = waves.iter().map(|(name, _, _, wave)| (name.clone(), Tensor::from_slice(wave))).collect();
    write(&asked, &tensors)?;
    oracle("fbank.py", &["features", asked.to_str().expect("UTF-8"), told.to_str().expect("UTF-8")])?;
    let told = read(&told)?;
    for (name, rate, mels, wave) in waves {
        let frames = Frames::at(rate).of(wave.len());
        let mut got = vec![0.0; frames * mels];
        assert_eq!(Filterbank::new(rate, mels).log_mel(&wave, &mut got), frames, "{name}");
        let wanted = &told[&format!("{name}/fp32")];
        assert_eq!(wanted.size(), [frames as i64, mels as i64], "{name}");
        let exact = values(&told[&format!("{name}/fp64")].to_kind(tch::Kind::Float));
        let (ours, theirs) = (furthest(&got, &exact), furthest(&values(wanted), &exact));
        let sound = Sound { rate, seconds: None, mean: 0.0, std: 0.5, raw: true };
        let grid = Grid { frames: 1, rows: 1, cols: 1, channels: 1, patch_frames: 1, patch: mels as i64 };
        let batch = Tensor::from_slice(&wave).view([1, 1, 1, 1, -1]);
        let whole = furthest(&values(&LogMel::new(&sound, &grid, Device::Cpu)?.of(&batch)?), &exact);
        println!(
            "{name}: {ours:.1e} and in whole batches {whole:.1e} from torchaudio in fp64, {:.1e} in fp32",
            furthest(&got, &values(wanted))
        );
        // Where a filter is 100 dB below the loudest, what it holds is the rounding of the transform: torchaudio's own
        // fp32 is as far away.
        let bound = if name.ends_with("deep") { 2.0 * theirs } else { 1e-3 };
        assert!(ours <= bound, "{name}: {ours} from torchaudio in fp64, which is {theirs} from it in fp32");
        assert!(whole <= 1e-3, "{name}: in whole batches {whole} from torchaudio in fp64");
    }
    Ok(())
}

/// A quarter of a second at `from` a second, heard at `rate` a second: tones of up to `top` of the lower Nyquist
/// frequency `lower` / 2, faded in and out.
fn tones([from, lower, rate]: [u32; 3], top: f64) -> Vec<f32> {
    let count = f64::from(from / 4 + 7);
    let tone = |at: usize| {
        let t = at as f64 / f64::from(rate);
        let fade = (TAU / 2.0 * t * f64::from(from) / count).sin().powi(2);
        let each = |share: f64| (TAU * top * share * f64::from(lower) * 0.5 * t + share).sin();
        (fade * 0.2 * [0.02, 0.1, 0.4, 0.7, 1.0].map(each).iter().sum::<f64>()) as f32
    };
    (0..(count * f64::from(rate) / f64::from(from)).ceil() as usize).map(tone).collect()
}

fn resampling_is_torchaudio_s() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (asked, told) = (folder.path().join("asked"), folder.path().join("told"));
    let rates =
        [[44_100, 16_000], [48_000, 16_000], [22_050, 16_000], [8_000, 16_000], [16_000, 8_000], [11_025, 16_000]];
    let name = |[from, to]: [u32; 2]| format!("{from}/{to}");
    let wave = |[from, to]: [u32; 2], rate, top| tones([from, from.min(to), rate], top);
    let tensors: Vec<_> =
        rates.iter().map(|&rates| (name(rates), Tensor::from_slice(&wave(rates, rates[0], 0.5)))).collect();
    write(&asked, &tensors)?;
    oracle("fbank.py", &["resample", asked.to_str().expect("UTF-8"), told.to_str().expect("UTF-8")])?;
    let told = read(&told)?;
    let mut resampler = Resampler::default();
    let size = |wave: &[f32]| wave.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let apart = |got: &[f32], wanted: &[f32]| {
        assert_eq!(got.len(), wanted.len());
        size(&got.iter().zip(wanted).map(|(a, b)| a - b).collect::<Vec<_>>()) / size(wanted)
    };
    for rates in rates {
        // Up to half of the band torchaudio's short kernel is good to a thousandth of the signal.
        let wanted = values(&told[&name(rates)]);
        let share = apart(resampler.resample(&wave(rates, rates[0], 0.5), rates)?, &wanted);
        assert!(share <= 2e-3, "{rates:?}: {share} of the signal is another than torchaudio's");
        // And what both are after: the same tones at the other rate.
        for top in [0.5, 0.8] {
            let share = apart(resampler.resample(&wave(rates, rates[0], top), rates)?, &wave(rates, rates[1], top));
            assert!(share <= 1e-5, "{rates:?}: {share} from the tones themselves, up to {top} of the band");
        }
    }
    assert_eq!(resampler.resample(&[0.5; 10], [8000, 8000])?, [0.5; 10], "nothing to do");
    Ok(())
}

/// Views of 32 frames and 16 filters at 8 kHz: 2,680 samples.
pub fn view(seconds: Option<f64>) -> (View, Grid) {
    let sound = Sound { rate: 8000, seconds, mean: -3.0, std: 2.0, raw: false };
    let grid = Grid { frames: 1, rows: 2, cols: 1, channels: 1, patch_frames: 1, patch: 16 };
    (View { sound: Some(sound), ..View::default() }, grid)
}

/// A view's values, and how many of its frames show the sound.
fn shown(make: impl FnOnce(&mut [u8]) -> occlude::fault::Result<u32>) -> Result<(Vec<f32>, u32), Failed> {
    let mut out = vec![0; 4 * 32 * 16];
    let valid = make(&mut out)?;
    Ok((out.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect(), valid))
}

/// The normalised spectrogram of some samples at 8 kHz, without padding.
fn plain(samples: &[f32]) -> Vec<f32> {
    let mut rows = vec![0.0; Frames::at(8000).of(samples.len()) * 16];
    Filterbank::new(8000, 16).log_mel(samples, &mut rows);
    rows.iter().map(|value| (value + 3.0) / 4.0).collect()
}

fn a_view_shows_a_window_of_a_long_sound() -> Outcome {
    let (view, grid) = view(None);
    let samples = values(&normal(4, &[9000]));
    let clip = Clip { rate: 8000, samples: &samples };
    let (middle, valid) = shown(|out| view.eval(&grid, clip, out))?;
    assert_eq!(valid, 32);
    assert!(furthest(&middle, &plain(&samples[3160..5840])) < 1e-3, "evaluation shows the middle");
    let mut starts = Vec::new();
    for (id, epoch) in [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (5, 0)] {
        let (window, valid) = shown(|out| view.train(&grid, clip, 7, id, epoch, 0, out))?;
        assert_eq!(valid, 32);
        assert_eq!(shown(|out| view.train(&grid, clip, 7, id, epoch, 0, out))?.0, window, "the same again");
        let start = (0..=6320).find(|&start| furthest(&window[..16], &plain(&samples[start..start + 200])) < 1e-3);
        let start = start.ok_or("the window is no part of the sound")?;
        assert!(furthest(&window, &plain(&samples[start..start + 2680])) < 1e-3, "one run of samples");
        starts.push(start);
    }
    starts.sort_unstable();
    starts.dedup();
    assert!(starts.len() == 6 && starts[5] - starts[0] > 2000, "windows lie anywhere: {starts:?}");
    Ok(())
}

fn a_short_sound_is_padded() -> Outcome {
    let (whole, grid) = view(None);
    let samples = values(&normal(5, &[1000]));
    let clip = Clip { rate: 8000, samples: &samples };
    // 1 + (1000 - 200) / 80 frames.
    let wanted = plain(&samples);
    assert_eq!(wanted.len(), 11 * 16);
    for make in [0, 1] {
        let (got, valid) = shown(|out| match make {
            0 => whole.train(&grid, clip, 7, 1, 0, 0, out),
            _ => whole.eval(&grid, clip, out),
        })?;
        assert_eq!(valid, 11);
        assert!(furthest(&got[..wanted.len()], &wanted) < 1e-3);
        // (0 − mean) / (2 · deviation), as the reference pads ahead of normalising.
        assert!(got[wanted.len()..].iter().all(|value| *value == 0.75), "{:?}", &got[wanted.len()..][..4]);
    }
    // At another rate it is as long.
    let slow = Clip { rate: 4000, samples: &samples[..500] };
    assert_eq!(shown(|out| whole.eval(&grid, slow, out))?.1, 11);
    // `seconds` shows less than the frames reach over.
    let long = values(&normal(6, &[9000]));
    let (part, grid) = view(Some(0.25));
    let (got, valid) = shown(|out| part.eval(&grid, Clip { rate: 8000, samples: &long }, out))?;
    assert_eq!(valid, 23);
    assert!(furthest(&got[..23 * 16], &plain(&long[3500..5500])) < 1e-3);
    // Less than a frame is no sound.
    let fault = whole.eval(&grid, Clip { rate: 8000, samples: &samples[..199] }, &mut [0; 2048]).expect_err("nothing");
    assert!(fault.code == Code::Corrupt && fault.message.contains("shorter than one frame"), "{fault}");
    Ok(())
}
