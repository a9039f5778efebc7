//! Decoding of Ogg Opus to mono samples.

use crate::RequestError;
use crate::protocol::DecodeResponse;
use crate::video::open_demuxer;
use ffmpeg_next::codec::{self, Id};
use ffmpeg_next::format::Sample;
use ffmpeg_next::format::sample::Type;
use ffmpeg_next::util::frame::Audio;
use ffmpeg_next::{Error, decoder, media};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The sample rate of Opus in Hz.
const SAMPLE_RATE: u32 = 48_000;

/// Decodes a file of at most `max_samples` samples and writes the mean of its channels to the shared memory: f32,
/// 48 kHz. The padding that the encoder added before and behind the signal is removed.
pub fn decode_opus(file: Vec<u8>, max_samples: u64, memory: &File) -> Result<DecodeResponse, RequestError> {
    let mut input = open_demuxer(file, "ogg", "opus").map_err(|error| format!("its beginning is damaged ({error})"))?;
    let stream = input.streams().best(media::Type::Audio).ok_or("it has no audio stream")?;
    let stream_index = stream.index();
    let parameters = stream.parameters();
    if parameters.id() != Id::OPUS {
        return Err(format!("its codec is {}, not Opus", parameters.id().name()));
    }
    let mut decoder = codec::Context::from_parameters(parameters).map_err(describe)?.decoder();
    // The unit in which FFmpeg counts the padding.
    decoder.set_packet_time_base((1, SAMPLE_RATE as i32));
    let mut decoder = decoder.audio().map_err(describe)?;
    let mut mixer = Mixer { samples: Vec::new(), max_samples };
    for (_, packet) in input.packets().filter(|(_, packet)| packet.stream() == stream_index) {
        decoder.send_packet(&packet).map_err(describe)?;
        mixer.receive(&mut decoder)?;
    }
    decoder.send_eof().map_err(describe)?;
    mixer.receive(&mut decoder)?;
    let bytes: Vec<u8> = mixer.samples.iter().flat_map(|sample| sample.to_ne_bytes()).collect();
    memory.write_all_at(&bytes, 0).map_err(|error| error.to_string())?;
    Ok(DecodeResponse::Audio { samples: mixer.samples.len() as u64 })
}

fn describe(error: Error) -> RequestError {
    error.to_string()
}

/// Averages the channels of decoded frames.
struct Mixer {
    samples: Vec<f32>,
    max_samples: u64,
}

impl Mixer {
    /// Appends the samples that the decoder has ready.
    fn receive(&mut self, decoder: &mut decoder::Audio) -> Result<(), RequestError> {
        let mut frame = Audio::empty();
        loop {
            match decoder.receive_frame(&mut frame) {
                Ok(()) => {}
                Err(Error::Eof | Error::Other { .. }) => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
            if frame.format() != Sample::F32(Type::Planar) || frame.rate() != SAMPLE_RATE || frame.planes() == 0 {
                return Err(format!("its decoder gives {:?} at {} Hz", frame.format(), frame.rate()));
            }
            if (self.samples.len() + frame.samples()) as u64 > self.max_samples {
                return Err(format!("it has more than {} samples, which is the limit", self.max_samples));
            }
            let start = self.samples.len();
            self.samples.resize(start + frame.samples(), 0.0);
            let weight = 1.0 / frame.planes() as f32;
            for plane in 0..frame.planes() {
                let mixed = self.samples[start..].iter_mut();
                mixed.zip(frame.plane::<f32>(plane)).for_each(|(mixed, sample)| *mixed += sample * weight);
            }
        }
    }
}
