//! Pictures that are made to cost too much, or are damaged.

use crate::decode::{photo, pictures};
use crate::heap::counted;
use crate::support::Outcome;
use occlude::data::decode::{Decoder, Limits, Region, decode, probe};
use occlude::fault::Code;
use occlude::rng::{Draw, Purpose};
use std::time::{Duration, Instant};

crate::trials![
    what_costs_too_much_is_refused_by_its_header,
    a_bomb_is_refused_before_it_goes_off,
    scans_without_end_are_refused,
    thousands_of_damaged_files_neither_panic_nor_exceed_the_limits,
    a_steady_stream_of_pictures_asks_for_no_memory,
];

fn what_costs_too_much_is_refused_by_its_header() -> Outcome {
    for (name, bytes) in pictures()?.1 {
        for limits in [
            Limits { max_bytes: bytes.len() - 1, ..Limits::default() },
            Limits { max_side: 86, ..Limits::default() },
            Limits { max_pixels: 87 * 61 - 1, ..Limits::default() },
        ] {
            assert_eq!(decode(&bytes, 3, &limits).expect_err(&name).code, Code::Corrupt);
        }
        let exact = Limits { max_bytes: bytes.len(), max_side: 87, max_pixels: 87 * 61, max_scans: 10 };
        decode(&bytes, 3, &exact).map_err(|fault| fault.at(format!("{name} at its very limits")))?;
    }
    Ok(())
}

/// A chunk of a PNG; its checksum is right.
fn chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [name, data].concat();
    let crc = body.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    });
    [&(data.len() as u32).to_be_bytes()[..], &body, &(!crc).to_be_bytes()].concat()
}

fn a_bomb_is_refused_before_it_goes_off() -> Outcome {
    let signature = b"\x89PNG\r\n\x1a\n".to_vec();
    let header = |side: u32| chunk(b"IHDR", &[&side.to_be_bytes()[..], &side.to_be_bytes(), &[8, 2, 0, 0, 0]].concat());
    let huge = [signature.clone(), header(30_000), chunk(b"IDAT", &[0; 64]), chunk(b"IEND", &[])].concat();
    // 10 × 10 on the outside, 16,383 × 16,383 inside.
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
        let began = Instant::now();
        let (fault, most, _) = counted(|| decode(&bytes, 3, &Limits::default()).expect_err(name));
        assert!(fault.message.contains("pixels, a side may have") || fault.message.contains("the limit is"), "{fault}");
        assert!(most < 1 << 20, "{name} took {most} bytes");
        assert!(began.elapsed() < Duration::from_millis(50), "{name} took {:?}", began.elapsed());
    }
    Ok(())
}

/// `photo`, its last scan written again and again.
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

fn scans_without_end_are_refused() -> Outcome {
    let sound = photo(160, 120, r#"{"quality": 30, "progressive": true}"#)?;
    let limits = Limits { max_scans: 20, ..Limits::default() };
    decode(&sound, 3, &limits)?;
    let fault = probe(&with_scans(&sound, 1000), &limits).expect_err("a thousand scans were taken");
    assert!(fault.message.contains("scans, the limit is 20"), "{fault}");
    assert_eq!(fault.code, Code::Corrupt);
    Ok(())
}

fn thousands_of_damaged_files_neither_panic_nor_exceed_the_limits() -> Outcome {
    let limits = Limits { max_pixels: 1 << 18, ..Limits::default() };
    let mut decoder = Decoder::new(limits);
    let mut decoded = 0;
    let files = pictures()?.1;
    for (number, (name, bytes)) in files.iter().enumerate() {
        let mut draw = Draw::new(1, number as u64, 0, Purpose::Probe, 0);
        for round in 0..150 {
            let mut damaged = bytes.clone();
            // In the header more often than behind it.
            let reach = if round % 2 == 0 { damaged.len() } else { damaged.len().min(700) } as u64;
            for _ in 0..1 + draw.below(4) {
                let at = draw.below(reach) as usize;
                damaged[at] = if draw.below(3) == 0 { 0xFF } else { draw.bits() as u8 };
            }
            let (made, most, _) = counted(|| {
                let picture = decoder.open(&damaged, [1, 3][round % 2])?;
                let (width, height) = (picture.width(), picture.height());
                let region = Region { left: width / 3, top: height / 3, width: width / 3 + 1, height: height / 3 + 1 };
                if round % 3 == 0 { picture.whole().map(|_| ()) } else { picture.region(region, [20, 20]).map(|_| ()) }
            });
            // An error or a picture; either is an answer.
            match made {
                Ok(()) => decoded += 1,
                Err(fault) => assert_eq!(fault.code, Code::Corrupt, "{name}: {fault}"),
            }
            // Besides pixels, a WebP may ask for tables of codes that its size says nothing about.
            assert!(most as u64 <= 16 * limits.max_pixels + (24 << 20), "{name}, round {round}, took {most} bytes");
        }
    }
    // Most damage is noticed; some is not, and pixels come of it.
    assert!(decoded > 50, "{decoded} survived: the damage is too gross to say anything");
    // Nothing of it stays.
    for (name, bytes) in &files {
        assert_eq!(decoder.open(bytes, 3)?.whole()?, &decode(bytes, 3, &limits)?, "{name} after them");
    }
    Ok(())
}

fn a_steady_stream_of_pictures_asks_for_no_memory() -> Outcome {
    let mut files = pictures()?.1;
    files.retain(|(name, _)| name.ends_with(".jpg"));
    files.push(("photo".into(), photo(333, 217, r#"{"quality": 90}"#)?));
    let mut decoder = Decoder::new(Limits::default());
    let mut round = |at: u64| -> occlude::fault::Result<()> {
        for (number, (_, bytes)) in files.iter().enumerate() {
            let mut draw = Draw::new(8, number as u64, at, Purpose::Probe, 0);
            let picture = decoder.open(bytes, [1, 3][number % 2])?;
            let (width, height) = (picture.width(), picture.height());
            let (left, top) = (draw.below(width.into()) as u32, draw.below(height.into()) as u32);
            picture.region(Region { left, top, width: width - left, height: height - top }, [16, 16])?;
        }
        Ok(())
    };
    round(0)?;
    let (made, _, asked) = counted(|| (1..20).try_for_each(&mut round));
    made?;
    assert_eq!(asked, 0, "bytes asked for by {} pictures once the first were seen", 19 * 31);
    Ok(())
}
