//! The function table of the CUDA library: `CudaFns` of cuda.cpp, member by member.

use std::ffi::{c_char, c_void};
use torch_sys::C_tensor;

/// A stream as libtorch identifies it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream {
    /// libtorch's stream id, which encodes the pool.
    pub id: i64,
    pub device: i64,
    /// cudaStream_t.
    pub raw: *mut c_void,
}

impl RawStream {
    /// A placeholder for a function to overwrite.
    pub const NULL: RawStream = RawStream { id: 0, device: 0, raw: std::ptr::null_mut() };
}

/// Properties of a device.
#[repr(C)]
pub struct RawDeviceProperties {
    pub name: [c_char; 256],
    pub multiprocessors: i64,
    pub total_memory: i64,
    pub major: i64,
    pub minor: i64,
}

/// Statistics of libtorch's allocator, in bytes.
#[repr(C)]
#[derive(Default)]
pub struct RawMemoryStats {
    pub allocated: i64,
    pub peak_allocated: i64,
    pub reserved: i64,
    pub peak_reserved: i64,
}

/// Id of a memory pool (c10::MempoolId_t).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawGraphPool {
    pub id: [u64; 2],
}

/// c10::cuda::CUDAEvent, opaque.
#[repr(C)]
pub struct RawEvent {
    _opaque: [u8; 0],
}

/// at::cuda::CUDAGraph, opaque.
#[repr(C)]
pub struct RawGraph {
    _opaque: [u8; 0],
}

/// The functions. Each returns false after an error, whose text is `last_error`; destructors return nothing.
#[repr(C)]
pub struct CudaFns {
    pub version: u64,
    pub size: u64,
    pub last_error: unsafe extern "C" fn() -> *const c_char,
    pub current_device: unsafe extern "C" fn(*mut i64) -> bool,
    pub set_device: unsafe extern "C" fn(i64) -> bool,
    pub stream_current: unsafe extern "C" fn(i64, *mut RawStream) -> bool,
    pub stream_set_current: unsafe extern "C" fn(*const RawStream) -> bool,
    pub stream_from_pool: unsafe extern "C" fn(i64, bool, *mut RawStream) -> bool,
    pub stream_external: unsafe extern "C" fn(*mut c_void, i64, *mut RawStream) -> bool,
    pub stream_synchronize: unsafe extern "C" fn(*const RawStream) -> bool,
    pub stream_is_capturing: unsafe extern "C" fn(*const RawStream, *mut bool) -> bool,
    pub record_stream: unsafe extern "C" fn(*const C_tensor, *const RawStream) -> bool,
    pub synchronize: unsafe extern "C" fn(i64) -> bool,
    pub event_create: unsafe extern "C" fn(bool, *mut *mut RawEvent) -> bool,
    pub event_record: unsafe extern "C" fn(*mut RawEvent, *const RawStream) -> bool,
    pub event_block: unsafe extern "C" fn(*mut RawEvent, *const RawStream) -> bool,
    pub event_query: unsafe extern "C" fn(*const RawEvent, *mut bool) -> bool,
    pub event_synchronize: unsafe extern "C" fn(*const RawEvent) -> bool,
    pub event_elapsed: unsafe extern "C" fn(*const RawEvent, *const RawEvent, *mut f32) -> bool,
    pub event_destroy: unsafe extern "C" fn(*mut RawEvent),
    pub pool_create: unsafe extern "C" fn(*mut RawGraphPool) -> bool,
    pub graph_create: unsafe extern "C" fn(*mut *mut RawGraph) -> bool,
    pub graph_capture_begin: unsafe extern "C" fn(*mut RawGraph, *const RawGraphPool) -> bool,
    pub graph_capture_end: unsafe extern "C" fn(*mut RawGraph) -> bool,
    pub graph_replay: unsafe extern "C" fn(*mut RawGraph) -> bool,
    pub graph_reset: unsafe extern "C" fn(*mut RawGraph) -> bool,
    pub graph_destroy: unsafe extern "C" fn(*mut RawGraph),
    pub empty_cache: unsafe extern "C" fn() -> bool,
    pub memory_stats: unsafe extern "C" fn(i64, *mut RawMemoryStats) -> bool,
    pub reset_peak_memory_stats: unsafe extern "C" fn(i64) -> bool,
    pub device_properties: unsafe extern "C" fn(i64, *mut RawDeviceProperties) -> bool,
}
