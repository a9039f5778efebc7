//! What methods are composed of, in travel order. A part is named for what it is, never for who uses it; it knows the
//! parts above it and no method.

pub mod view; // one decoded sample → the views a method asks for
pub mod batch; // views of some samples, and what goes along with them
pub mod work; // what a step has to do: operations and bytes, from shapes
pub mod weights; // a table of named tensors, and their values
pub mod again; // what runs again in backward instead of being kept
pub mod lengths; // samples that do not fill the grid
pub mod mask; // grid and origin → which tokens are hidden
pub mod pixels; // samples → rows of patches, and rows → pictures
pub mod encoder; // tokens → features
pub mod decoder; // features → predictions at the hidden places
pub mod target; // what is to be predicted
pub mod loss; // pure functions of tensors
pub mod pair; // two towers, and where images and captions meet
pub mod autoencoder; // the parts above, put together for pixels
