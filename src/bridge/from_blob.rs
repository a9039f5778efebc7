//! Tensors over foreign memory, without a copy.

use super::check;
use crate::error::{Error, Result};
use std::ffi::c_void;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn occlude_from_blob(
        out: *mut *mut C_tensor,
        bytes: *mut c_void,
        shape: *const i64,
        dimensions: usize,
        release: extern "C" fn(*mut c_void),
        owner: *mut c_void,
    ) -> bool;
}

extern "C" fn release<T>(owner: *mut c_void) {
    // SAFETY: `owner` came from `Box::into_raw` in `from_blob`, and libtorch calls this once.
    drop(unsafe { Box::from_raw(owner.cast::<T>()) });
}

/// Returns a uint8 CPU tensor over the bytes of `owner`, as `torch::from_blob` does. The owner is dropped, on any
/// thread, together with the last tensor that shares its memory.
///
/// # Errors
/// [`ExitCode::Failed`](crate::error::ExitCode::Failed) if `shape` does not match the number of bytes.
pub fn from_blob<T: AsMut<[u8]> + Send + 'static>(owner: T, shape: &[i64]) -> Result<Tensor> {
    let mut owner = Box::new(owner);
    let bytes = (*owner).as_mut();
    if shape.iter().any(|&side| side < 0) || shape.iter().product::<i64>() != bytes.len() as i64 {
        return Err(Error::failed(format!("{} bytes make no tensor of the shape {shape:?}", bytes.len())));
    }
    if bytes.is_empty() {
        return Ok(Tensor::f_zeros(shape, (Kind::Uint8, Device::Cpu))?);
    }
    let bytes: *mut c_void = bytes.as_mut_ptr().cast();
    let owner = Box::into_raw(owner).cast();
    let mut out = std::ptr::null_mut();
    // SAFETY: the bytes live in the boxed owner, which nothing else touches until libtorch releases it; `shape` lives
    // through the call. After a failure it is unknown whether libtorch took the owner, so it is leaked.
    unsafe {
        check(
            occlude_from_blob(&mut out, bytes, shape.as_ptr(), shape.len(), release::<T>, owner),
            "a tensor over bytes",
        )?;
        Ok(Tensor::from_ptr(out))
    }
}
