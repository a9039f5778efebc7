//! Tests of the operations: plain formulas, and the kernels in the emulator and on a GPU.

crate::modules![
    emulator,
    formula,
    formula_clusters,
    formula_tokens,
    kernel_bias_gelu,
    kernel_attention,
    kernel_tokens,
    kernel_windows,
    kernel_flat,
    kernel_targets,
    nvrtc,
    occupancy,
];
