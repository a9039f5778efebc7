//! Announcement of a collective to every rank before it runs, so that ranks which call different collectives get an
//! error instead of a meaningless sum.

use super::world::ReduceOp;
use crate::error::{Error, ExitCode, Result};
use std::fmt;
use tch::Kind;

/// Kind of a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CollectiveKind {
    /// Opening of a channel.
    Open,
    AllReduce(ReduceOp),
    AllGather,
    ReduceScatter,
    /// Broadcast from this root.
    Broadcast(usize),
    Barrier,
}

/// A collective as a rank announces it. Must be equal on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CollectiveCall {
    /// Index of the collective within its channel.
    pub sequence: u64,
    pub collective: CollectiveKind,
    pub kind: Kind,
    pub elements: usize,
}

impl fmt::Display for CollectiveCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "collective {}, ", self.sequence)?;
        match self.collective {
            CollectiveKind::Open => return f.write_str("opening"),
            CollectiveKind::Barrier => return f.write_str("barrier"),
            CollectiveKind::AllReduce(ReduceOp::Sum) => f.write_str("all_reduce (sum)")?,
            CollectiveKind::AllReduce(ReduceOp::Max) => f.write_str("all_reduce (max)")?,
            CollectiveKind::AllGather => f.write_str("all_gather")?,
            CollectiveKind::ReduceScatter => f.write_str("reduce_scatter")?,
            CollectiveKind::Broadcast(root) => write!(f, "broadcast from rank {root}")?,
        }
        write!(f, ", of {} {} elements", self.elements, kind_name(self.kind))
    }
}

/// The supported kinds and their Rust names.
const KINDS: [(Kind, &str); 5] =
    [(Kind::Float, "f32"), (Kind::Double, "f64"), (Kind::BFloat16, "bf16"), (Kind::Int64, "i64"), (Kind::Uint8, "u8")];

/// Returns the Rust name of a kind, or "unknown" if collectives do not support it.
pub fn kind_name(kind: Kind) -> &'static str {
    KINDS.iter().find(|(k, _)| *k == kind).map_or("unknown", |(_, name)| name)
}

/// Size of the frame that each rank sends at the beginning of a collective: the call, and the data if they fit.
pub const FRAME_BYTES: usize = 256;
/// Size of the call at the beginning of a frame.
pub const HEADER_BYTES: usize = 24;
/// Maximum size of data that a frame carries.
pub const MAX_INLINE_BYTES: usize = FRAME_BYTES - HEADER_BYTES;

impl CollectiveCall {
    /// Writes the call to the header of a frame.
    pub fn encode(&self, frame: &mut [u8]) {
        let (code, root) = match self.collective {
            CollectiveKind::Open => (0, 0),
            CollectiveKind::AllReduce(ReduceOp::Sum) => (1, 0),
            CollectiveKind::AllReduce(ReduceOp::Max) => (2, 0),
            CollectiveKind::AllGather => (3, 0),
            CollectiveKind::ReduceScatter => (4, 0),
            CollectiveKind::Broadcast(root) => (5, root as u32),
            CollectiveKind::Barrier => (6, 0),
        };
        let kind = KINDS.iter().position(|(kind, _)| *kind == self.kind).unwrap_or(KINDS.len());
        frame[..8].copy_from_slice(&self.sequence.to_le_bytes());
        frame[8..12].copy_from_slice(&[code, kind as u8, 0, 0]);
        frame[12..16].copy_from_slice(&root.to_le_bytes());
        frame[16..24].copy_from_slice(&(self.elements as u64).to_le_bytes());
    }
    /// Reads a call from the header of a frame.
    pub fn decode(frame: &[u8]) -> CollectiveCall {
        let u64_at = |offset: usize| u64::from_le_bytes(frame[offset..offset + 8].try_into().expect("eight bytes"));
        let root = u32::from_le_bytes(frame[12..16].try_into().expect("four bytes"));
        let collective = match frame[8] {
            0 => CollectiveKind::Open,
            1 => CollectiveKind::AllReduce(ReduceOp::Sum),
            2 => CollectiveKind::AllReduce(ReduceOp::Max),
            3 => CollectiveKind::AllGather,
            4 => CollectiveKind::ReduceScatter,
            5 => CollectiveKind::Broadcast(root as usize),
            _ => CollectiveKind::Barrier,
        };
        let kind = KINDS.get(usize::from(frame[9])).map_or(Kind::Uint8, |(kind, _)| *kind);
        CollectiveCall { sequence: u64_at(0), collective, kind, elements: u64_at(16) as usize }
    }
}

/// Checks that every rank announced the same call as rank 0.
///
/// # Errors
/// [`ExitCode::RankMismatch`] otherwise.
pub fn check_calls_match(local: &CollectiveCall, frames: &[u8], size: usize) -> Result<()> {
    let frames: Vec<&[u8]> = frames.chunks(FRAME_BYTES).collect();
    let calls: Vec<CollectiveCall> = frames.iter().map(|frame| CollectiveCall::decode(frame)).collect();
    let differs = |rank: usize| {
        calls[rank] != calls[0]
            || (local.collective == CollectiveKind::Open && channel_name(frames[rank]) != channel_name(frames[0]))
    };
    let Some(other) = (1..size).find(|&rank| differs(rank)) else { return Ok(()) };
    let message = format!(
        "ranks disagree about what to do next: rank 0 is at {}, rank {other} at {}. \
         Every rank must run the same program with the same config.",
        describe(&calls[0], frames[0]),
        describe(&calls[other], frames[other])
    );
    Err(Error::new(ExitCode::RankMismatch, message))
}

fn describe(call: &CollectiveCall, frame: &[u8]) -> String {
    match call.collective {
        CollectiveKind::Open => format!("the opening of channel `{}`", channel_name(frame)),
        _ => call.to_string(),
    }
}

/// Returns the channel name that the frame of an opening carries.
fn channel_name(frame: &[u8]) -> String {
    String::from_utf8_lossy(&frame[HEADER_BYTES..]).trim_end_matches('\0').to_string()
}
