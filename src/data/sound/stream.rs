//! Packets of a file become samples of one channel, through Symphonia.

use super::whole::Whole;
use super::{Format, corrupt, long};
use crate::fault::{Fault, Result};
use std::io::{Cursor, Read, Seek, SeekFrom};
use symphonia::core::codecs::CodecParameters;
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::errors::Error;
use symphonia::core::formats::{FormatOptions, FormatReader};
use symphonia::core::io::{MediaSource, MediaSourceStream};
use symphonia::default::formats::{FlacReader, MpaReader, OggReader, WavReader};
use symphonia::default::get_codecs;

/// Bytes that are read from front to back: a reader that can seek looks ahead to guess how long the sound is, which is
/// known already.
struct Bytes<'a>(Cursor<&'a [u8]>);

impl Read for Bytes<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(out)
    }
}

impl Seek for Bytes<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}

impl MediaSource for Bytes<'_> {
    fn is_seekable(&self) -> bool {
        false
    }
    fn byte_len(&self) -> Option<u64> {
        Some(self.0.get_ref().len() as u64)
    }
}

/// Decodes all of a file into `samples`, the mean of its channels; `packet` is scratch. What encoders put before and
/// behind the sound is cut off where the file says how much it is.
pub fn read(bytes: &[u8], whole: &Whole, most: u64, packet: &mut Vec<f32>, samples: &mut Vec<f32>) -> Result<()> {
    let header = whole.header;
    let bytes = &bytes[whole.body.clone()];
    let mut reader = reader(bytes, header.format).map_err(wrong)?;
    let track = reader.tracks().first().ok_or_else(|| corrupt("it has no stream"))?;
    let Some(CodecParameters::Audio(parameters)) = track.codec_params.clone() else {
        return Err(corrupt("its stream is no sound"));
    };
    let options = AudioDecoderOptions::default().verify(header.format == Format::Flac);
    let mut decoder = get_codecs().make_audio_decoder(&parameters, &options).map_err(wrong)?;
    // A packet takes at least a byte.
    for _ in 0..=bytes.len() {
        let Some(next) = reader.next_packet().map_err(wrong)? else { break };
        let decoded = decoder.decode(&next).map_err(wrong)?;
        if decoded.frames() == 0 {
            continue;
        }
        let channels = decoded.num_planes();
        if channels == 0 || decoded.spec().rate() != header.rate {
            return Err(corrupt("its rate or its channels change on the way"));
        }
        decoded.copy_to_vec_interleaved(packet);
        mix(packet, channels, samples);
        if samples.len() as u64 > most {
            return Err(long(samples.len() as u64, most));
        }
    }
    if decoder.finalize().verify_ok == Some(false) {
        return Err(corrupt("its samples are not those that its digest was made of"));
    }
    Ok(())
}

fn reader(bytes: &[u8], format: Format) -> Result<Box<dyn FormatReader + '_>, Error> {
    let stream = MediaSourceStream::new(Box::new(Bytes(Cursor::new(bytes))), Default::default());
    let options = FormatOptions::default();
    Ok(match format {
        Format::Wav => Box::new(WavReader::try_new(stream, options)?),
        Format::Flac => Box::new(FlacReader::try_new(stream, options)?),
        Format::Mp3 => Box::new(MpaReader::try_new(stream, options)?),
        Format::Vorbis => Box::new(OggReader::try_new(stream, options)?),
        Format::Opus => return Err(Error::Unsupported("Opus")),
    })
}

/// The mean of the channels, added to `samples`.
fn mix(packet: &[f32], channels: usize, samples: &mut Vec<f32>) {
    match channels {
        1 => samples.extend_from_slice(packet),
        2 => samples.extend(packet.as_chunks::<2>().0.iter().map(|[left, right]| (left + right) * 0.5)),
        _ => {
            let share = 1.0 / channels as f32;
            samples.extend(packet.chunks_exact(channels).map(|all| all.iter().sum::<f32>() * share));
        }
    }
}

fn wrong(error: Error) -> Fault {
    match error {
        Error::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            corrupt("the file was cut before the end of the sound")
        }
        error => corrupt(error),
    }
}
