//! Compiles kernels for a GPU, which does not need a GPU.

use super::{HEADERS, KernelSource, Variant, cache_folder, digest, source_text, write_atomically};
use crate::error::{Error, Result};
use cudarc::nvrtc::sys;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::sync::LazyLock;

/// A program compiled for one architecture.
pub struct CompiledProgram {
    pub cubin: Vec<u8>,
    /// The compiler's report for each kernel.
    pub resources: Vec<Resources>,
}

/// The resources that one kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    pub kernel: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of register spills: stores and loads.
    pub spills: (u32, u32),
}

/// Compiles a variant of a source for an architecture such as `sm_90a`.
///
/// # Errors
/// If NVRTC is missing, or with the compiler's messages.
pub fn compile(source: &KernelSource, variant: &Variant, architecture: &str) -> Result<CompiledProgram> {
    load_nvrtc()?;
    let text = c_string(&source.text()?);
    let name = c_string(&format!("{}.cu", source.name));
    let headers: Vec<CString> = headers()?.iter().map(|text| c_string(text)).collect();
    let header_names: Vec<CString> = HEADERS.iter().map(|(name, _)| c_string(name)).collect();
    let headers = pointers(&headers);
    let header_names = pointers(&header_names);
    let options = options(variant, architecture);
    let options = pointers(&options);
    let mut program = std::ptr::null_mut();
    // SAFETY: every pointer is a C string, or an array of them of the given length, that outlives its call.
    unsafe {
        let count = headers.len() as i32;
        let created = sys::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            count,
            headers.as_ptr(),
            header_names.as_ptr(),
        );
        check(created, "")?;
        let compiled = sys::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        let log = log(program);
        let result = check(compiled, &log).and_then(|()| {
            let mut size = 0;
            check(sys::nvrtcGetCUBINSize(program, &mut size), &log)?;
            let mut cubin = vec![0u8; size];
            check(sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()), &log)?;
            Ok(CompiledProgram { cubin, resources: parse_resources(&log) })
        });
        sys::nvrtcDestroyProgram(&mut program);
        result.map_err(|error| error.with_context(format!("{}.cu {variant:?} for {architecture}", source.name)))
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and macros contain no NUL")
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

fn options(variant: &Variant, architecture: &str) -> Vec<CString> {
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++20".into()];
    options.extend(["--ptxas-options=-v".into(), "--extra-device-vectorization".into()]);
    options.extend(variant.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
    options.iter().map(|option| c_string(option)).collect()
}

/// Loads NVRTC, after its builtins, which NVRTC itself searches only in the system's library folders.
fn load_nvrtc() -> Result<()> {
    static BUILTINS: LazyLock<Option<Library>> = LazyLock::new(|| {
        // SAFETY: a library of NVIDIA that contains data; its initializers have no relevant side effects.
        unsafe { Library::open(Some("libnvrtc-builtins.so.13.0"), RTLD_NOW | RTLD_GLOBAL) }.ok()
    });
    // SAFETY: only checks whether the library can be opened.
    if BUILTINS.is_some() && unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(Error::failed("NVRTC 13.0 is missing: install the CUDA build of torch, which includes it"))
}

/// Returns the cubin of a variant: from the folder next to the program, from the user's cache, or compiled and cached.
pub(super) fn cubin(source: &KernelSource, variant: &Variant, architecture: &str) -> Result<Vec<u8>> {
    let name = cubin_file_name(source, variant, architecture)?;
    let shipped = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("kernels").join(&name)));
    let cached = cache_folder()?.join(&name);
    let mut candidates = shipped.into_iter().chain([cached.clone()]);
    if let Some(bytes) = candidates.find_map(|path: PathBuf| std::fs::read(path).ok()) {
        return Ok(bytes);
    }
    let compiled = compile(source, variant, architecture)?;
    write_atomically(&cached, &compiled.cubin)?;
    Ok(compiled.cubin)
}

/// Returns the file name of a compiled variant.
pub fn cubin_file_name(source: &KernelSource, variant: &Variant, architecture: &str) -> Result<String> {
    let macros: Vec<String> = variant.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let text = source.text()?;
    let headers = headers()?;
    let mut parts = vec![&*text, architecture];
    parts.extend(headers.iter().map(|text| &**text));
    parts.extend(macros.iter().map(String::as_str));
    Ok(format!("{}-{architecture}-{}.cubin", source.name, digest(&parts)))
}

fn headers() -> Result<Vec<Cow<'static, str>>> {
    HEADERS.iter().map(|(name, embedded)| source_text(name, embedded)).collect()
}

fn check(result: sys::nvrtcResult, log: &str) -> Result<()> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: a static C string.
    let reason = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) }.to_string_lossy().into_owned();
    Err(Error::failed(format!("NVRTC: {reason}\n{log}")))
}

/// Returns the compiler's log.
///
/// # Safety
/// `program` must not be destroyed.
unsafe fn log(program: sys::nvrtcProgram) -> String {
    let mut size = 0;
    // SAFETY: guaranteed by the caller; the buffer has the size that NVRTC reports.
    unsafe {
        if sys::nvrtcGetProgramLogSize(program, &mut size) != sys::nvrtcResult::NVRTC_SUCCESS {
            return String::new();
        }
        let mut text = vec![0u8; size];
        sys::nvrtcGetProgramLog(program, text.as_mut_ptr().cast());
        String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned()
    }
}

/// Parses the assembler's report for each kernel.
fn parse_resources(log: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
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

fn number_before(line: &str, word: &str) -> Option<u32> {
    line.split_once(word)?.0.split_whitespace().next_back()?.parse().ok()
}
