//! One channel of samples as a WAV file of 16 bits.

/// Samples in −1..1; what lies beyond is clipped.
pub fn encode(rate: u32, samples: &[f32]) -> Vec<u8> {
    let length = 2 * samples.len() as u32;
    let mut out = Vec::with_capacity(44 + 2 * samples.len());
    out.extend_from_slice(b"RIFF");
    out.extend_from_slice(&(36 + length).to_le_bytes());
    out.extend_from_slice(b"WAVEfmt ");
    out.extend_from_slice(&16u32.to_le_bytes());
    // PCM, one channel.
    out.extend_from_slice(&[1, 0, 1, 0]);
    out.extend_from_slice(&rate.to_le_bytes());
    out.extend_from_slice(&(2 * rate).to_le_bytes());
    // Bytes of a sample, and its bits.
    out.extend_from_slice(&[2, 0, 16, 0]);
    out.extend_from_slice(b"data");
    out.extend_from_slice(&length.to_le_bytes());
    let word = |sample: &f32| (sample * 32768.0).round_ties_even().clamp(-32768.0, 32767.0) as i16;
    out.extend(samples.iter().flat_map(|sample| word(sample).to_le_bytes()));
    out
}
