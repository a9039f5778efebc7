//! Decodes the packets of a file to samples of one channel, through Symphonia.

use super::structure::AudioStructure;
use super::{AudioFormat, corrupt_audio, too_long};
use crate::error::{Error, Result};
use std::io::{Cursor, Read, Seek, SeekFrom};
use symphonia::core::codecs::CodecParameters;
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::errors::Error as SymphoniaError;
use symphonia::core::formats::{FormatOptions, FormatReader};
use symphonia::core::io::{MediaSource, MediaSourceStream};
use symphonia::default::formats::{FlacReader, MpaReader, OggReader, WavReader};
use symphonia::default::get_codecs;

/// A source that cannot seek: with a seekable one, a reader scans ahead to estimate the duration, which is known
/// already.
struct UnseekableSource<'a>(Cursor<&'a [u8]>);

impl Read for UnseekableSource<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(out)
    }
}

impl Seek for UnseekableSource<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}

impl MediaSource for UnseekableSource<'_> {
    fn is_seekable(&self) -> bool {
        false
    }
    fn byte_len(&self) -> Option<u64> {
        Some(self.0.get_ref().len() as u64)
    }
}

/// Decodes a whole file and appends the mean of its channels to `samples`; `packet` is scratch. The encoder's padding
/// is cut off where the file gives its length.
pub fn decode(
    bytes: &[u8],
    structure: &AudioStructure,
    max_samples: u64,
    packet: &mut Vec<f32>,
    samples: &mut Vec<f32>,
) -> Result<()> {
    let header = structure.header;
    let bytes = &bytes[structure.body.clone()];
    let mut reader = open_reader(bytes, header.format).map_err(convert_error)?;
    let track = reader.tracks().first().ok_or_else(|| corrupt_audio("it has no stream"))?;
    let Some(CodecParameters::Audio(parameters)) = track.codec_params.clone() else {
        return Err(corrupt_audio("its stream is not audio"));
    };
    let options = AudioDecoderOptions::default().verify(header.format == AudioFormat::Flac);
    let mut decoder = get_codecs().make_audio_decoder(&parameters, &options).map_err(convert_error)?;
    // A packet takes at least a byte.
    for _ in 0..=bytes.len() {
        let Some(next) = reader.next_packet().map_err(convert_error)? else { break };
        let decoded = decoder.decode(&next).map_err(convert_error)?;
        if decoded.frames() == 0 {
            continue;
        }
        let channels = decoded.num_planes();
        if channels == 0 || decoded.spec().rate() != header.sample_rate {
            return Err(corrupt_audio("its sample rate or number of channels changes within the file"));
        }
        decoded.copy_to_vec_interleaved(packet);
        append_mean(packet, channels, samples);
        if samples.len() as u64 > max_samples {
            return Err(too_long(samples.len() as u64, max_samples));
        }
    }
    if decoder.finalize().verify_ok == Some(false) {
        return Err(corrupt_audio("its samples do not match its digest"));
    }
    Ok(())
}

fn open_reader(bytes: &[u8], format: AudioFormat) -> Result<Box<dyn FormatReader + '_>, SymphoniaError> {
    let stream = MediaSourceStream::new(Box::new(UnseekableSource(Cursor::new(bytes))), Default::default());
    let options = FormatOptions::default();
    Ok(match format {
        AudioFormat::Wav => Box::new(WavReader::try_new(stream, options)?),
        AudioFormat::Flac => Box::new(FlacReader::try_new(stream, options)?),
        AudioFormat::Mp3 => Box::new(MpaReader::try_new(stream, options)?),
        AudioFormat::Vorbis => Box::new(OggReader::try_new(stream, options)?),
        AudioFormat::Opus => return Err(SymphoniaError::Unsupported("Opus")),
    })
}

/// Appends the mean of the interleaved channels to `samples`.
fn append_mean(packet: &[f32], channels: usize, samples: &mut Vec<f32>) {
    match channels {
        1 => samples.extend_from_slice(packet),
        2 => samples.extend(packet.as_chunks::<2>().0.iter().map(|[left, right]| (left + right) * 0.5)),
        _ => {
            let weight = 1.0 / channels as f32;
            samples.extend(packet.chunks_exact(channels).map(|all| all.iter().sum::<f32>() * weight));
        }
    }
}

fn convert_error(error: SymphoniaError) -> Error {
    match error {
        SymphoniaError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            corrupt_audio("the file is truncated")
        }
        error => corrupt_audio(error),
    }
}
