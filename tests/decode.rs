//! Pictures become pixels.

use crate::support::{Outcome, oracle};
use occlude::data::decode::{Limits, decode, probe};
use occlude::fault::Code;
use std::fs;

crate::trials![
    pixels_are_pillows,
    a_cut_picture_is_refused_wherever_it_is_cut,
    what_costs_too_much_is_refused_by_its_header,
    damaged_bytes_never_panic,
];

/// A folder, and the names and bytes of the pictures in it.
type Pictures = (tempfile::TempDir, Vec<(String, Vec<u8>)>);

/// Every picture of `oracle/pictures.py`: its name and bytes.
fn pictures() -> Result<Pictures, libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    oracle("pictures.py", &["write", folder.path().to_str().expect("UTF-8")])?;
    let mut files = Vec::new();
    for entry in fs::read_dir(folder.path())? {
        let entry = entry?;
        files.push((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?));
    }
    files.sort();
    assert_eq!(files.len(), 11);
    Ok((folder, files))
}

fn pixels_are_pillows() -> Outcome {
    let (folder, files) = pictures()?;
    let paths: Vec<String> = files.iter().map(|(name, _)| folder.path().join(name).display().to_string()).collect();
    let out = folder.path().join("out.raw").display().to_string();
    for (channels, mode) in [(3, "RGB"), (1, "L")] {
        let arguments = [&["decode", &out, mode][..], &paths.iter().map(String::as_str).collect::<Vec<_>>()].concat();
        oracle("pictures.py", &arguments)?;
        let mut rest = &fs::read(&out)?[..];
        for (name, bytes) in &files {
            let ours = decode(bytes, channels, &Limits::default())?;
            let theirs;
            (theirs, rest) = rest.split_at(ours.pixels.len());
            let wanted = if name == "turned.jpg" { (61, 87) } else { (87, 61) };
            assert_eq!((ours.width, ours.height), wanted, "{name}");
            let differences = ours.pixels.iter().zip(theirs).map(|(&a, &b)| u32::from(a.abs_diff(b)));
            let (most, sum) = differences.fold((0, 0), |(most, sum), d| (most.max(d), sum + d));
            let mean = f64::from(sum) / theirs.len() as f64;
            // JPEG decoders round differently; measured: mean 0.016, at most 3. PNG and WebP are exact.
            let (most_allowed, mean_allowed) = if name.ends_with(".jpg") { (4, 0.05) } else { (0, 0.0) };
            assert!(most <= most_allowed && mean <= mean_allowed, "{name} to {mode}: max {most}, mean {mean:.3}");
        }
        assert!(rest.is_empty(), "pictures of other sizes");
    }
    Ok(())
}

fn a_cut_picture_is_refused_wherever_it_is_cut() -> Outcome {
    for (name, bytes) in pictures()?.1 {
        probe(&bytes, &Limits::default()).map_err(|fault| fault.at(&name))?;
        for share in [0.05, 0.3, 0.5, 0.9, 0.99] {
            let cut = &bytes[..(bytes.len() as f64 * share) as usize];
            let fault = decode(cut, 3, &Limits::default()).expect_err(&format!("{share} of {name} was decoded"));
            assert_eq!(fault.code, Code::Corrupt, "{name}: {fault}");
        }
        let last = &bytes[..bytes.len() - 1];
        assert!(probe(last, &Limits::default()).is_err(), "{name} without its last byte was taken for whole");
    }
    Ok(())
}

fn what_costs_too_much_is_refused_by_its_header() -> Outcome {
    for (name, bytes) in pictures()?.1 {
        for limits in [
            Limits { max_bytes: bytes.len() - 1, ..Limits::default() },
            Limits { max_side: 86, ..Limits::default() },
            Limits { max_pixels: 87 * 61 - 1, ..Limits::default() },
        ] {
            assert_eq!(decode(&bytes, 3, &limits).expect_err(&name).code, Code::Corrupt);
        }
        let exact = Limits { max_bytes: bytes.len(), max_side: 87, max_pixels: 87 * 61 };
        assert!(decode(&bytes, 3, &exact).is_ok(), "{name} at its very limits");
    }
    Ok(())
}

fn damaged_bytes_never_panic() -> Outcome {
    let limits = Limits { max_pixels: 1 << 20, ..Limits::default() };
    for (_, bytes) in pictures()?.1 {
        let mut draw = occlude::rng::Draw::new(1, 0, 0, occlude::rng::Purpose::Probe, 0);
        for _ in 0..60 {
            let mut damaged = bytes.clone();
            for _ in 0..3 {
                let at = draw.below(damaged.len() as u64) as usize;
                damaged[at] = draw.bits() as u8;
            }
            // An error or a picture; either is an answer.
            let _ = decode(&damaged, 3, &limits);
        }
    }
    Ok(())
}
