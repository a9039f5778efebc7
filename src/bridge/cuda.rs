//! The CUDA part of the bridge: streams, events, graphs, memory and devices.
//!
//! It is a shared object ([`LIBRARY_FILE`]), so that one program serves machines with and without CUDA.
//! [`load_cuda`](super::load_cuda) loads it after libtorch_cuda, from the folder of the program or, for programs that
//! cargo puts into a subfolder (tests), from the folder above. `build.rs` puts it beside the program if the CUDA
//! headers are installed. A library that was not compiled from the sources of this program is refused. If it is not
//! loaded, or no device is usable, every call returns an error that begins with `no CUDA here`.

mod event;
mod functions;
mod graph;
mod stream;

pub use event::Event;
pub use graph::{Graph, GraphPool};
pub use stream::{Priority, Stream, StreamGuard, record_stream};

use super::last_error;
use crate::error::{Error, Result};
use functions::{CudaFns, RawDeviceProperties, RawMemoryStats};
use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

unsafe extern "C" {
    fn occlude_load_cuda_bridge(path: *const c_char, functions: *mut *const c_void) -> bool;
}

/// File name of the CUDA library of the bridge, with a digest of its sources.
pub const LIBRARY_FILE: &str = concat!("libocclude_cuda-", env!("OCCLUDE_CUDA_VERSION"), ".so");

struct CudaLibrary {
    path: PathBuf,
    functions: &'static CudaFns,
}

/// The library, or why it is not loaded.
static LIBRARY: OnceLock<Result<CudaLibrary, String>> = OnceLock::new();

/// Loads the library, once per process; `libtorch_cuda` says whether libtorch_cuda is loaded.
pub(super) fn load_library(libtorch_cuda: bool) {
    LIBRARY.get_or_init(|| if libtorch_cuda { find_library() } else { Err("this libtorch has no CUDA".to_string()) });
}

/// Loads the first existing file of the candidate folders.
fn find_library() -> Result<CudaLibrary, String> {
    let program =
        std::env::current_exe().map_err(|error| format!("the path of the program cannot be determined: {error}"))?;
    let folders = program.ancestors().skip(1).take(2);
    let Some(path) = folders.map(|folder| folder.join(LIBRARY_FILE)).find(|path| path.exists()) else {
        return Err(format!(
            "{LIBRARY_FILE} is not beside the program, which was built without the CUDA headers or copied without it"
        ));
    };
    load_functions(&path).map(|functions| CudaLibrary { path, functions })
}

fn load_functions(path: &Path) -> Result<&'static CudaFns, String> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| "a path with a NUL in it".to_string())?;
    let mut functions = std::ptr::null();
    // SAFETY: a C string, and a place for a pointer. The library is ours and its constructors do nothing but what
    // libtorch's headers define.
    if !unsafe { occlude_load_cuda_bridge(name.as_ptr(), &mut functions) } {
        return Err(format!("{LIBRARY_FILE} cannot be loaded: {}", last_error()));
    }
    // SAFETY: in every version the table begins with two numbers and lives as long as the process.
    let [version, size] = unsafe { *functions.cast::<[u64; 2]>() };
    if format!("{version:016x}") != env!("OCCLUDE_CUDA_VERSION") || size != size_of::<CudaFns>() as u64 {
        return Err(format!("{} is from another build than the program: rebuild it", path.display()));
    }
    // SAFETY: compiled from the sources that this program was built with, and of the size of its mirror.
    Ok(unsafe { &*functions.cast::<CudaFns>() })
}

/// Returns the file that the library was loaded from.
///
/// # Errors
/// `no CUDA here` and the reason, if it is not loaded.
pub fn library_path() -> Result<&'static Path> {
    library().map(|library| library.path.as_path())
}

fn library() -> Result<&'static CudaLibrary> {
    let reason = match LIBRARY.get() {
        Some(Ok(library)) => return Ok(library),
        Some(Err(reason)) => reason,
        None => "load_cuda was not called",
    };
    Err(Error::failed(format!("no CUDA here: {reason}")))
}

/// Calls a function of the library; `what` names it in an error.
fn call(what: &str, body: impl FnOnce(&CudaFns) -> bool) -> Result<()> {
    let functions = library()?.functions;
    if body(functions) {
        return Ok(());
    }
    // SAFETY: a C string that lives until this thread's next call; it is copied.
    let text = unsafe { CStr::from_ptr((functions.last_error)()) }.to_string_lossy().into_owned();
    let text = text.lines().next().unwrap_or("no reason given");
    Err(Error::failed(if text.starts_with("no CUDA here") { text.to_string() } else { format!("{what}: {text}") }))
}

/// Properties of a CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProperties {
    pub name: String,
    pub multiprocessors: usize,
    /// Memory in bytes.
    pub total_memory: u64,
    /// Compute capability (major, minor): (9, 0) is Hopper.
    pub compute_capability: (u32, u32),
}

/// Returns the properties of device `index`.
pub fn device_properties(index: usize) -> Result<DeviceProperties> {
    let mut raw = RawDeviceProperties { name: [0; 256], multiprocessors: 0, total_memory: 0, major: 0, minor: 0 };
    // SAFETY: a structure to be written; the name ends with a NUL.
    call("a device's properties", |functions| unsafe { (functions.device_properties)(index as i64, &mut raw) })?;
    // SAFETY: as above.
    let name = unsafe { CStr::from_ptr(raw.name.as_ptr()) }.to_string_lossy().into_owned();
    Ok(DeviceProperties {
        name,
        multiprocessors: raw.multiprocessors as usize,
        total_memory: raw.total_memory as u64,
        compute_capability: (raw.major as u32, raw.minor as u32),
    })
}

/// Returns the current device of this thread; initially 0.
pub fn current_device() -> Result<usize> {
    let mut index = 0;
    // SAFETY: a number to be written.
    call("the current device", |functions| unsafe { (functions.current_device)(&mut index) })?;
    Ok(index as usize)
}

/// Makes device `index` the current device of this thread.
pub fn set_device(index: usize) -> Result<()> {
    // SAFETY: a plain number.
    call("making a device current", |functions| unsafe { (functions.set_device)(index as i64) })
}

/// Blocks the calling thread until all work on device `index` has completed.
pub fn synchronize(index: usize) -> Result<()> {
    // SAFETY: a plain number.
    call("waiting for the device", |functions| unsafe { (functions.synchronize)(index as i64) })
}

/// Statistics of libtorch's caching allocator on a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStats {
    /// Memory of live tensors.
    pub allocated: u64,
    pub peak_allocated: u64,
    /// Memory taken from the device, including the cached part.
    pub reserved: u64,
    pub peak_reserved: u64,
}

/// Returns the memory statistics of device `index`, with the peaks since the last [`reset_peak_memory_stats`].
pub fn memory_stats(index: usize) -> Result<MemoryStats> {
    let mut raw = RawMemoryStats::default();
    // SAFETY: a structure to be written.
    call("memory statistics", |functions| unsafe { (functions.memory_stats)(index as i64, &mut raw) })?;
    Ok(MemoryStats {
        allocated: raw.allocated as u64,
        peak_allocated: raw.peak_allocated as u64,
        reserved: raw.reserved as u64,
        peak_reserved: raw.peak_reserved as u64,
    })
}

/// Resets the peaks of device `index` to the current values.
pub fn reset_peak_memory_stats(index: usize) -> Result<()> {
    // SAFETY: a plain number.
    call("memory statistics", |functions| unsafe { (functions.reset_peak_memory_stats)(index as i64) })
}

/// Returns the cached memory that no tensor uses to the devices.
pub fn empty_cache() -> Result<()> {
    // SAFETY: no arguments.
    call("emptying the cache", |functions| unsafe { (functions.empty_cache)() })
}
