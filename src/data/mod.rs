//! From a store to a decoded sample: store → shard → order → decode; `pack` is the writer.

pub mod store;
pub mod shard;
pub mod order;
pub mod decode;
pub mod pack;
