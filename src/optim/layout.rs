//! Where tensors lie in the flat buffers, where the buffers are cut into buckets, and what of a bucket each rank keeps
//! where the optimizer's state is shared out.

use crate::part::weights::Spec;
use std::ops::Range;

/// Elements; 256 bytes in the narrowest compute dtype (bf16).
pub const ALIGN: usize = 128;

/// Buckets: runs of the flat buffers, end to end, which together are the whole.
#[derive(Clone, Debug)]
pub struct Cut {
    pub buckets: Vec<Range<usize>>,
    /// Which of them each tensor lies in, in the table's order.
    pub owner: Vec<usize>,
}

impl Cut {
    /// The length of the buffers.
    pub fn length(&self) -> usize {
        self.buckets.last().map_or(0, |last| last.end)
    }
}

/// Each tensor's range, last used first, on boundaries of `ALIGN`. A bucket ends with the first tensor that brings it to
/// `least` elements, and on a multiple of `granule`; where that is `ALIGN`, no range depends on `least`.
pub fn lay_out(specs: &[Spec], least: usize, granule: usize) -> (Vec<Range<usize>>, Cut) {
    let mut places = vec![0..0; specs.len()];
    let mut cut = Cut { buckets: Vec::new(), owner: vec![0; specs.len()] };
    let (mut begin, mut at) = (0, 0);
    for (index, spec) in specs.iter().enumerate().rev() {
        let end = at + spec.numel();
        places[index] = at..end;
        cut.owner[index] = cut.buckets.len();
        at = end.next_multiple_of(ALIGN);
        if end - begin >= least || index == 0 {
            at = end.next_multiple_of(granule);
            cut.buckets.push(begin..at);
            begin = at;
        }
    }
    (places, cut)
}

/// The optimizer's state, shared out: of every bucket each rank keeps an equal run, in rank order (ZeRO, stage 1:
/// Rajbhandari et al., 2020). What a rank keeps lies end to end in buffers of a `ranks`-th of the length.
#[derive(Clone, Debug)]
pub struct Shards {
    pub cut: Cut,
    pub rank: usize,
    pub ranks: usize,
}

impl Shards {
    /// What this rank keeps of a bucket, as a range of the whole buffers.
    pub fn own(&self, bucket: usize) -> Range<usize> {
        let Range { start, end } = self.cut.buckets[bucket];
        let each = (end - start) / self.ranks;
        start + self.rank * each..start + (self.rank + 1) * each
    }

    /// Where that lies in the buffers of what this rank keeps.
    pub fn kept(&self, bucket: usize) -> Range<usize> {
        let Range { start, end } = self.cut.buckets[bucket];
        start / self.ranks..end / self.ranks
    }

    /// The same of one tensor at `place`: empty where other ranks keep all of it.
    pub fn piece(&self, index: usize, place: &Range<usize>) -> Range<usize> {
        let bucket = self.cut.owner[index];
        let (own, kept) = (self.own(bucket), self.kept(bucket));
        let (start, end) = (place.start.max(own.start), place.end.min(own.end));
        if start < end { kept.start + start - own.start..kept.start + end - own.start } else { 0..0 }
    }
}
