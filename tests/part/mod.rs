//! Tests of what models are composed of.

crate::modules![cost, recompute,];
