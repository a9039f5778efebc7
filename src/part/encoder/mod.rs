pub mod block;
pub mod embed;
pub mod position;
pub mod vit;
