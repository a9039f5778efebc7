//! Makes the members of a sample from its file: checks it, and resizes and encodes it on request.

use super::super::decode::{DecodedImage, LazyImage, VisualDecoder};
use super::super::modality::Modality;
use super::super::shard::VIDEO_EXTENSIONS;
use super::super::video::VideoLimits;
use super::audio::AudioPacker;
use super::source::{PackSource, SourceSample};
use super::{ImageEncoding, PackOptions};
use crate::error::{Error, ExitCode, Result};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType as PngFilter, PngEncoder};
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder, ImageFormat};

/// A sample ready for a shard, or the reason why it is skipped.
pub enum PackedSample {
    /// Extensions and bytes, sorted by extension.
    Members(Vec<(&'static str, Vec<u8>)>),
    Skipped(String),
}

/// A transcoder of samples; one per thread.
pub struct Transcoder {
    decoder: VisualDecoder,
    resizer: Resizer,
    /// Set where audio is packed.
    audio: Option<AudioPacker>,
    options: PackOptions,
}

impl Transcoder {
    /// Makes a transcoder.
    pub fn new(options: &PackOptions) -> Transcoder {
        Transcoder {
            decoder: VisualDecoder::new(options.limits),
            resizer: Resizer::new(),
            audio: (options.modality == Modality::Audio).then(|| AudioPacker::new(options.sample_rate)),
            options: options.clone(),
        }
    }

    /// Makes the members of a sample.
    ///
    /// # Errors
    /// Only where the source fails; an unreadable sample is [`PackedSample::Skipped`].
    pub fn transcode(&mut self, source: &PackSource, sample: &SourceSample) -> Result<PackedSample> {
        let max_bytes = self.max_bytes(sample);
        match sample.bytes {
            None => return Ok(PackedSample::Skipped("there is no such file".into())),
            Some(bytes) if bytes > max_bytes as u64 => {
                return Ok(PackedSample::Skipped(format!("{bytes} bytes, the limit is {max_bytes}")));
            }
            Some(_) => {}
        }
        let bytes = match source.read(sample) {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.code, ExitCode::Usage | ExitCode::Corrupt) => {
                return Ok(PackedSample::Skipped(error.message));
            }
            Err(error) => return Err(error.with_context(source.name(sample))),
        };
        let encoded = match &mut self.audio {
            Some(audio) => audio.encode(sample, bytes),
            None => self.encode_visual(sample, bytes),
        };
        let (extension, bytes) = match encoded {
            Ok(encoded) => encoded,
            Err(error) if error.code == ExitCode::Corrupt => return Ok(PackedSample::Skipped(error.message)),
            Err(error) => return Err(error.with_context(source.name(sample))),
        };
        let mut members = vec![(extension, bytes)];
        members.extend(sample.label.map(|label| ("cls", label.to_string().into_bytes())));
        members.extend(sample.caption.as_ref().map(|caption| ("txt", caption.clone().into_bytes())));
        members.extend(sample.metadata.as_ref().map(|metadata| ("json", metadata.clone().into_bytes())));
        members.sort_by_key(|(extension, _)| *extension);
        Ok(PackedSample::Members(members))
    }

    fn max_bytes(&self, sample: &SourceSample) -> usize {
        let is_video = sample.extension.is_some_and(|extension| VIDEO_EXTENSIONS.contains(&extension));
        match &self.audio {
            Some(audio) => audio.max_bytes(),
            None if is_video => VideoLimits::default().max_bytes,
            None => self.options.limits.max_bytes,
        }
    }

    /// Returns the extension and bytes of an image's or video's member: unchanged, unless the options ask for another
    /// size or format.
    fn encode_visual(&mut self, sample: &SourceSample, bytes: Vec<u8>) -> Result<(&'static str, Vec<u8>)> {
        let image = self.decoder.open(&bytes, 3)?;
        if image.video_info().is_some() {
            let encoded = encode_video(image, &self.options)?;
            let extension = sample.extension.filter(|extension| VIDEO_EXTENSIONS.contains(extension));
            return Ok(encoded.unwrap_or((extension.unwrap_or("mp4"), bytes)));
        }
        let size = [image.width(), image.height()];
        let source_format = detect_format(&bytes);
        let resized = self.options.resize.and_then(|side| resized_size(size, side));
        if resized.is_none() && self.options.encode.is_none() {
            drop(image);
            return Ok((sample.extension.unwrap_or(source_format.extension()), bytes));
        }
        let decoded = image.decode_full()?;
        let format = self.options.encode.unwrap_or(source_format);
        let quality = self.options.quality.unwrap_or(PackOptions::DEFAULT_JPEG_QUALITY);
        let encoded = match resized {
            None => encode_image(format, quality, &decoded.pixels, size),
            Some(to) => encode_image(format, quality, &resize(&mut self.resizer, decoded, to), to),
        }?;
        Ok((format.extension(), encoded))
    }
}

/// Encodes a video, and returns its extension and bytes; none where the options do not change it.
fn encode_video(video: LazyImage, options: &PackOptions) -> Result<Option<(&'static str, Vec<u8>)>> {
    let info = video.video_info().expect("a video").clone();
    let Some((encoding, extension)) = options.video.encoding_recipe(&info, options) else { return Ok(None) };
    let bytes = video.transcode(&encoding, options.video.target_fps(&info), options.resize)?;
    Ok(Some((extension, bytes)))
}

/// Detects the format of an image that the decoder has opened.
fn detect_format(bytes: &[u8]) -> ImageEncoding {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => ImageEncoding::Png,
        Ok(ImageFormat::WebP) => ImageEncoding::Webp,
        _ => ImageEncoding::Jpeg,
    }
}

/// Returns width and height with a shorter side of `side`, the longer one rounded down as in torchvision's `Resize`;
/// none where the shorter side is not longer.
fn resized_size([width, height]: [u32; 2], side: u32) -> Option<[u32; 2]> {
    let scaled = |long: u32, short: u32| (u64::from(long) * u64::from(side) / u64::from(short)) as u32;
    if width.min(height) <= side {
        None
    } else if width <= height {
        Some([side, scaled(height, width)])
    } else {
        Some([scaled(width, height), side])
    }
}

/// Resizes an image [height, width, 3] to `size` [width, height], antialiased: Keys' cubic with a = −0.5, Pillow's
/// `BICUBIC`.
fn resize(resizer: &mut Resizer, image: &DecodedImage, size: [u32; 2]) -> Vec<u8> {
    let mut out = vec![0; size[0] as usize * size[1] as usize * 3];
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    // The typed interface: the dynamic one compiles every kernel for sixteen pixel types.
    let source = TypedImageRef::<U8x3>::from_buffer(image.width, image.height, &image.pixels).expect("RGB pixels");
    let mut resized = TypedImage::<U8x3>::from_buffer(size[0], size[1], &mut out).expect("a buffer of this size");
    resizer.resize_typed(&source, &mut resized, &options).expect("an image with pixels");
    out
}

/// Encodes an image [height, width, 3]. An image without color is stored in one channel, which decodes to the same.
fn encode_image(format: ImageEncoding, quality: u8, pixels: &[u8], [width, height]: [u32; 2]) -> Result<Vec<u8>> {
    let (triples, _) = pixels.as_chunks::<3>();
    let is_grayscale = triples.iter().all(|[red, green, blue]| red == green && green == blue);
    let gray: Vec<u8>;
    let (pixels, color) = if is_grayscale {
        gray = triples.iter().map(|[value, ..]| *value).collect();
        (&gray[..], ExtendedColorType::L8)
    } else {
        (pixels, ExtendedColorType::Rgb8)
    };
    let mut out = Vec::new();
    let result = match format {
        ImageEncoding::Jpeg => {
            JpegEncoder::new_with_quality(&mut out, quality).write_image(pixels, width, height, color)
        }
        ImageEncoding::Png => PngEncoder::new_with_quality(&mut out, CompressionType::Default, PngFilter::Adaptive)
            .write_image(pixels, width, height, color),
        ImageEncoding::Webp => WebPEncoder::new_lossless(&mut out).write_image(pixels, width, height, color),
    };
    result.map_err(|error| {
        Error::new(ExitCode::Corrupt, format!("{width}x{height} pixels cannot be encoded: {error}"))
    })?;
    Ok(out)
}
