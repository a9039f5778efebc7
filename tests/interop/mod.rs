//! Tests of import and export: weights of other implementations.

crate::modules![mae, videomae, pth,];
