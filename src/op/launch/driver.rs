//! Runs kernels on a GPU: loaded once per device, launched on libtorch's current stream.

use super::nvrtc::cubin;
use super::{Argument, Launch};
use crate::bridge::cuda::Stream;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::{LazyLock, Mutex, PoisonError};

/// Handle of a loaded kernel, which the driver allows any thread to use.
#[derive(Clone, Copy)]
struct KernelHandle(sys::CUfunction);
// SAFETY: the driver's handles belong to a context, not to a thread.
unsafe impl Send for KernelHandle {}

/// Loaded kernels by device, variant and name. Modules stay loaded until the process ends.
static LOADED: LazyLock<Mutex<HashMap<String, KernelHandle>>> = LazyLock::new(Mutex::default);

/// Launches asynchronously. Errors during execution are reported by libtorch's next synchronization with the device.
///
/// # Errors
/// If the program does not compile or load, or if the driver refuses the launch.
pub(super) fn launch(launch: &Launch, arguments: &[Argument], device: usize) -> Result<()> {
    ensure_context(device)?;
    let kernel = load(launch, device)?;
    let mut values: Vec<u64> = arguments.iter().map(to_bits).collect();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
    let stream = Stream::current(device)?;
    let [x, y, z] = launch.grid;
    // SAFETY: one pointer per parameter of the kernel, to at most eight bytes each; the tensors are on this device, and
    // libtorch's allocator keeps their memory alive in stream order.
    let result = unsafe {
        sys::cuLaunchKernel(
            kernel.0,
            x,
            y,
            z,
            launch.threads,
            1,
            1,
            launch.shared_bytes as u32,
            stream.raw().cast(),
            pointers.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    check(result, "launch")
}

/// Makes the primary context of the device, which libtorch uses too, current on this thread if it is not. A thread that
/// has not called CUDA yet has no context, and libtorch sets one only on demand.
fn ensure_context(device: usize) -> Result<()> {
    let mut current = 0;
    let mut handle = 0;
    let mut context = std::ptr::null_mut();
    // SAFETY: plain queries of the driver, which libtorch has initialized; the additional reference to the primary
    // context is never released.
    unsafe {
        if sys::cuCtxGetDevice(&mut current) == sys::CUresult::CUDA_SUCCESS && current == device as i32 {
            return Ok(());
        }
        check(sys::cuDeviceGet(&mut handle, device as i32), "getting the device")?;
        check(sys::cuDevicePrimaryCtxRetain(&mut context, handle), "retaining the device's context")?;
        check(sys::cuCtxSetCurrent(context), "making the device's context current")
    }
}

/// Guard that allows this thread to load modules while it captures a graph. Loading is not part of the captured stream,
/// but the driver refuses it during a capture whose mode is not relaxed.
struct RelaxedCapture(sys::CUstreamCaptureMode);

impl RelaxedCapture {
    fn new() -> Result<RelaxedCapture> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges this thread's mode for the given one.
        check(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }, "setting the capture mode")?;
        Ok(RelaxedCapture(mode))
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        // SAFETY: as above. Restores the previous mode, which the driver accepts.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

fn to_bits(argument: &Argument) -> u64 {
    match *argument {
        Argument::Tensor(tensor) => tensor.data_ptr() as u64,
        Argument::Absent => 0,
        Argument::I32(value) => u64::from(value as u32),
        Argument::I64(value) => value as u64,
        Argument::U64(value) => value,
        Argument::F32(value) => u64::from(value.to_bits()),
    }
}

/// Returns the kernel of a launch, loaded if necessary.
fn load(launch: &Launch, device: usize) -> Result<KernelHandle> {
    let key = format!("{device} {} {:?} {}", launch.source.name, launch.variant, launch.entry);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernel) = loaded.get(&key) {
        return Ok(*kernel);
    }
    let bytes = cubin(launch.source, &launch.variant, &architecture(device)?)?;
    let name = CString::new(launch.entry).expect("a name without NUL");
    let _relaxed = RelaxedCapture::new()?;
    let mut module = std::ptr::null_mut();
    let mut function = std::ptr::null_mut();
    // SAFETY: the bytes are a cubin, which the driver copies, and the device's context is current.
    unsafe {
        check(sys::cuModuleLoadData(&mut module, bytes.as_ptr().cast()), "loading the module")?;
        check(sys::cuModuleGetFunction(&mut function, module, name.as_ptr()), "finding the kernel in its module")?;
        // The default limit of dynamic shared memory is 48 KiB.
        let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let max_bytes = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let max_bytes = attribute(device, max_bytes)?;
        check(sys::cuFuncSetAttribute(function, limit, max_bytes), "raising the limit of shared memory")?;
    }
    loaded.insert(key, KernelHandle(function));
    Ok(KernelHandle(function))
}

/// Returns the architecture that programs for a device are compiled for, with architecture-specific features.
fn architecture(device: usize) -> Result<String> {
    let major = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(match (major, minor) {
        // Programs for 8.0 run on every 8.x.
        (8, _) => "sm_80".into(),
        (9, 0) => "sm_90a".into(),
        (10, 0) => "sm_100a".into(),
        _ => format!("sm_{major}{minor}"),
    })
}

fn attribute(device: usize, attribute: sys::CUdevice_attribute) -> Result<i32> {
    let mut handle = 0;
    let mut value = 0;
    // SAFETY: plain queries of the driver, which libtorch has initialized.
    unsafe {
        check(sys::cuDeviceGet(&mut handle, device as i32), "getting the device")?;
        check(sys::cuDeviceGetAttribute(&mut value, attribute, handle), "querying the device")?;
    }
    Ok(value)
}

fn check(result: sys::CUresult, action: &str) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver returns a static C string, or null.
    let reason = unsafe {
        sys::cuGetErrorString(result, &mut text);
        if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy() }
    };
    Err(Error::failed(format!("{action}: {reason} ({result:?})")))
}
