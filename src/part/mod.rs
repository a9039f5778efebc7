//! What methods are composed of, in travel order.

pub mod view;
pub mod mask;
pub mod encoder;
pub mod decoder;
pub mod target;
pub mod loss;
