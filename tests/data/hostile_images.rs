//! Tests of images that are made to be costly, or are damaged.

use crate::data::decode::{image_files, photo};
use crate::support::Outcome;
use crate::support::allocations::count_allocations;
use occlude::data::decode::{ImageLimits, Region, VisualDecoder, decode, probe};
use occlude::error::ExitCode;
use occlude::rng::{Philox, Purpose};
use std::time::{Duration, Instant};

crate::trials![
    costly_images_are_rejected_by_their_header,
    a_decompression_bomb_is_rejected_before_decoding,
    endless_progressive_scans_are_rejected,
    thousands_of_damaged_files_neither_panic_nor_exceed_the_limits,
    decoding_a_stream_of_images_allocates_nothing,
];

fn costly_images_are_rejected_by_their_header() -> Outcome {
    for (name, bytes) in image_files()?.1 {
        for limits in [
            ImageLimits { max_bytes: bytes.len() - 1, ..ImageLimits::default() },
            ImageLimits { max_side: 86, ..ImageLimits::default() },
            ImageLimits { max_pixels: 87 * 61 - 1, ..ImageLimits::default() },
        ] {
            assert_eq!(decode(&bytes, 3, &limits).expect_err(&name).code, ExitCode::Corrupt);
        }
        let exact = ImageLimits { max_bytes: bytes.len(), max_side: 87, max_pixels: 87 * 61, max_scans: 10 };
        decode(&bytes, 3, &exact).map_err(|error| error.with_context(format!("{name} at its very limits")))?;
    }
    Ok(())
}

/// Returns a PNG chunk with a valid checksum.
fn chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [name, data].concat();
    let crc = body.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    });
    [&(data.len() as u32).to_be_bytes()[..], &body, &(!crc).to_be_bytes()].concat()
}

fn a_decompression_bomb_is_rejected_before_decoding() -> Outcome {
    let signature = b"\x89PNG\r\n\x1a\n".to_vec();
    let header = |side: u32| chunk(b"IHDR", &[&side.to_be_bytes()[..], &side.to_be_bytes(), &[8, 2, 0, 0, 0]].concat());
    let huge = [signature.clone(), header(30_000), chunk(b"IDAT", &[0; 64]), chunk(b"IEND", &[])].concat();
    // 10 × 10 in the container, 16,383 × 16,383 in the image.
    let mut inside = vec![0x50, 0x42, 0x00, 0x9D, 0x01, 0x2A];
    inside.extend([0xFF, 0x3F, 0xFF, 0x3F]);
    inside.extend([0; 200]);
    let riff = |chunks: &[(&[u8], &[u8])]| {
        let mut body = b"WEBP".to_vec();
        for (name, data) in chunks {
            body.extend([*name, &(data.len() as u32).to_le_bytes(), data].concat());
        }
        [b"RIFF", &(body.len() as u32).to_le_bytes()[..], &body].concat()
    };
    let small = [0, 0, 0, 0, 9, 0, 0, 9, 0, 0];
    let webp = riff(&[(b"VP8X", &small), (b"VP8 ", &inside)]);
    let mut jpeg = photo(64, 64, r#"{"quality": 90}"#)?;
    let sof = jpeg.windows(2).position(|two| two == [0xFF, 0xC0]).expect("a frame header");
    jpeg[sof + 5..sof + 9].copy_from_slice(&[0x75, 0x30, 0x75, 0x30]);
    for (name, bytes) in [("PNG", huge), ("WebP", webp), ("JPEG", jpeg)] {
        let start = Instant::now();
        let (error, max, _) = count_allocations(|| decode(&bytes, 3, &ImageLimits::default()).expect_err(name));
        assert!(error.message.contains("pixels, a side may have") || error.message.contains("the limit is"), "{error}");
        assert!(max < 1 << 20, "{name} took {max} bytes");
        assert!(start.elapsed() < Duration::from_millis(50), "{name} took {:?}", start.elapsed());
    }
    Ok(())
}

/// Returns `photo` with its last scan repeated.
fn with_scans(jpeg: &[u8], more: usize) -> Vec<u8> {
    let last = jpeg.windows(2).rposition(|two| two == [0xFF, 0xDA]).expect("a scan");
    let (body, end) = jpeg.split_at(jpeg.len() - 2);
    let mut out = body.to_vec();
    for _ in 0..more {
        out.extend(&body[last..]);
    }
    out.extend(end);
    out
}

fn endless_progressive_scans_are_rejected() -> Outcome {
    let audio = photo(160, 120, r#"{"quality": 30, "progressive": true}"#)?;
    let limits = ImageLimits { max_scans: 20, ..ImageLimits::default() };
    decode(&audio, 3, &limits)?;
    let error = probe(&with_scans(&audio, 1000), &limits).expect_err("a thousand scans were accepted");
    assert!(error.message.contains("scans, the limit is 20"), "{error}");
    assert_eq!(error.code, ExitCode::Corrupt);
    Ok(())
}

fn thousands_of_damaged_files_neither_panic_nor_exceed_the_limits() -> Outcome {
    let limits = ImageLimits { max_pixels: 1 << 18, ..ImageLimits::default() };
    let mut decoder = VisualDecoder::new(limits);
    let mut decoded = 0;
    let files = image_files()?.1;
    for (number, (name, bytes)) in files.iter().enumerate() {
        let mut draw = Philox::new(1, number as u64, 0, Purpose::Probe, 0);
        for round in 0..150 {
            let mut damaged = bytes.clone();
            // In the header more often than after it.
            let reach = if round % 2 == 0 { damaged.len() } else { damaged.len().min(700) } as u64;
            for _ in 0..1 + draw.uniform_int(4) {
                let at = draw.uniform_int(reach) as usize;
                damaged[at] = if draw.uniform_int(3) == 0 { 0xFF } else { draw.next_u32() as u8 };
            }
            let (output, max, _) = count_allocations(|| {
                let image = decoder.open(&damaged, [1, 3][round % 2])?;
                let width = image.width();
                let height = image.height();
                let region = Region { left: width / 3, top: height / 3, width: width / 3 + 1, height: height / 3 + 1 };
                if round % 3 == 0 {
                    image.decode_full().map(|_| ())
                } else {
                    image.decode_region(region, [20, 20]).map(|_| ())
                }
            });
            // An error or an image; both are acceptable.
            match output {
                Ok(()) => decoded += 1,
                Err(error) => assert_eq!(error.code, ExitCode::Corrupt, "{name}: {error}"),
            }
            // Besides pixels, a WebP may ask for code tables that are independent of its size.
            assert!(max as u64 <= 16 * limits.max_pixels + (24 << 20), "{name}, round {round}, took {max} bytes");
        }
    }
    // Most damage is detected; some is not and yields pixels.
    assert!(decoded > 50, "only {decoded} images decoded: the damage is too severe for this test");
    // Nothing of it stays in memory.
    for (name, bytes) in &files {
        assert_eq!(decoder.open(bytes, 3)?.decode_full()?, &decode(bytes, 3, &limits)?, "{name} after them");
    }
    Ok(())
}

fn decoding_a_stream_of_images_allocates_nothing() -> Outcome {
    let mut files = image_files()?.1;
    files.retain(|(name, _)| name.ends_with(".jpg"));
    files.push(("photo".into(), photo(333, 217, r#"{"quality": 90}"#)?));
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let mut round = |at: u64| -> occlude::error::Result<()> {
        for (number, (_, bytes)) in files.iter().enumerate() {
            let mut draw = Philox::new(8, number as u64, at, Purpose::Probe, 0);
            let image = decoder.open(bytes, [1, 3][number % 2])?;
            let width = image.width();
            let height = image.height();
            let left = draw.uniform_int(width.into()) as u32;
            let top = draw.uniform_int(height.into()) as u32;
            image.decode_region(Region { left, top, width: width - left, height: height - top }, [16, 16])?;
        }
        Ok(())
    };
    round(0)?;
    let (output, _, request) = count_allocations(|| (1..20).try_for_each(&mut round));
    output?;
    assert_eq!(request, 0, "bytes allocated by {} images after the first ones", 19 * 31);
    Ok(())
}
