//! Tests of the command line.

crate::modules![commands, usage_errors,];
