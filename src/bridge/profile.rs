//! Profiles of libtorch's operations and of this program's scopes ([`scope`](super::record::scope)): Chrome traces, and
//! NVTX ranges for Nsight Systems.

use super::check;
use crate::error::{Error, Result};
use std::ffi::{CString, c_char};
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

unsafe extern "C" {
    fn occlude_trace_begin(cuda: bool) -> bool;
    fn occlude_trace_end(path: *const c_char) -> bool;
    fn occlude_nvtx_begin() -> bool;
    fn occlude_nvtx_end() -> bool;
}

/// libtorch's profiler (Kineto): records the operations and scopes of its thread and of the thread's backward passes.
pub struct Profiler {
    /// The profiler belongs to the thread that started it.
    _this_thread: PhantomData<*const ()>,
}

impl Profiler {
    /// Starts to record; with `cuda` also the kernels of the GPU, if CUPTI is permitted. There can be one at a time.
    pub fn start(cuda: bool) -> Result<Profiler> {
        // SAFETY: a plain value.
        check(unsafe { occlude_trace_begin(cuda) }, "a trace")?;
        Ok(Profiler { _this_thread: PhantomData })
    }

    /// Stops and writes the trace as JSON for Chrome's trace viewer.
    pub fn save(self, path: &Path) -> Result<()> {
        let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
            return Err(Error::usage("a path with a NUL in it"));
        };
        std::mem::forget(self);
        // SAFETY: a C string.
        check(unsafe { occlude_trace_end(path.as_ptr()) }, "a trace")
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        // SAFETY: null discards the records. An error here would hide the one that ended the work.
        let _ = unsafe { occlude_trace_end(std::ptr::null()) };
    }
}

/// A guard during whose life libtorch's operations and this program's scopes are NVTX ranges, which `nsys profile`
/// shows.
pub struct NvtxRanges {
    _this_thread: PhantomData<*const ()>,
}

impl NvtxRanges {
    /// Starts to emit NVTX ranges on this thread.
    ///
    /// # Errors
    /// If libtorch_cuda, which implements NVTX, is not loaded.
    pub fn start() -> Result<NvtxRanges> {
        // SAFETY: no arguments.
        check(unsafe { occlude_nvtx_begin() }, "NVTX ranges")?;
        Ok(NvtxRanges { _this_thread: PhantomData })
    }
}

impl Drop for NvtxRanges {
    fn drop(&mut self) {
        // SAFETY: no arguments; started on this thread.
        let _ = unsafe { occlude_nvtx_end() };
    }
}
