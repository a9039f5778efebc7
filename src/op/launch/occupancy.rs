//! How many blocks of a kernel a multiprocessor holds at once, counted as NVIDIA's occupancy calculator counts
//! (`cuda_occupancy.h`): by warps, registers, shared memory and blocks, whichever runs out first.

/// Warps that a multiprocessor holds, at most, on every architecture that kernels are compiled for.
pub const WARPS: u32 = 64;

/// What is handed out: registers to a warp by 256, in four equal parts of the multiprocessor; shared memory to a block by
/// 128 bytes, of which the driver keeps 1 KiB.
const BLOCKS: u32 = 32;
const REGISTERS: u32 = 65536;
const BY_REGISTERS: u32 = 256;
const PARTS: u32 = 4;
const BY_SHARED: u32 = 128;
const KEPT: u32 = 1024;

/// Blocks of `threads` with so many registers a thread and bytes of shared memory a block that one multiprocessor of an
/// architecture such as `sm_90a` holds; none where a block does not fit.
pub fn blocks(architecture: &str, registers: u32, threads: u32, shared: u32) -> u32 {
    // Of a multiprocessor: 164 KiB on Ampere of the data centre, 228 KiB on Hopper and Blackwell; a block gets 1 KiB less.
    let held = if architecture.starts_with("sm_80") { 164 << 10 } else { 228 << 10 };
    let of_block = shared.next_multiple_of(BY_SHARED) + KEPT;
    if of_block > held {
        return 0;
    }
    let warps = threads.div_ceil(32);
    let of_warp = (registers * 32).next_multiple_of(BY_REGISTERS).max(BY_REGISTERS);
    let by_registers = REGISTERS / PARTS / of_warp * PARTS / warps;
    (WARPS / warps).min(by_registers).min(held / of_block).min(BLOCKS)
}

/// The share of the warps that a multiprocessor could hold.
pub fn occupancy(architecture: &str, registers: u32, threads: u32, shared: u32) -> f64 {
    f64::from(blocks(architecture, registers, threads, shared) * threads.div_ceil(32)) / f64::from(WARPS)
}
