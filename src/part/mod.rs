//! What methods are composed of, in travel order.

pub mod decoder;
pub mod encoder;
pub mod loss;
pub mod mask;
pub mod target;
pub mod view;
