//! Parts of models, in the order in which a sample passes them. A part is named for what it is, never for who uses it;
//! it knows the parts above it and no method.

pub mod batch; // views of some samples, and what goes along with them
pub mod cost; // operations and bytes of a step, from shapes
pub mod params; // declarations of parameters, and their values
pub mod recompute; // activation checkpointing
pub mod buffers; // tensors without gradient that checkpoints hold
pub mod teacher; // a second set of weights
pub mod gather; // rows of all ranks, differentiable
pub mod step; // what a loss reads beside the batch
pub mod ragged; // samples that do not fill the grid
pub mod mask; // which tokens are hidden
pub mod patchify; // samples to rows of patches, and back to pixels
pub mod frequency; // low- and high-pass filters
pub mod training_samples; // what a method learns from before the first step
pub mod palette; // pixels as indices of a few colors
pub mod encoder; // tokens to features
pub mod decoder; // features to predictions at the hidden tokens
pub mod objective; // what is to be predicted
pub mod loss; // pure functions of tensors, and the terms that the step divides
pub mod batch_norm; // normalization over the samples of all ranks
pub mod head; // perceptrons on pooled features
pub mod projection; // embeddings that a contrast compares
pub mod model; // what parts make together
pub mod encoder_with_head; // an encoder over all places, and a linear prediction
pub mod masked_embedder; // embeds what a mask shows of a sample
pub mod color_transformer; // a transformer over colors of pixels
pub mod dual_encoder; // an image and a text encoder with one embedding space
pub mod autoencoder; // a masked autoencoder of pixels
