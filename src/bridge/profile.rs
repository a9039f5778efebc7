//! What libtorch runs, and our scopes among it ([`scope`](super::record::scope)), for a Chrome trace or for Nsight
//! Systems.

use super::checked;
use crate::fault::{Fault, Result};
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

/// Records what this thread, and backward for it, does: libtorch's operations and our scopes.
pub struct Trace {
    /// The profiler belongs to the thread that began it.
    _this_thread: PhantomData<*const ()>,
}

impl Trace {
    /// Begins to record; on a GPU its kernels too, where CUPTI lets them be seen. One at a time.
    pub fn begin(cuda: bool) -> Result<Trace> {
        // SAFETY: a plain value.
        checked(unsafe { occlude_trace_begin(cuda) }, "a trace")?;
        Ok(Trace { _this_thread: PhantomData })
    }

    /// Writes what was recorded as JSON in the form of Chrome's trace viewer.
    pub fn end(self, path: &Path) -> Result<()> {
        std::mem::forget(self);
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Fault::usage("a path with a NUL in it"));
        // SAFETY: a C string or null.
        let ended = |path: *const c_char| checked(unsafe { occlude_trace_end(path) }, "a trace");
        match name {
            Ok(name) => ended(name.as_ptr()),
            Err(fault) => ended(std::ptr::null()).and(Err(fault)),
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // SAFETY: null: what was recorded is thrown away. Whatever ended the work is the news, not this.
        let _ = unsafe { occlude_trace_end(std::ptr::null()) };
    }
}

/// While it lives, libtorch's operations and our scopes are NVTX ranges, which `nsys profile` shows.
pub struct Nvtx {
    _this_thread: PhantomData<*const ()>,
}

impl Nvtx {
    /// # Errors
    /// Where libtorch's CUDA half, which knows NVTX, is not open.
    pub fn begin() -> Result<Nvtx> {
        // SAFETY: no arguments.
        checked(unsafe { occlude_nvtx_begin() }, "NVTX ranges")?;
        Ok(Nvtx { _this_thread: PhantomData })
    }
}

impl Drop for Nvtx {
    fn drop(&mut self) {
        // SAFETY: no arguments; it was begun on this thread.
        let _ = unsafe { occlude_nvtx_end() };
    }
}
