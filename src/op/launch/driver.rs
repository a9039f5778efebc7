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
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the bytes are a cubin, which the driver copies; a tensor on the device shows that its context is current.
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
