//! Tests of the training loop: the step, its modes, and whole trainings as processes.

pub mod toy;

crate::modules![
    step,
    step_mode,
    toy_method,
    gpu_step,
    gpu_parity,
    resume_after_kill,
    resume_other_world,
    stop_requests,
    lost_ranks,
    small_disk,
    remote_store,
    mixed_modalities,
    audio_training,
    color_training,
];
