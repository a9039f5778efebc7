//! Writes 16-bit WAV files of one channel.

/// Encodes samples in −1..1 as a WAV file; samples beyond are clipped.
pub fn encode(sample_rate: u32, samples: &[f32]) -> Vec<u8> {
    let data_bytes = 2 * samples.len() as u32;
    let mut out = Vec::with_capacity(44 + 2 * samples.len());
    out.extend_from_slice(b"RIFF");
    out.extend_from_slice(&(36 + data_bytes).to_le_bytes());
    out.extend_from_slice(b"WAVEfmt ");
    out.extend_from_slice(&16u32.to_le_bytes());
    // PCM, one channel.
    out.extend_from_slice(&[1, 0, 1, 0]);
    out.extend_from_slice(&sample_rate.to_le_bytes());
    out.extend_from_slice(&(2 * sample_rate).to_le_bytes());
    // Two bytes and 16 bits a sample.
    out.extend_from_slice(&[2, 0, 16, 0]);
    out.extend_from_slice(b"data");
    out.extend_from_slice(&data_bytes.to_le_bytes());
    out.extend(samples.iter().flat_map(|sample| quantize(*sample).to_le_bytes()));
    out
}

fn quantize(sample: f32) -> i16 {
    (sample * 32768.0).round_ties_even().clamp(-32768.0, 32767.0) as i16
}
