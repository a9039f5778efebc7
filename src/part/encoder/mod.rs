pub mod position;
pub mod embed;
pub mod block;
pub mod vit;
