//! Selects the frames of a clip.

use crate::rng::Philox;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The rule by which the frames of a clip are chosen from those of a video.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// Every n-th frame of a window of `frames × stride` frames at a random position (in pre-training 4 for Kinetics, 2
    /// for Something-Something V2). In a shorter video the window starts at the first frame, and the last frame that
    /// still fits repeats.
    Stride(u32),
    /// The video is divided into one equal segment for each frame of the clip; one frame of each segment.
    Segments,
}

impl Sampling {
    /// Samples `count` of `frames` frames in ascending order; frames may repeat. A stride follows VideoMAE's
    /// pre-training loader, segments the training loader of Something-Something V2 (in a video with fewer frames than
    /// segments: random frames, where that loader repeats the first).
    pub fn sample(self, frames: u64, count: usize, rng: &mut Philox) -> Vec<u64> {
        match self {
            Sampling::Stride(stride) => {
                let window = count as u64 * u64::from(stride);
                let first = if frames >= window { rng.uniform_int(frames - window + 1) } else { 0 };
                strided_frames(first, frames, count, stride)
            }
            Sampling::Segments if frames >= count as u64 => {
                let segment = frames / count as u64;
                (0..count as u64).map(|index| index * segment + rng.uniform_int(segment)).collect()
            }
            Sampling::Segments => {
                let mut indices: Vec<u64> = (0..count).map(|_| rng.uniform_int(frames)).collect();
                indices.sort_unstable();
                indices
            }
        }
    }

    /// Selects frames like [`Sampling::sample`], but deterministically: the window in the middle of the video, or the
    /// middle of each segment.
    pub fn sample_center(self, frames: u64, count: usize) -> Vec<u64> {
        match self {
            Sampling::Stride(stride) => {
                let window = count as u64 * u64::from(stride);
                strided_frames(frames.saturating_sub(window) / 2, frames, count, stride)
            }
            Sampling::Segments => {
                let segment = frames as f64 / count as f64;
                let middle = |index: usize| ((segment / 2.0 + segment * index as f64) as u64).min(frames - 1);
                (0..count).map(middle).collect()
            }
        }
    }
}

/// Returns `count` frames from `first` on. A step to the last frame or beyond is not taken, because the official loader
/// counts from 1 and compares with the number of frames.
fn strided_frames(first: u64, frames: u64, count: usize, stride: u32) -> Vec<u64> {
    let mut next = first;
    let mut indices = Vec::with_capacity(count);
    for _ in 0..count {
        indices.push(next);
        if next + 1 + u64::from(stride) < frames {
            next += u64::from(stride);
        }
    }
    indices
}
