//! Tests of the optimizer: flat buffers, reduction during backward, sharded state.

crate::modules![optimizer, reduce_overlap, sharded_state, sharded_jobs];
