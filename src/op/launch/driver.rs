//! Kernels on a GPU: loaded once a device, launched on libtorch's current stream.

use super::nvrtc::cubin;
use super::{Argument, Launch};
use crate::bridge::cuda::Stream;
use crate::fault::{Fault, Result};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::{LazyLock, Mutex, PoisonError};

/// A loaded kernel's handle, which the driver lets any thread use.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);
// SAFETY: the driver's handles belong to a context, not to a thread.
unsafe impl Send for Function {}

/// Loaded kernels by device, variant and name. Modules stay loaded until the process ends.
static LOADED: LazyLock<Mutex<HashMap<String, Function>>> = LazyLock::new(Mutex::default);

/// Launches without waiting. A fault where the program cannot be had or the driver refuses; what goes wrong while it
/// runs, libtorch's next look at the device tells.
pub(super) fn launch(launch: &Launch, arguments: &[Argument], device: usize) -> Result<()> {
    enter(device)?;
    let function = function(launch, device)?;
    let mut values: Vec<u64> = arguments.iter().map(pass).collect();
    let mut places: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
    let stream = Stream::current(device)?;
    let ([x, y, z], none) = (launch.grid, std::ptr::null_mut());
    // SAFETY: one place for each of the kernel's parameters, each of at most eight bytes; the caller's tensors are on
    // this device, and libtorch's allocator keeps their memory in the order of its stream.
    let result = unsafe {
        sys::cuLaunchKernel(
            function.0,
            x,
            y,
            z,
            launch.threads,
            1,
            1,
            launch.shared as u32,
            stream.raw().cast(),
            places.as_mut_ptr(),
            none,
        )
    };
    checked(result, "launch")
}

/// Makes the device's context, libtorch's own, this thread's where it has none or another device's: a thread that has been
/// handed tensors and has asked nothing of CUDA yet has none, and libtorch gives it one only when it must.
fn enter(device: usize) -> Result<()> {
    let (mut current, mut handle, mut context) = (0, 0, std::ptr::null_mut());
    // SAFETY: plain questions to the driver, which libtorch has initialised; the primary context that libtorch holds is
    // held once more, for good.
    unsafe {
        if sys::cuCtxGetDevice(&mut current) == sys::CUresult::CUDA_SUCCESS && current == device as i32 {
            return Ok(());
        }
        checked(sys::cuDeviceGet(&mut handle, device as i32), "the device")?;
        checked(sys::cuDevicePrimaryCtxRetain(&mut context, handle), "the device's context")?;
        checked(sys::cuCtxSetCurrent(context), "making the device's context current")
    }
}

/// Lets this thread load programs while it captures a graph, as long as this lives: a load is no work of the stream's, and
/// yet the driver refuses it during a capture that is not relaxed.
struct Relaxed(sys::CUstreamCaptureMode);

impl Relaxed {
    fn new() -> Result<Relaxed> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: this thread's mode, exchanged for the one given.
        checked(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }, "the mode of captures")?;
        Ok(Relaxed(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as above. What was taken is given back; the driver has no reason to refuse what it gave.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

fn pass(argument: &Argument) -> u64 {
    match *argument {
        Argument::Tensor(tensor) => tensor.data_ptr() as u64,
        Argument::Absent => 0,
        Argument::I32(value) => u64::from(value as u32),
        Argument::I64(value) => value as u64,
        Argument::U64(value) => value,
        Argument::F32(value) => u64::from(value.to_bits()),
    }
}

fn function(launch: &Launch, device: usize) -> Result<Function> {
    let key = format!("{device} {} {:?} {}", launch.source.name, launch.variant, launch.entry);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = loaded.get(&key) {
        return Ok(*function);
    }
    let bytes = cubin(launch.source, &launch.variant, &architecture(device)?)?;
    let name = CString::new(launch.entry).expect("a name without NUL");
    let _relaxed = Relaxed::new()?;
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the bytes are a cubin, which the driver copies, and the device's context is current.
    unsafe {
        checked(sys::cuModuleLoadData(&mut module, bytes.as_ptr().cast()), "loading the program")?;
        checked(sys::cuModuleGetFunction(&mut function, module, name.as_ptr()), "finding the kernel in its program")?;
        // Without asking, a kernel may have 48 KiB.
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let optin = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        checked(sys::cuFuncSetAttribute(function, most, attribute(device, optin)?), "asking for all shared memory")?;
    }
    loaded.insert(key, Function(function));
    Ok(Function(function))
}

/// What programs for a device are compiled for: its own architecture, with the features that only it has.
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
    let (mut handle, mut value) = (0, 0);
    // SAFETY: plain questions to the driver, which libtorch has initialised.
    unsafe {
        checked(sys::cuDeviceGet(&mut handle, device as i32), "the device")?;
        checked(sys::cuDeviceGetAttribute(&mut value, attribute, handle), "what the device can do")?;
    }
    Ok(value)
}

fn checked(result: sys::CUresult, what: &str) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver answers with a C string that it keeps, or with null.
    let reason = unsafe {
        sys::cuGetErrorString(result, &mut text);
        if text.is_null() { "no reason given".into() } else { CStr::from_ptr(text).to_string_lossy() }
    };
    Err(Fault::failed(format!("{what}: {reason} ({result:?})")))
}
