//! Tests of the process groups: the same suite for every kind of world.

crate::modules![collectives, nccl,];
