//! Pictures become pixels.

use crate::support::{Outcome, oracle};
use libtest_mimic::Failed;
use occlude::data::decode::{Decoded, Decoder, Limits, Picture, Region, decode, probe};
use occlude::fault::Code;
use occlude::rng::{Draw, Purpose};
use std::fs;

crate::trials![
    pixels_are_pillows,
    sixteen_bits_are_scaled,
    a_region_is_cut_from_the_whole_to_the_bit,
    a_region_costs_no_pixels_far_from_it,
    a_scaled_region_has_as_many_pixels_as_asked_for,
    one_decoder_reads_pictures_of_every_kind_in_turn,
    a_cut_picture_is_refused_wherever_it_is_cut,
    unusual_but_sound_files_are_read,
];

/// A folder, and the names and bytes of the pictures in it.
type Pictures = (tempfile::TempDir, Vec<(String, Vec<u8>)>);

/// Every picture of `oracle/pictures.py`: its name and bytes.
pub fn pictures() -> Result<Pictures, Failed> {
    let folder = tempfile::tempdir()?;
    oracle("pictures.py", &["write", folder.path().to_str().expect("UTF-8")])?;
    let mut files = Vec::new();
    for entry in fs::read_dir(folder.path())? {
        let entry = entry?;
        files.push((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?));
    }
    files.sort();
    assert_eq!(files.len(), 36);
    Ok((folder, files))
}

/// A JPEG with a photograph's spectrum; `options` of Pillow's encoder.
pub fn photo(width: u32, height: u32, options: &str) -> Result<Vec<u8>, Failed> {
    let file = tempfile::Builder::new().suffix(".jpg").tempfile()?;
    let path = file.path().to_str().expect("UTF-8");
    oracle("pictures.py", &["photo", path, &width.to_string(), &height.to_string(), options])?;
    Ok(fs::read(file.path())?)
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
            let lies = ["-5.", "-6.", "-7.", "-8."].iter().any(|turn| name.contains(turn));
            let wanted = if lies { (61, 87) } else { (87, 61) };
            assert_eq!((ours.width, ours.height), wanted, "{name}");
            assert_eq!(probe(bytes, &Limits::default())?, wanted, "{name}, by its header");
            let off = ours.pixels.iter().zip(theirs).filter(|(a, b)| a != b).count();
            assert_eq!(off, 0, "values of {name} to {mode} that differ");
        }
        assert!(rest.is_empty(), "pictures of other sizes");
    }
    Ok(())
}

fn sixteen_bits_are_scaled() -> Outcome {
    let (width, height) = (40_u32, 30_u32);
    for (kind, samples) in [
        (image::ExtendedColorType::L16, 1),
        (image::ExtendedColorType::La16, 2),
        (image::ExtendedColorType::Rgb16, 3),
        (image::ExtendedColorType::Rgba16, 4),
    ] {
        let values: Vec<u16> = (0..width * height * samples).map(|at| (at * 14_321 % 65_536) as u16).collect();
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let mut png = std::io::Cursor::new(Vec::new());
        image::write_buffer_with_format(&mut png, &raw, width, height, kind, image::ImageFormat::Png)?;
        let ours = decode(png.get_ref(), 3, &Limits::default())?;
        for (pixel, ours) in values.chunks(samples as usize).zip(ours.pixels.chunks(3)) {
            for (channel, &ours) in ours.iter().enumerate() {
                let exact = f64::from(pixel[if samples < 3 { 0 } else { channel }]) / 257.0;
                assert!((f64::from(ours) - exact).abs() <= 0.5, "{exact} became {ours} in {kind:?}");
            }
        }
    }
    Ok(())
}

/// A box of a picture of this size: often at its edge, sometimes all of it, sometimes a pixel.
fn some_region(width: u32, height: u32, draw: &mut Draw) -> Region {
    let mut side = |all: u32| match draw.below(6) {
        0 => (0, all),
        1 => (0, 1 + draw.below(all.into()) as u32),
        2 => (draw.below(all.into()) as u32, 1),
        _ => {
            let from = draw.below(all.into()) as u32;
            (from, 1 + draw.below(u64::from(all - from)) as u32)
        }
    };
    let ((left, width), (top, height)) = (side(width), side(height));
    Region { left, top, width, height }
}

/// The rows of a region.
fn rows(image: &Decoded, region: Region) -> Vec<&[u8]> {
    let pixel = image.channels as usize;
    let row = |y: u32| {
        let from = (y * image.width + region.left) as usize * pixel;
        &image.pixels[from..from + region.width as usize * pixel]
    };
    (region.top..region.top + region.height).map(row).collect()
}

fn a_region_is_cut_from_the_whole_to_the_bit() -> Outcome {
    let mut files = pictures()?.1;
    for (name, options) in [
        ("photo-420", r#"{"quality": 90}"#),
        ("photo-422", r#"{"quality": 90, "subsampling": "4:2:2"}"#),
        ("photo-444", r#"{"quality": 90, "subsampling": "4:4:4"}"#),
        ("photo-progressive", r#"{"quality": 75, "progressive": true}"#),
    ] {
        files.push((name.into(), photo(333, 217, options)?));
    }
    let mut decoder = Decoder::new(Limits::default());
    let mut draw = Draw::new(3, 1, 4, Purpose::Probe, 0);
    for (name, bytes) in &files {
        for channels in [1, 3] {
            let whole = decode(bytes, channels, &Limits::default())?;
            for _ in 0..60 {
                let region = some_region(whole.width, whole.height, &mut draw);
                let picture = decoder.open(bytes, channels)?;
                let part = picture.region(region, [region.width, region.height])?;
                let place = [part.left, part.top, part.width, part.height];
                let [left, top, width, height] = place.map(|value| value as u32);
                assert_eq!([width, height], [region.width, region.height], "{name}");
                assert_eq!([left, top, width, height].map(f64::from), place, "{name}: whole pixels");
                let ours = rows(part.image, Region { left, top, width, height });
                assert_eq!(ours, rows(&whole, region), "{name}: {region:?} differs from the whole's");
            }
        }
    }
    Ok(())
}

fn a_region_costs_no_pixels_far_from_it() -> Outcome {
    let bytes = photo(500, 375, r#"{"quality": 90}"#)?;
    let mut decoder = Decoder::new(Limits::default());
    let region = Region { left: 201, top: 150, width: 100, height: 80 };
    let part = decoder.open(&bytes, 3)?.region(region, [100, 80])?;
    // A unit of 16 to the left and above, two pixels to the right.
    assert!(part.image.width <= 100 + 18 + 2 && part.image.height <= 80 + 16, "{part:?}");
    Ok(())
}

fn a_scaled_region_has_as_many_pixels_as_asked_for() -> Outcome {
    let bytes = photo(601, 403, r#"{"quality": 90}"#)?;
    let mut decoder = Decoder::new(Limits::default());
    let mut draw = Draw::new(3, 1, 5, Purpose::Probe, 0);
    for _ in 0..200 {
        let region = some_region(601, 403, &mut draw);
        let least = [1 + draw.below(100) as u32, 1 + draw.below(100) as u32];
        let part = decoder.open(&bytes, 3)?.region(region, least)?;
        let scale = f64::from(region.width) / part.width;
        assert!([1.0, 2.0, 4.0, 8.0].contains(&scale), "{scale}");
        assert_eq!(f64::from(region.height) / part.height, scale);
        let enough = |scale: u32| region.width / scale >= least[0] && region.height / scale >= least[1];
        assert!(scale == 1.0 || enough(scale as u32), "{region:?} at 1/{scale} for {least:?}");
        assert!(scale == 8.0 || !enough(2 * scale as u32), "{region:?} only at 1/{scale} for {least:?}");
        assert!(part.left >= 0.0 && part.left + part.width <= f64::from(part.image.width), "{part:?}");
        assert!(part.top >= 0.0 && part.top + part.height <= f64::from(part.image.height), "{part:?}");
    }
    Ok(())
}

fn one_decoder_reads_pictures_of_every_kind_in_turn() -> Outcome {
    let files = pictures()?.1;
    let mut decoder = Decoder::new(Limits::default());
    let region = Region { left: 10, top: 20, width: 30, height: 25 };
    for (at, (name, bytes)) in files.iter().enumerate() {
        // What came before, a cut, a scale, other channels, a fault, leaves nothing behind.
        let other = &files[(at * 7 + 3) % files.len()].1;
        decoder.open(other, 1)?.region(region, [15, 10])?;
        assert!(decoder.open(&other[..other.len() / 2], 3).and_then(Picture::whole).is_err());
        assert_eq!(decoder.open(bytes, 3)?.whole()?, &decode(bytes, 3, &Limits::default())?, "{name}");
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
        // A scan that ends early, its end marked all the same. (A progressive file may lawfully lack its last scans.)
        if name.ends_with(".jpg") && !name.contains("progressive") {
            let short = [&bytes[..bytes.len() * 3 / 4], &[0xFF, 0xD9]].concat();
            assert!(decode(&short, 3, &Limits::default()).is_err(), "three quarters of {name} passed");
        }
    }
    Ok(())
}

fn unusual_but_sound_files_are_read() -> Outcome {
    let sound = photo(60, 40, r#"{"quality": 90}"#)?;
    let whole = decode(&sound, 3, &Limits::default())?;
    let (body, end) = sound.split_at(sound.len() - 2);
    // Bytes that belong to nothing, before the end and after it; a version of JFIF that does not exist.
    let padded = [body, &[0, 0, 7], end].concat();
    let trailed = [&sound[..], b"\0\0trailer"].concat();
    let mut future = sound.clone();
    assert_eq!(&future[6..11], b"JFIF\0");
    future[11] = 9;
    for (what, bytes) in [("padded", padded), ("trailed", trailed), ("of the future", future)] {
        let ours = decode(&bytes, 3, &Limits::default()).map_err(|fault| fault.at(what))?;
        assert!(ours == whole, "a file that is {what} has other pixels");
    }
    Ok(())
}
