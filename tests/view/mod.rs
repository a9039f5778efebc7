//! Tests of the views: crops, augmentation, spectrograms, mixing.

crate::modules![crop, augment, timm_parity, mixup, log_mel, spectrogram_speed,];
