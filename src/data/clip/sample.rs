//! Which frames a clip shows.

use crate::rng::Draw;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How frames are chosen among those of a video.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// Every so manieth frame of a window of `frames × stride` frames that begins anywhere (Kinetics: 4, Something-Something
    /// V2: 2, for pre-training). In a video that is shorter than that the window begins at its first frame, and the last
    /// step that still fits repeats.
    Stride(u32),
    /// The video is cut into as many equal parts as the clip has frames; one frame of each.
    Segments,
}

impl Sampling {
    /// `count` frames among `frames`, in order; some may be the same. VideoMAE's pre-training loader for a stride; the
    /// training loader of Something-Something V2 for segments (in a video of fewer frames than segments: any frames, in
    /// order, where that loader repeats the first).
    pub fn draw(self, frames: u64, count: usize, draw: &mut Draw) -> Vec<u64> {
        match self {
            Sampling::Stride(stride) => {
                let window = count as u64 * u64::from(stride);
                let first = if frames >= window { draw.below(frames - window + 1) } else { 0 };
                strided(first, frames, count, stride)
            }
            Sampling::Segments if frames >= count as u64 => {
                let part = frames / count as u64;
                (0..count as u64).map(|number| number * part + draw.below(part)).collect()
            }
            Sampling::Segments => {
                let mut drawn: Vec<u64> = (0..count).map(|_| draw.below(frames)).collect();
                drawn.sort_unstable();
                drawn
            }
        }
    }

    /// As `draw`, nothing left to chance: the window in the middle, or the middle of each part.
    pub fn centred(self, frames: u64, count: usize) -> Vec<u64> {
        match self {
            Sampling::Stride(stride) => {
                let window = count as u64 * u64::from(stride);
                strided(frames.saturating_sub(window) / 2, frames, count, stride)
            }
            Sampling::Segments => {
                let part = frames as f64 / count as f64;
                (0..count).map(|number| ((part / 2.0 + part * number as f64) as u64).min(frames - 1)).collect()
            }
        }
    }
}

/// Frames from `first` on. A step that would lead to the last frame or beyond is not taken: the official loader counts
/// from 1 and asks for less.
fn strided(first: u64, frames: u64, count: usize, stride: u32) -> Vec<u64> {
    let mut at = first;
    let next = |_| {
        let shown = at;
        if at + 1 + u64::from(stride) < frames {
            at += u64::from(stride);
        }
        shown
    };
    (0..count).map(next).collect()
}
