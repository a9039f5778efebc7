//! Kernels compiled for a GPU, which takes no GPU.

use super::{HEADERS, Source, Variant, cache, digest, keep, text};
use crate::fault::{Fault, Result};
use cudarc::nvrtc::sys;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::sync::LazyLock;

/// A program for one architecture.
pub struct Compiled {
    pub cubin: Vec<u8>,
    /// What the compiler says of each kernel.
    pub resources: Vec<Resources>,
}

/// What one kernel takes of a multiprocessor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    pub kernel: String,
    pub registers: u32,
    /// Bytes of registers that went to memory for want of room: stored, and loaded.
    pub spills: (u32, u32),
}

/// Compiles a variant of a source for an architecture such as `sm_90a`. A fault with the compiler's words, or where
/// there is no NVRTC.
pub fn compile(source: &Source, variant: &Variant, architecture: &str) -> Result<Compiled> {
    open()?;
    let c = |text: &str| CString::new(text).expect("sources and macros hold no NUL");
    let (text, name) = (c(&source.text()?), c(&format!("{}.cu", source.name)));
    let (headers, names) =
        (headers()?.iter().map(|text| c(text)).collect::<Vec<_>>(), HEADERS.map(|(name, _)| c(name)));
    let [headers, names] = [&headers[..], &names].map(|all| all.iter().map(|s| s.as_ptr()).collect::<Vec<_>>());
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++20".into()];
    options.extend(["--ptxas-options=-v".into(), "--extra-device-vectorization".into()]);
    options.extend(variant.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
    let options: Vec<CString> = options.iter().map(|option| c(option)).collect();
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: every pointer is a C string, or an array of as many, that lives through its call.
    unsafe {
        let count = headers.len() as i32;
        let made = sys::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            count,
            headers.as_ptr(),
            names.as_ptr(),
        );
        checked(made, "")?;
        let compiled = sys::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        let log = log(program);
        let result = checked(compiled, &log).and_then(|()| {
            let mut size = 0;
            checked(sys::nvrtcGetCUBINSize(program, &mut size), &log)?;
            let mut cubin = vec![0u8; size];
            checked(sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()), &log)?;
            Ok(Compiled { cubin, resources: resources(&log) })
        });
        sys::nvrtcDestroyProgram(&mut program);
        result.map_err(|fault| fault.at(format!("{}.cu {variant:?} for {architecture}", source.name)))
    }
}

/// Opens NVRTC, and first the library that it looks for itself, and only where the system keeps its libraries.
fn open() -> Result<()> {
    static BUILTINS: LazyLock<Option<Library>> = LazyLock::new(|| {
        // SAFETY: a library of NVIDIA's that holds data; opening it runs nothing of note.
        unsafe { Library::open(Some("libnvrtc-builtins.so.13.0"), RTLD_NOW | RTLD_GLOBAL) }.ok()
    });
    // SAFETY: only asks whether the library can be opened.
    if BUILTINS.is_some() && unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(Fault::failed("there is no NVRTC 13.0: install the CUDA build of torch, which brings it"))
}

/// The cubin of a variant, from beside the program, from the user's cache, or compiled now and kept.
pub(super) fn cubin(source: &Source, variant: &Variant, architecture: &str) -> Result<Vec<u8>> {
    let name = file_name(source, variant, architecture)?;
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("kernels").join(&name)));
    let kept = cache()?.join(&name);
    if let Some(bytes) = beside.into_iter().chain([kept.clone()]).find_map(|path: PathBuf| std::fs::read(path).ok()) {
        return Ok(bytes);
    }
    let compiled = compile(source, variant, architecture)?;
    keep(&kept, &compiled.cubin)?;
    Ok(compiled.cubin)
}

/// What the file of a compiled variant is called.
pub fn file_name(source: &Source, variant: &Variant, architecture: &str) -> Result<String> {
    let macros: Vec<String> = variant.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let (text, headers) = (source.text()?, headers()?);
    let mut parts = vec![&*text, architecture];
    parts.extend(headers.iter().map(|text| &**text));
    parts.extend(macros.iter().map(String::as_str));
    Ok(format!("{}-{architecture}-{}.cubin", source.name, digest(&parts)))
}

fn headers() -> Result<Vec<Cow<'static, str>>> {
    HEADERS.iter().map(|(name, built_in)| text(name, built_in)).collect()
}

fn checked(result: sys::nvrtcResult, log: &str) -> Result<()> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: a C string that NVRTC keeps for good.
    let reason = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) }.to_string_lossy().into_owned();
    Err(Fault::failed(format!("NVRTC: {reason}\n{log}")))
}

/// # Safety
/// `program` is alive.
unsafe fn log(program: sys::nvrtcProgram) -> String {
    let mut size = 0;
    // SAFETY: the caller's, and a buffer of the size that was asked for.
    unsafe {
        if sys::nvrtcGetProgramLogSize(program, &mut size) != sys::nvrtcResult::NVRTC_SUCCESS {
            return String::new();
        }
        let mut text = vec![0u8; size];
        sys::nvrtcGetProgramLog(program, text.as_mut_ptr().cast());
        String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned()
    }
}

/// What the assembler's remarks say of each kernel.
fn resources(log: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    let number_before = |line: &str, word: &str| -> Option<u32> {
        line.split_once(word)?.0.split_whitespace().next_back()?.parse().ok()
    };
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            all.push(Resources { kernel, registers: 0, spills: (0, 0) });
        }
        let Some(last) = all.last_mut() else { continue };
        if let Some(stores) = number_before(line, " bytes spill stores") {
            last.spills = (stores, number_before(line, " bytes spill loads").unwrap_or(0));
        }
        if let Some(registers) = number_before(line, " registers") {
            last.registers = registers;
        }
    }
    all
}
