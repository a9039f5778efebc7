pub mod catalog;
pub mod mae;
