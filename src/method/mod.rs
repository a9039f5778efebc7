pub mod mae;
pub mod catalog;
