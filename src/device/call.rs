//! A collective as it is announced to every rank before it runs, so that ranks which do different things are told
//! so instead of summing what does not belong together.

use super::world::Reduce;
use crate::fault::{Code, Fault, Result};
use std::fmt;
use tch::Kind;

/// What a collective does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Open,
    AllReduce(Reduce),
    AllGather,
    ReduceScatter,
    Broadcast(usize),
    Barrier,
}

/// A collective as it is announced: equal on every rank, or the ranks disagree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub number: u64,
    pub act: Act,
    pub kind: Kind,
    pub elements: usize,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "collective {}, ", self.number)?;
        match self.act {
            Act::Open => return f.write_str("opening"),
            Act::Barrier => return f.write_str("barrier"),
            Act::AllReduce(Reduce::Sum) => f.write_str("all_reduce (sum)")?,
            Act::AllReduce(Reduce::Max) => f.write_str("all_reduce (max)")?,
            Act::AllGather => f.write_str("all_gather")?,
            Act::ReduceScatter => f.write_str("reduce_scatter")?,
            Act::Broadcast(root) => write!(f, "broadcast from rank {root}")?,
        }
        write!(f, ", of {} {} elements", self.elements, word(self.kind))
    }
}

/// The kinds that travel, by their Rust names.
const KINDS: [(Kind, &str); 5] =
    [(Kind::Float, "f32"), (Kind::Double, "f64"), (Kind::BFloat16, "bf16"), (Kind::Int64, "i64"), (Kind::Uint8, "u8")];

pub fn word(kind: Kind) -> &'static str {
    KINDS.iter().find(|(k, _)| *k == kind).map_or("unknown", |(_, word)| word)
}

/// Every collective begins with one frame from each rank: the call, and small data along with it.
pub const FRAME: usize = 256;
pub const HEADER: usize = 24;
pub const INLINE: usize = FRAME - HEADER;

impl Call {
    /// Into the head of a frame.
    pub fn write(&self, frame: &mut [u8]) {
        let (code, detail) = match self.act {
            Act::Open => (0, 0),
            Act::AllReduce(Reduce::Sum) => (1, 0),
            Act::AllReduce(Reduce::Max) => (2, 0),
            Act::AllGather => (3, 0),
            Act::ReduceScatter => (4, 0),
            Act::Broadcast(root) => (5, root as u32),
            Act::Barrier => (6, 0),
        };
        let kind = KINDS.iter().position(|(kind, _)| *kind == self.kind).unwrap_or(KINDS.len());
        frame[..8].copy_from_slice(&self.number.to_le_bytes());
        frame[8..12].copy_from_slice(&[code, kind as u8, 0, 0]);
        frame[12..16].copy_from_slice(&detail.to_le_bytes());
        frame[16..24].copy_from_slice(&(self.elements as u64).to_le_bytes());
    }
    /// From the head of a frame.
    pub fn read(frame: &[u8]) -> Call {
        let long = |at: usize| u64::from_le_bytes(frame[at..at + 8].try_into().expect("eight bytes"));
        let detail = u32::from_le_bytes(frame[12..16].try_into().expect("four bytes"));
        let act = match frame[8] {
            0 => Act::Open,
            1 => Act::AllReduce(Reduce::Sum),
            2 => Act::AllReduce(Reduce::Max),
            3 => Act::AllGather,
            4 => Act::ReduceScatter,
            5 => Act::Broadcast(detail as usize),
            _ => Act::Barrier,
        };
        let kind = KINDS.get(usize::from(frame[9])).map_or(Kind::Uint8, |(kind, _)| *kind);
        Call { number: long(0), act, kind, elements: long(16) as usize }
    }
}

/// A fault with exit code 76 unless every rank announced what this one did.
pub fn compare(own: &Call, frames: &[u8], size: usize) -> Result<()> {
    let heads: Vec<&[u8]> = frames.chunks(FRAME).collect();
    let name = |rank: usize| String::from_utf8_lossy(&heads[rank][HEADER..]).trim_end_matches('\0').to_string();
    let calls: Vec<Call> = heads.iter().map(|head| Call::read(head)).collect();
    let differs = |rank: usize| calls[rank] != calls[0] || (own.act == Act::Open && name(rank) != name(0));
    let Some(other) = (1..size).find(|&rank| differs(rank)) else { return Ok(()) };
    let told = |rank: usize| match calls[rank].act {
        Act::Open => format!("the opening of channel `{}`", name(rank)),
        _ => calls[rank].to_string(),
    };
    let message = format!(
        "ranks disagree about what to do next: rank 0 is at {}, rank {other} at {}. \
         Every rank must run the same program with the same config.",
        told(0),
        told(other)
    );
    Err(Fault::new(Code::Disagree, message))
}
