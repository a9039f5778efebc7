//! The modality of a sample, and what follows from it: the file extensions of its members, its decoder, the element
//! type of the rows that its views make.

use super::audio::{AudioDecoder, AudioLimits, Waveform};
use super::decode::{ImageLimits, LazyImage, VisualDecoder};
use super::shard::{AUDIO_EXTENSIONS, IMAGE_EXTENSIONS};
use crate::error::Result;
use tch::Kind;

/// The modality of a data set's samples. Videos count as images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Modality {
    #[default]
    Image,
    Audio,
}

impl Modality {
    /// Returns the extensions of the members that hold a sample.
    pub fn extensions(self) -> &'static [&'static str] {
        match self {
            Modality::Image => IMAGE_EXTENSIONS,
            Modality::Audio => AUDIO_EXTENSIONS,
        }
    }

    /// Returns the plural noun for messages.
    pub fn plural(self) -> &'static str {
        match self {
            Modality::Image => "images",
            Modality::Audio => "audio files",
        }
    }

    /// Returns the element type of a view: 8-bit pixels, which the device normalizes, or spectrogram values, which are
    /// normalized already.
    pub fn kind(self) -> Kind {
        match self {
            Modality::Image => Kind::Uint8,
            Modality::Audio => Kind::Float,
        }
    }
}

/// A sample before its view.
pub enum Sample<'a> {
    Image(LazyImage<'a>),
    Audio(Waveform<'a>),
}

impl<'a> From<LazyImage<'a>> for Sample<'a> {
    fn from(image: LazyImage<'a>) -> Self {
        Sample::Image(image)
    }
}

impl<'a> From<Waveform<'a>> for Sample<'a> {
    fn from(waveform: Waveform<'a>) -> Self {
        Sample::Audio(waveform)
    }
}

/// A decoder of samples of either modality; one per thread.
pub struct SampleDecoder {
    images: VisualDecoder,
    audio: AudioDecoder,
}

impl SampleDecoder {
    /// Makes a decoder with these limits for images and [`AudioLimits::default`] for audio.
    pub fn new(limits: ImageLimits) -> SampleDecoder {
        SampleDecoder { images: VisualDecoder::new(limits), audio: AudioDecoder::new(AudioLimits::default()) }
    }

    /// Reads the header of an image or video of `channels` channels, or decodes audio.
    ///
    /// # Errors
    /// ExitCode::Corrupt for a file that is truncated, damaged or beyond the limits.
    pub fn open<'a>(&'a mut self, bytes: &'a [u8], modality: Modality, channels: u32) -> Result<Sample<'a>> {
        match modality {
            Modality::Image => self.images.open(bytes, channels).map(Sample::Image),
            Modality::Audio => self.audio.decode(bytes).map(Sample::Audio),
        }
    }

    /// Returns the CPU nanoseconds that decoding of pixels inside views took since the last call.
    pub fn take_cpu_nanoseconds(&mut self) -> u64 {
        self.images.take_cpu_nanoseconds()
    }
}
