//! What a sample is, a picture or a sound, and what follows from it: the members that hold it, its decoder, the element
//! of the rows that its views make.

use super::decode::{self, Limits, Picture};
use super::shard::{IMAGE, SOUND};
use super::sound::{self, Clip};
use crate::fault::Result;
use tch::Kind;

/// What the samples of a data set are read as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Medium {
    #[default]
    Picture,
    Sound,
}

impl Medium {
    /// Extensions of the members that hold it.
    pub fn extensions(self) -> &'static [&'static str] {
        match self {
            Medium::Picture => IMAGE,
            Medium::Sound => SOUND,
        }
    }

    /// Several of them, for messages.
    pub fn plural(self) -> &'static str {
        match self {
            Medium::Picture => "pictures",
            Medium::Sound => "sounds",
        }
    }

    /// The element of a view: 8-bit pixels, normalised on the device; values of a spectrogram, normalised already.
    pub fn kind(self) -> Kind {
        match self {
            Medium::Picture => Kind::Uint8,
            Medium::Sound => Kind::Float,
        }
    }
}

/// A sample ahead of its view.
pub enum Sample<'a> {
    Picture(Picture<'a>),
    Sound(Clip<'a>),
}

impl<'a> From<Picture<'a>> for Sample<'a> {
    fn from(picture: Picture<'a>) -> Self {
        Sample::Picture(picture)
    }
}

impl<'a> From<Clip<'a>> for Sample<'a> {
    fn from(clip: Clip<'a>) -> Self {
        Sample::Sound(clip)
    }
}

/// Decodes samples one after another; one for each thread.
pub struct Decoder {
    pictures: decode::Decoder,
    sounds: sound::Decoder,
}

impl Decoder {
    /// `limits` are those of pictures; sounds have [`sound::Limits::default`].
    pub fn new(limits: Limits) -> Decoder {
        Decoder { pictures: decode::Decoder::new(limits), sounds: sound::Decoder::new(sound::Limits::default()) }
    }

    /// A picture with its header read, of `channels` channels, or a sound decoded. Faults with Code::Corrupt on what is
    /// not whole or not within the limits.
    pub fn open<'a>(&'a mut self, bytes: &'a [u8], medium: Medium, channels: u32) -> Result<Sample<'a>> {
        match medium {
            Medium::Picture => self.pictures.open(bytes, channels).map(Sample::Picture),
            Medium::Sound => self.sounds.decode(bytes).map(Sample::Sound),
        }
    }

    /// Nanoseconds of processor that pixels took inside of views since this was last asked.
    pub fn spent(&mut self) -> u64 {
        self.pictures.spent()
    }
}
