//! `occlude` pre-trains masked autoencoders on one to many ranks.
//!
//! The modules stand in the order in which a sample meets them. A module imports only what stands above it
//! (`tests/architecture.rs` holds that), so that reading downwards opens no room twice.

pub mod fault; // what can go wrong, and the exit code that says so
pub mod grid; // token geometry; the shape legend
pub mod rng; // the counter-based generator: randomness belongs to the sample
pub mod bridge; // what tch leaves out: gradient hooks, .grad views, fused CPU forms
pub mod device; // where tensors live and how ranks talk
pub mod op; // one operation a file: a plain formula, and its fused form
pub mod data; // store, shard, order, decode, pack
pub mod part; // what methods are composed of, in travel order
pub mod feed; // the conveyor: fetch | decode | view | batch
pub mod method; // one paper a file
pub mod optim; // flat buffers, buckets, schedule, update
pub mod config; // reads, refuses, resolves
pub mod run; // the verbs
