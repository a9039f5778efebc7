//! From a store to a decoded sample: store → index, scan → shard → set → order → complete, decode; `pack` is the
//! writer.

pub mod store;
pub mod index; // the rows of a shard's members, and their file beside the tar
pub mod scan; // the strict reading of a tar that has no index
pub mod shard; // one tar of samples
pub mod set; // all shards of one data set
pub mod mix; // several data sets, weighted
pub mod cache; // pieces of shards, kept on this machine
pub mod order; // which sample stands at which position
pub mod complete; // does a file hold all of its picture
pub mod clip; // videos, by a process of their own
pub mod decode; // bytes become pixels
pub mod sound; // bytes become samples of sound, and those a spectrogram
pub mod caption; // captions become token ids
pub mod medium; // pictures or sounds
pub mod write; // a shard being written
pub mod pack; // pictures and sounds become shards
