//! Tests of image decoding.

use crate::support::{Outcome, oracle};
use libtest_mimic::Failed;
use occlude::data::decode::{DecodedImage, ImageLimits, LazyImage, Region, VisualDecoder, decode, probe};
use occlude::error::ExitCode;
use occlude::rng::{Philox, Purpose};
use std::fs;

crate::trials![
    decoded_pixels_match_pillow,
    sixteen_bit_images_are_scaled,
    a_region_equals_a_crop_of_the_whole_image,
    a_region_decodes_only_nearby_pixels,
    a_scaled_region_has_the_requested_size,
    one_decoder_reads_every_format_in_turn,
    a_truncated_image_is_rejected_at_any_length,
    unusual_but_valid_files_are_read,
];

/// A folder, and the names and bytes of the images in it.
type Pictures = (tempfile::TempDir, Vec<(String, Vec<u8>)>);

/// Returns name and bytes of every image of `oracle/images.py`.
pub fn image_files() -> Result<Pictures, Failed> {
    let folder = tempfile::tempdir()?;
    oracle("images.py", &["write", folder.path().to_str().expect("UTF-8")])?;
    let mut files = Vec::new();
    for entry in fs::read_dir(folder.path())? {
        let entry = entry?;
        files.push((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?));
    }
    files.sort();
    assert_eq!(files.len(), 36);
    Ok((folder, files))
}

/// Returns a JPEG with the spectrum of a photograph; `options` go to the encoder of Pillow.
pub fn photo(width: u32, height: u32, options: &str) -> Result<Vec<u8>, Failed> {
    let file = tempfile::Builder::new().suffix(".jpg").tempfile()?;
    let path = file.path().to_str().expect("UTF-8");
    oracle("images.py", &["photo", path, &width.to_string(), &height.to_string(), options])?;
    Ok(fs::read(file.path())?)
}

fn decoded_pixels_match_pillow() -> Outcome {
    let (folder, files) = image_files()?;
    let paths: Vec<String> = files.iter().map(|(name, _)| folder.path().join(name).display().to_string()).collect();
    let out = folder.path().join("out.raw").display().to_string();
    for (channels, mode) in [(3, "RGB"), (1, "L")] {
        let arguments = [&["decode", &out, mode][..], &paths.iter().map(String::as_str).collect::<Vec<_>>()].concat();
        oracle("images.py", &arguments)?;
        let mut rest = &fs::read(&out)?[..];
        for (name, bytes) in &files {
            let ours = decode(bytes, channels, &ImageLimits::default())?;
            let reference;
            (reference, rest) = rest.split_at(ours.pixels.len());
            let lies = ["-5.", "-6.", "-7.", "-8."].iter().any(|round| name.contains(round));
            let expected = if lies { (61, 87) } else { (87, 61) };
            assert_eq!((ours.width, ours.height), expected, "{name}");
            assert_eq!(probe(bytes, &ImageLimits::default())?, expected, "{name}, by its header");
            let difference = ours.pixels.iter().zip(reference).filter(|(a, b)| a != b).count();
            assert_eq!(difference, 0, "values of {name} to {mode} that differ");
        }
        assert!(rest.is_empty(), "the sizes of the images differ");
    }
    Ok(())
}

fn sixteen_bit_images_are_scaled() -> Outcome {
    let width = 40_u32;
    let height = 30_u32;
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
        let ours = decode(png.get_ref(), 3, &ImageLimits::default())?;
        for (pixel, ours) in values.chunks(samples as usize).zip(ours.pixels.chunks(3)) {
            for (channel, &ours) in ours.iter().enumerate() {
                let exact = f64::from(pixel[if samples < 3 { 0 } else { channel }]) / 257.0;
                assert!((f64::from(ours) - exact).abs() <= 0.5, "{exact} became {ours} in {kind:?}");
            }
        }
    }
    Ok(())
}

/// Returns a region of an image of this size: often at its edge, sometimes the whole image, sometimes one pixel.
fn random_region(width: u32, height: u32, draw: &mut Philox) -> Region {
    let mut side = |all: u32| match draw.uniform_int(6) {
        0 => (0, all),
        1 => (0, 1 + draw.uniform_int(all.into()) as u32),
        2 => (draw.uniform_int(all.into()) as u32, 1),
        _ => {
            let from = draw.uniform_int(all.into()) as u32;
            (from, 1 + draw.uniform_int(u64::from(all - from)) as u32)
        }
    };
    let (left, width) = side(width);
    let (top, height) = side(height);
    Region { left, top, width, height }
}

/// Returns the rows of a region.
fn rows(image: &DecodedImage, region: Region) -> Vec<&[u8]> {
    let pixel = image.channels as usize;
    let row = |y: u32| {
        let from = (y * image.width + region.left) as usize * pixel;
        &image.pixels[from..from + region.width as usize * pixel]
    };
    (region.top..region.top + region.height).map(row).collect()
}

fn a_region_equals_a_crop_of_the_whole_image() -> Outcome {
    let mut files = image_files()?.1;
    for (name, options) in [
        ("photo-420", r#"{"quality": 90}"#),
        ("photo-422", r#"{"quality": 90, "subsampling": "4:2:2"}"#),
        ("photo-444", r#"{"quality": 90, "subsampling": "4:4:4"}"#),
        ("photo-progressive", r#"{"quality": 75, "progressive": true}"#),
    ] {
        files.push((name.into(), photo(333, 217, options)?));
    }
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let mut draw = Philox::new(3, 1, 4, Purpose::Probe, 0);
    for (name, bytes) in &files {
        for channels in [1, 3] {
            let full = decode(bytes, channels, &ImageLimits::default())?;
            for _ in 0..60 {
                let region = random_region(full.width, full.height, &mut draw);
                let image = decoder.open(bytes, channels)?;
                let part = image.decode_region(region, [region.width, region.height])?;
                let bounds = [part.left, part.top, part.width, part.height];
                let [left, top, width, height] = bounds.map(|value| value as u32);
                assert_eq!([width, height], [region.width, region.height], "{name}");
                assert_eq!([left, top, width, height].map(f64::from), bounds, "{name}: whole pixels");
                let ours = rows(part.image, Region { left, top, width, height });
                assert_eq!(ours, rows(&full, region), "{name}: {region:?} differs from the crop of the image");
            }
        }
    }
    Ok(())
}

fn a_region_decodes_only_nearby_pixels() -> Outcome {
    let bytes = photo(500, 375, r#"{"quality": 90}"#)?;
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let region = Region { left: 201, top: 150, width: 100, height: 80 };
    let part = decoder.open(&bytes, 3)?.decode_region(region, [100, 80])?;
    // One block of 16 to the left and above, two pixels to the right.
    assert!(part.image.width <= 100 + 18 + 2 && part.image.height <= 80 + 16, "{part:?}");
    Ok(())
}

fn a_scaled_region_has_the_requested_size() -> Outcome {
    let bytes = photo(601, 403, r#"{"quality": 90}"#)?;
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let mut draw = Philox::new(3, 1, 5, Purpose::Probe, 0);
    for _ in 0..200 {
        let region = random_region(601, 403, &mut draw);
        let min = [1 + draw.uniform_int(100) as u32, 1 + draw.uniform_int(100) as u32];
        let part = decoder.open(&bytes, 3)?.decode_region(region, min)?;
        let scale = f64::from(region.width) / part.width;
        assert!([1.0, 2.0, 4.0, 8.0].contains(&scale), "{scale}");
        assert_eq!(f64::from(region.height) / part.height, scale);
        let enough = |scale: u32| region.width / scale >= min[0] && region.height / scale >= min[1];
        assert!(scale == 1.0 || enough(scale as u32), "{region:?} at 1/{scale} for {min:?}");
        assert!(scale == 8.0 || !enough(2 * scale as u32), "{region:?} only at 1/{scale} for {min:?}");
        assert!(part.left >= 0.0 && part.left + part.width <= f64::from(part.image.width), "{part:?}");
        assert!(part.top >= 0.0 && part.top + part.height <= f64::from(part.image.height), "{part:?}");
    }
    Ok(())
}

fn one_decoder_reads_every_format_in_turn() -> Outcome {
    let files = image_files()?.1;
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let region = Region { left: 10, top: 20, width: 30, height: 25 };
    for (at, (name, bytes)) in files.iter().enumerate() {
        // Earlier images, regions, scales, channel counts and errors leave no trace in the decoder.
        let other = &files[(at * 7 + 3) % files.len()].1;
        decoder.open(other, 1)?.decode_region(region, [15, 10])?;
        assert!(decoder.open(&other[..other.len() / 2], 3).and_then(LazyImage::decode_full).is_err());
        assert_eq!(decoder.open(bytes, 3)?.decode_full()?, &decode(bytes, 3, &ImageLimits::default())?, "{name}");
    }
    Ok(())
}

fn a_truncated_image_is_rejected_at_any_length() -> Outcome {
    for (name, bytes) in image_files()?.1 {
        probe(&bytes, &ImageLimits::default()).map_err(|error| error.with_context(&name))?;
        for fraction in [0.05, 0.3, 0.5, 0.9, 0.99] {
            let cut = &bytes[..(bytes.len() as f64 * fraction) as usize];
            let error =
                decode(cut, 3, &ImageLimits::default()).expect_err(&format!("{fraction} of {name} was decoded"));
            assert_eq!(error.code, ExitCode::Corrupt, "{name}: {error}");
        }
        let last = &bytes[..bytes.len() - 1];
        assert!(probe(last, &ImageLimits::default()).is_err(), "{name} was accepted without its last byte");
        // A scan that ends early, with an intact end marker. (A progressive file may validly lack its last scans.)
        if name.ends_with(".jpg") && !name.contains("progressive") {
            let short = [&bytes[..bytes.len() * 3 / 4], &[0xFF, 0xD9]].concat();
            assert!(decode(&short, 3, &ImageLimits::default()).is_err(), "three quarters of {name} were accepted");
        }
    }
    Ok(())
}

fn unusual_but_valid_files_are_read() -> Outcome {
    let audio = photo(60, 40, r#"{"quality": 90}"#)?;
    let full = decode(&audio, 3, &ImageLimits::default())?;
    let (body, end) = audio.split_at(audio.len() - 2);
    // Unknown bytes before and after the end marker; a version of JFIF that does not exist.
    let padded = [body, &[0, 0, 7], end].concat();
    let trailed = [&audio[..], b"\0\0trailer"].concat();
    let mut future = audio.clone();
    assert_eq!(&future[6..11], b"JFIF\0");
    future[11] = 9;
    for (label, bytes) in [("padded", padded), ("trailed", trailed), ("of the future", future)] {
        let ours = decode(&bytes, 3, &ImageLimits::default()).map_err(|error| error.with_context(label))?;
        assert!(ours == full, "a file that is {label} has other pixels");
    }
    Ok(())
}
