//! From a store to a decoded sample: store → shard → order → decode; `pack` is the writer.

pub mod decode;
pub mod order;
pub mod pack;
pub mod shard;
pub mod store;
