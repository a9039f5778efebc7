//! Tests of the methods, one file each, against other implementations.

crate::modules![
    every_method,
    mae,
    videomae,
    audiomae,
    audio_padding,
    omnimae,
    flip,
    captioned_images,
    supmae,
    maskfeat,
    mfm,
    rmae,
    igpt,
    contrastive_mae,
];
