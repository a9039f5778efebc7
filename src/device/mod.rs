//! Where tensors live and how ranks talk. A world is a value that is handed down; only `join` knows which there are.

pub mod mpi;
pub mod solo;
pub mod world;

pub use world::{Channel, Pending, Reduce, World};
