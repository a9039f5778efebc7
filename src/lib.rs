//! `occlude` pre-trains masked autoencoders on one to many ranks.
//!
//! The modules are listed in the order in which they may know each other: a module imports only modules listed above it
//! (`tests/architecture.rs` holds that). Reading downwards follows one sample from the store to the weights.

pub mod error; // what can go wrong, and the exit code of each
pub mod grid; // token geometry; the legend of shapes
pub mod rng; // the counter-based generator: randomness belongs to the sample
pub mod bridge; // what tch leaves out: autograd nodes, hooks, .grad views, streams, graphs, fused CPU forms
pub mod dist; // ranks and collectives: one process, threads, MPI, NCCL
pub mod op; // one operation a file: a plain formula, and its kernel
pub mod data; // store, shard, order, decode, pack
pub mod view; // augmentation: one decoded sample to the views that a method asks for
pub mod part; // what models are composed of, in travel order
pub mod loader; // fetch | decode | view | batch
pub mod log; // metrics, events, pictures, upload
pub mod timing; // clocks, the peak of a device, timestamps
pub mod method; // one paper a file
pub mod optim; // flat buffers, buckets, schedules, update
pub mod config; // reads, refuses, resolves
pub mod checkpoint; // manifest, parts, lease, retention
pub mod interop; // import and export under other people's names
pub mod setup; // from a config: data set, tokenizer, sample order, model
pub mod reconstruct; // pictures of predictions
pub mod sample; // images sampled from a model
pub mod train; // the gradient step and the loop around it
pub mod evaluate; // frozen features: probes, zero-shot, retrieval
pub mod bench; // speed: a step, the loader, single operations
pub mod inspect; // what shards hold
pub mod report; // runs as one HTML page
pub mod doctor; // what this machine has and lacks
pub mod cli; // the command line
