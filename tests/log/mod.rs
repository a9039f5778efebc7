//! Tests of what a run writes while it trains.

crate::modules![run_output,];
