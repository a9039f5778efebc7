//! Checks of the architecture: import order, sizes, statements, words, tests of every operation, configs.

pub mod source;

pub use source::{files, read_text, relative_path};

crate::modules![imports, sizes, statements, words, comments, operations, configs];
