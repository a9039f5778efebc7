//! Tests of the methods, one file each, against other implementations.

crate::modules![mae, videomae, audiomae, audio_padding, omnimae, flip, captioned_images,];
