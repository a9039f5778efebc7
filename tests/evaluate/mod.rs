//! Tests of the evaluation of checkpoints.

crate::modules![frozen_probe, probe_parts, masked_features,];
