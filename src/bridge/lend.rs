//! A tensor over bytes of ours, and nothing copied.

use super::checked;
use crate::fault::{Fault, Result};
use std::ffi::c_void;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn occlude_lend(
        out: *mut *mut C_tensor,
        bytes: *mut c_void,
        shape: *const i64,
        dimensions: usize,
        give_back: extern "C" fn(*mut c_void),
        owner: *mut c_void,
    ) -> bool;
}

extern "C" fn give_back<T>(owner: *mut c_void) {
    // SAFETY: `owner` came from `Box::into_raw` in `lend`, and libtorch calls this once.
    drop(unsafe { Box::from_raw(owner.cast::<T>()) });
}

/// A uint8 tensor on the CPU over the owner's bytes. It has them to itself: the owner is moved in, and dropped, on
/// whatever thread, with the last tensor that shares the memory. Faults with Code::Failed where `shape` and the bytes
/// are not of one size.
pub fn lend<T: AsMut<[u8]> + Send + 'static>(owner: T, shape: &[i64]) -> Result<Tensor> {
    let mut owner = Box::new(owner);
    let bytes = (*owner).as_mut();
    if shape.iter().any(|&side| side < 0) || shape.iter().product::<i64>() != bytes.len() as i64 {
        return Err(Fault::failed(format!("{} bytes make no tensor of the shape {shape:?}", bytes.len())));
    }
    if bytes.is_empty() {
        return Ok(Tensor::f_zeros(shape, (Kind::Uint8, Device::Cpu))?);
    }
    let bytes: *mut c_void = bytes.as_mut_ptr().cast();
    let owner = Box::into_raw(owner).cast();
    let mut out = std::ptr::null_mut();
    // SAFETY: the bytes live in the boxed owner, which nobody touches until libtorch gives it back; `shape` lives
    // through the call. On failure nobody knows whether libtorch took the owner, and it is never given back.
    unsafe {
        checked(
            occlude_lend(&mut out, bytes, shape.as_ptr(), shape.len(), give_back::<T>, owner),
            "a tensor over bytes",
        )?;
        Ok(Tensor::from_ptr(out))
    }
}
