//! The CUDA half of the bridge: streams, events, graphs, memory and devices.
//!
//! It is a shared object of its own ([`FILE`]), so that one program serves machines with and without CUDA.
//! [`open_cuda`](super::open_cuda) opens it after libtorch's own half, from beside the program or, for programs that
//! cargo puts into a folder below (tests), from one folder up: `build.rs` lays it beside the program wherever it finds
//! the CUDA headers, `launch/bundle` carries it there, and whoever copies the program copies it too. One that was not
//! compiled from the sources of this very program is refused. Where it is not open, or no device is usable, every call returns a fault that begins with
//! `no CUDA here`.

mod event;
mod graph;
mod stream;
mod table;

pub use event::Event;
pub use graph::{Graph, Pool};
pub use stream::{Entered, Priority, Stream, record_stream};

use super::reason;
use crate::fault::{Fault, Result};
use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use table::{RawDevice, RawMemory, Table};

unsafe extern "C" {
    fn occlude_open_half(path: *const c_char, table: *mut *const c_void) -> bool;
}

/// The file of the CUDA half, named by a digest of its sources.
pub const FILE: &str = concat!("libocclude_cuda-", env!("OCCLUDE_CUDA_VERSION"), ".so");

struct Half {
    path: PathBuf,
    table: &'static Table,
}

static HALF: OnceLock<Result<Half, String>> = OnceLock::new();

/// Opens the half, once for the process; `libtorch_cuda` is whether libtorch's own is open.
pub(super) fn open(libtorch_cuda: bool) {
    HALF.get_or_init(|| match libtorch_cuda {
        true => find(),
        false => Err("libtorch has no CUDA half".to_string()),
    });
}

/// Where the half may lie, the first that exists.
fn find() -> Result<Half, String> {
    let program = std::env::current_exe().map_err(|error| format!("the program does not find itself: {error}"))?;
    let folders = program.ancestors().skip(1).take(2);
    match folders.map(|folder| folder.join(FILE)).find(|path| path.exists()) {
        Some(path) => load(&path).map(|table| Half { path, table }),
        None => Err(format!(
            "{FILE} is not beside the program, which was built without the CUDA headers or copied without it"
        )),
    }
}

fn load(path: &Path) -> Result<&'static Table, String> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| "a path with a NUL in it".to_string())?;
    let mut table = std::ptr::null();
    // SAFETY: a C string, and a place for a pointer. The half is ours and its constructors do nothing but what
    // libtorch's headers define.
    if !unsafe { occlude_open_half(name.as_ptr(), &mut table) } {
        return Err(format!("{FILE} does not open: {}", reason()));
    }
    // SAFETY: whatever its version, the table begins with two numbers and lives as long as the process.
    let [version, size] = unsafe { *table.cast::<[u64; 2]>() };
    if format!("{version:016x}") != env!("OCCLUDE_CUDA_VERSION") || size != size_of::<Table>() as u64 {
        return Err(format!("{} is from another build than the program: build anew", path.display()));
    }
    // SAFETY: compiled from the sources that this program was built with, and as long as the mirror.
    Ok(unsafe { &*table.cast::<Table>() })
}

/// The file that the half was opened from.
///
/// # Errors
/// `no CUDA here`, and why it is not open.
pub fn opened() -> Result<&'static Path> {
    half().map(|half| half.path.as_path())
}

fn half() -> Result<&'static Half> {
    let why = match HALF.get() {
        Some(Ok(half)) => return Ok(half),
        Some(Err(why)) => why,
        None => "open_cuda was not called",
    };
    Err(Fault::failed(format!("no CUDA here: {why}")))
}

/// Calls a function of the table.
fn call(what: &str, body: impl FnOnce(&Table) -> bool) -> Result<()> {
    let table = half()?.table;
    if body(table) {
        return Ok(());
    }
    // SAFETY: a C string that lives until this thread's next call; it is copied.
    let text = unsafe { CStr::from_ptr((table.reason)()) }.to_string_lossy().into_owned();
    let text = text.lines().next().unwrap_or("no reason given");
    Err(Fault::failed(if text.starts_with("no CUDA here") { text.to_string() } else { format!("{what}: {text}") }))
}

/// A CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub multiprocessors: usize,
    /// Bytes.
    pub memory: u64,
    /// Compute capability: (9, 0) is Hopper.
    pub capability: (u32, u32),
}

/// What device `index` is.
pub fn device(index: usize) -> Result<Device> {
    let mut found = RawDevice { name: [0; 256], multiprocessors: 0, memory: 0, major: 0, minor: 0 };
    // SAFETY: a structure to be written; the name ends with a NUL.
    call("a device's properties", |table| unsafe { (table.device_properties)(index as i64, &mut found) })?;
    // SAFETY: as above.
    let name = unsafe { CStr::from_ptr(found.name.as_ptr()) }.to_string_lossy().into_owned();
    let RawDevice { multiprocessors, memory, major, minor, .. } = found;
    Ok(Device {
        name,
        multiprocessors: multiprocessors as usize,
        memory: memory as u64,
        capability: (major as u32, minor as u32),
    })
}

/// The device of this thread: where CUDA looks when nothing names another. 0 until it is changed.
pub fn current_device() -> Result<usize> {
    let mut index = 0;
    // SAFETY: a number to be written.
    call("the current device", |table| unsafe { (table.device_current)(&mut index) })?;
    Ok(index as usize)
}

/// Makes device `index` this thread's current one.
pub fn use_device(index: usize) -> Result<()> {
    // SAFETY: a plain number.
    call("making a device current", |table| unsafe { (table.device_make_current)(index as i64) })
}

/// Waits for everything that device `index` was given to do.
pub fn synchronize(index: usize) -> Result<()> {
    // SAFETY: a plain number.
    call("waiting for the device", |table| unsafe { (table.synchronize)(index as i64) })
}

/// libtorch's memory on a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Held by tensors, now and at most.
    pub allocated: u64,
    pub peak_allocated: u64,
    /// Taken from the device, now and at most; the rest is kept for the next tensors.
    pub reserved: u64,
    pub peak_reserved: u64,
}

/// The memory of device `index`, peaks since the start or the last [`reset_peak`].
pub fn memory(index: usize) -> Result<Memory> {
    let mut found = RawMemory::default();
    // SAFETY: a structure to be written.
    call("memory statistics", |table| unsafe { (table.memory_stats)(index as i64, &mut found) })?;
    let RawMemory { allocated, peak_allocated, reserved, peak_reserved } = found;
    let [allocated, peak_allocated, reserved, peak_reserved] =
        [allocated, peak_allocated, reserved, peak_reserved].map(|bytes| bytes as u64);
    Ok(Memory { allocated, peak_allocated, reserved, peak_reserved })
}

/// Lets the peaks of device `index` begin again at what is used now.
pub fn reset_peak(index: usize) -> Result<()> {
    // SAFETY: a plain number.
    call("memory statistics", |table| unsafe { (table.memory_reset_peak)(index as i64) })
}

/// Gives memory that no tensor uses back to the devices.
pub fn empty_cache() -> Result<()> {
    // SAFETY: no arguments.
    call("emptying the cache", |table| unsafe { (table.empty_cache)() })
}
