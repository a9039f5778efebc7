//! One picture, still or moving, or sound becomes the members of a sample: checked, and where asked for made smaller and encoded anew.

use super::super::clip;
use super::super::decode::{Decoded, Decoder};
use super::super::medium::Medium;
use super::super::shard::VIDEO;
use super::source::{Picture, Source};
use super::voice::Voice;
use super::{Encode, Options};
use crate::fault::{Code, Fault, Result};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType as Scanline, PngEncoder};
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder, ImageFormat};

/// What became of a picture.
pub enum Shaped {
    /// Extensions and bytes, in the order in which they stand in a tar: that of the extensions.
    Members(Vec<(&'static str, Vec<u8>)>),
    /// It is left out, and why.
    Bad(String),
}

/// Shapes pictures one after another; one for each thread.
pub struct Shaper {
    decoder: Decoder,
    resizer: Resizer,
    /// Where sounds are packed.
    voice: Option<Voice>,
    options: Options,
}

impl Shaper {
    pub fn new(options: &Options) -> Shaper {
        let voice = (options.medium == Medium::Sound).then(|| Voice::new(options.rate));
        Shaper { decoder: Decoder::new(options.limits), resizer: Resizer::new(), voice, options: options.clone() }
    }

    /// A picture's sample. Faults only where the place that pictures come from fails.
    pub fn shape(&mut self, source: &Source, picture: &Picture) -> Result<Shaped> {
        let most = self.most_bytes(picture);
        match picture.bytes {
            None => return Ok(Shaped::Bad("there is no such file".into())),
            Some(bytes) if bytes > most as u64 => {
                return Ok(Shaped::Bad(format!("{bytes} bytes, the limit is {most}")));
            }
            Some(_) => {}
        }
        let bytes = match source.read(picture) {
            Ok(bytes) => bytes,
            Err(fault) if matches!(fault.code, Code::Usage | Code::Corrupt) => return Ok(Shaped::Bad(fault.message)),
            Err(fault) => return Err(fault.at(source.name(picture))),
        };
        let encoded = match &mut self.voice {
            Some(voice) => voice.encoded(picture, bytes),
            None => self.encoded(picture, bytes),
        };
        let (extension, bytes) = match encoded {
            Ok(done) => done,
            Err(fault) if fault.code == Code::Corrupt => return Ok(Shaped::Bad(fault.message)),
            Err(fault) => return Err(fault.at(source.name(picture))),
        };
        let mut members = vec![(extension, bytes)];
        members.extend(picture.label.map(|label| ("cls", label.to_string().into_bytes())));
        members.extend(picture.caption.as_ref().map(|caption| ("txt", caption.clone().into_bytes())));
        members.extend(picture.more.as_ref().map(|more| ("json", more.clone().into_bytes())));
        members.sort_by_key(|(extension, _)| *extension);
        Ok(Shaped::Members(members))
    }

    /// The limit on a file's bytes.
    fn most_bytes(&self, picture: &Picture) -> usize {
        let moves = picture.extension.is_some_and(|extension| VIDEO.contains(&extension));
        match &self.voice {
            Some(voice) => voice.most_bytes(),
            None if moves => clip::Limits::default().max_bytes,
            None => self.options.limits.max_bytes,
        }
    }

    /// The picture's bytes and their extension: untouched, but where the options ask for other pixels or another
    /// format.
    fn encoded(&mut self, picture: &Picture, bytes: Vec<u8>) -> Result<(&'static str, Vec<u8>)> {
        let opened = self.decoder.open(&bytes, 3)?;
        if let Some(facts) = opened.video().cloned() {
            let video = &self.options.video;
            return match video.recipe(&facts, &self.options) {
                Some((recipe, extension)) => {
                    let anew = opened.recode(&recipe, video.rate(&facts), self.options.resize)?;
                    Ok((extension, anew))
                }
                None => {
                    drop(opened);
                    Ok((picture.extension.filter(|name| VIDEO.contains(name)).unwrap_or("mp4"), bytes))
                }
            };
        }
        let Options { resize: side, encode: wanted, .. } = self.options;
        let quality = self.options.quality.unwrap_or(Options::QUALITY);
        let size = [opened.width(), opened.height()];
        let format = format(&bytes);
        let smaller = side.and_then(|side| shorter(size, side));
        if smaller.is_none() && wanted.is_none() {
            drop(opened);
            return Ok((picture.extension.unwrap_or(format.extension()), bytes));
        }
        let whole = opened.whole()?;
        let format = wanted.unwrap_or(format);
        let pixels = match smaller {
            None => encode(format, quality, &whole.pixels, size),
            Some(to) => encode(format, quality, &resize(&mut self.resizer, whole, to), to),
        }?;
        Ok((format.extension(), pixels))
    }
}

/// What the bytes of a picture that a decoder opened are.
fn format(bytes: &[u8]) -> Encode {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => Encode::Png,
        Ok(ImageFormat::WebP) => Encode::Webp,
        _ => Encode::Jpeg,
    }
}

/// Width and height with the shorter side brought down to `side`, the longer rounded down as torchvision's `Resize`
/// does; none where it is no longer already.
fn shorter([width, height]: [u32; 2], side: u32) -> Option<[u32; 2]> {
    let longer = |long: u32, short: u32| (u64::from(long) * u64::from(side) / u64::from(short)) as u32;
    match width.min(height) > side {
        false => None,
        true if width <= height => Some([side, longer(height, width)]),
        true => Some([longer(width, height), side]),
    }
}

/// [height, width, 3] → the size `to` [width, height], antialiased: Keys' cubic with a = −0.5, Pillow's `BICUBIC`.
fn resize(resizer: &mut Resizer, image: &Decoded, to: [u32; 2]) -> Vec<u8> {
    let mut out = vec![0; to[0] as usize * to[1] as usize * 3];
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    // The typed face of the resizer: its other one compiles every kernel for sixteen kinds of pixel.
    let from = TypedImageRef::<U8x3>::from_buffer(image.width, image.height, &image.pixels).expect("whole pixels");
    let mut small = TypedImage::<U8x3>::from_buffer(to[0], to[1], &mut out).expect("as many pixels as the size says");
    resizer.resize_typed(&from, &mut small, &options).expect("a picture with pixels");
    out
}

/// [height, width, 3] in a format. A picture without colour is stored in one channel, which decodes to the same.
fn encode(format: Encode, quality: u8, pixels: &[u8], [width, height]: [u32; 2]) -> Result<Vec<u8>> {
    let (triples, _) = pixels.as_chunks::<3>();
    let colourless = triples.iter().all(|[red, green, blue]| red == green && green == blue);
    let grey: Vec<u8>;
    let (pixels, colour) = match colourless {
        true => {
            grey = triples.iter().map(|[value, ..]| *value).collect();
            (&grey[..], ExtendedColorType::L8)
        }
        false => (pixels, ExtendedColorType::Rgb8),
    };
    let mut out = Vec::new();
    let written = match format {
        Encode::Jpeg => JpegEncoder::new_with_quality(&mut out, quality).write_image(pixels, width, height, colour),
        Encode::Png => PngEncoder::new_with_quality(&mut out, CompressionType::Default, Scanline::Adaptive)
            .write_image(pixels, width, height, colour),
        Encode::Webp => WebPEncoder::new_lossless(&mut out).write_image(pixels, width, height, colour),
    };
    written
        .map_err(|error| Fault::new(Code::Corrupt, format!("{width}x{height} pixels cannot be encoded: {error}")))?;
    Ok(out)
}
