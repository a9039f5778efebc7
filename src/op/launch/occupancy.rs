//! Blocks of a kernel per multiprocessor, computed as NVIDIA's occupancy calculator does (`cuda_occupancy.h`): limited
//! by warps, registers, shared memory and blocks, whichever runs out first.

/// Maximum number of warps per multiprocessor, on every architecture that kernels are compiled for.
pub const MAX_WARPS: u32 = 64;

/// Maximum number of blocks per multiprocessor.
const MAX_BLOCKS: u32 = 32;
/// Registers of a multiprocessor, in four equal partitions.
const REGISTERS: u32 = 65536;
const PARTITIONS: u32 = 4;
/// Granularity of a warp's registers, and of a block's shared memory in bytes.
const REGISTER_UNIT: u32 = 256;
const SHARED_UNIT: u32 = 128;
/// Bytes of shared memory per block that the driver reserves.
const RESERVED_SHARED_BYTES: u32 = 1024;

/// Returns the number of blocks of `threads` threads, with the given registers per thread and bytes of shared memory
/// per block, that one multiprocessor of an architecture such as `sm_90a` holds; 0 if a block does not fit.
pub fn blocks_per_multiprocessor(architecture: &str, registers: u32, threads: u32, shared_bytes: u32) -> u32 {
    // Shared memory of a multiprocessor: 164 KiB on A100, 228 KiB on Hopper and Blackwell; a block gets 1 KiB less.
    let available_bytes = if architecture.starts_with("sm_80") { 164 << 10 } else { 228 << 10 };
    let block_bytes = shared_bytes.next_multiple_of(SHARED_UNIT) + RESERVED_SHARED_BYTES;
    if block_bytes > available_bytes {
        return 0;
    }
    let warps = threads.div_ceil(32);
    let warp_registers = (registers * 32).next_multiple_of(REGISTER_UNIT).max(REGISTER_UNIT);
    let by_registers = REGISTERS / PARTITIONS / warp_registers * PARTITIONS / warps;
    (MAX_WARPS / warps).min(by_registers).min(available_bytes / block_bytes).min(MAX_BLOCKS)
}

/// Returns the resident warps as a fraction of the maximum.
pub fn occupancy(architecture: &str, registers: u32, threads: u32, shared_bytes: u32) -> f64 {
    let blocks = blocks_per_multiprocessor(architecture, registers, threads, shared_bytes);
    f64::from(blocks * threads.div_ceil(32)) / f64::from(MAX_WARPS)
}
