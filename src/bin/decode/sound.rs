//! Ogg Opus becomes samples of one channel.

use crate::Refusal;
use crate::video::demuxer;
use crate::wire::Answer;
use ffmpeg_next::codec::{self, Id};
use ffmpeg_next::format::Sample;
use ffmpeg_next::format::sample::Type;
use ffmpeg_next::util::frame::Audio;
use ffmpeg_next::{Error, decoder, media};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Decodes all of a file, of at most `most` samples, and lays the mean of its channels into the memory: f32, 48 kHz. What the
/// encoder put before and behind the sound is cut off.
pub fn answer(file: Vec<u8>, most: u64, memory: &File) -> Result<Answer, Refusal> {
    let wrong = |error: Error| error.to_string();
    let mut input = demuxer(file, "ogg", "opus").map_err(|error| format!("its beginning is damaged ({error})"))?;
    let stream = input.streams().best(media::Type::Audio).ok_or("there is no sound in it")?;
    let (number, parameters) = (stream.index(), stream.parameters());
    if parameters.id() != Id::OPUS {
        return Err(format!("it is coded as {}", parameters.id().name()));
    }
    let context = codec::Context::from_parameters(parameters).map_err(wrong)?;
    let mut decoder = context.decoder();
    // By which it counts what is to be cut off.
    decoder.set_packet_time_base((1, 48_000));
    let mut decoder = decoder.audio().map_err(wrong)?;
    let mut samples = Samples { mixed: Vec::new(), most };
    for (_, packet) in input.packets().filter(|(_, packet)| packet.stream() == number) {
        decoder.send_packet(&packet).map_err(wrong)?;
        samples.receive(&mut decoder)?;
    }
    decoder.send_eof().map_err(wrong)?;
    samples.receive(&mut decoder)?;
    let bytes: Vec<u8> = samples.mixed.iter().flat_map(|sample| sample.to_ne_bytes()).collect();
    memory.write_all_at(&bytes, 0).map_err(|error| error.to_string())?;
    Ok(Answer::Sound { samples: samples.mixed.len() as u64 })
}

struct Samples {
    mixed: Vec<f32>,
    most: u64,
}

impl Samples {
    /// Takes what the decoder has by now.
    fn receive(&mut self, decoder: &mut decoder::Audio) -> Result<(), Refusal> {
        let mut frame = Audio::empty();
        loop {
            match decoder.receive_frame(&mut frame) {
                Ok(()) => {}
                Err(Error::Eof | Error::Other { .. }) => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
            if frame.format() != Sample::F32(Type::Planar) || frame.rate() != 48_000 || frame.planes() == 0 {
                return Err(format!("its decoder gives {:?} at {} Hz", frame.format(), frame.rate()));
            }
            if (self.mixed.len() + frame.samples()) as u64 > self.most {
                return Err(format!("it has more than {} samples, which is the limit", self.most));
            }
            let begin = self.mixed.len();
            self.mixed.resize(begin + frame.samples(), 0.0);
            let share = 1.0 / frame.planes() as f32;
            for plane in 0..frame.planes() {
                let mixed = self.mixed[begin..].iter_mut();
                mixed.zip(frame.plane::<f32>(plane)).for_each(|(mixed, sample)| *mixed += sample * share);
            }
        }
    }
}
