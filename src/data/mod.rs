//! From a store to a decoded sample: store → index, scan → shard → set → order → truncation, decode; `pack` writes.

pub mod store;
pub mod index; // the members of a shard, and the index file of a tar
pub mod scan; // strict reader of a tar that has no index
pub mod shard; // one tar of samples
pub mod set; // all shards of one data set
pub mod mixture; // several data sets, weighted
pub mod cache; // on-disk cache of pieces of shards
pub mod order; // the sample at each position of a training
pub mod truncation; // finds truncated image files
pub mod video; // videos, decoded by a separate process
pub mod decode; // bytes → pixels
pub mod audio; // bytes → audio samples → spectrogram
pub mod caption; // captions → token ids
pub mod modality; // images or audio
pub mod shard_writer; // writes one shard
pub mod pack; // images, videos and audio → shards
