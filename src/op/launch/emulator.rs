//! Kernels on a CPU: compiled with the C++ compiler against `kernels/host/emulator.hpp`, which checks every access.

use super::{Argument, HEADERS, HOST, Launch, Source, Variant, cache, digest, text};
use crate::fault::{Fault, Result};
use libloading::Library;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

/// One argument as the emulator takes it: a tensor's address and bytes, or a number in the address's place.
#[repr(C)]
struct Passed {
    data: *mut c_void,
    bytes: usize,
}

type Entry = unsafe extern "C" fn(*const Passed, usize, *const u32, u32, u32) -> *const c_char;

/// Opened programs by digest. The lock is held through a launch: the emulator's state is one a program.
static OPEN: LazyLock<Mutex<HashMap<String, Library>>> = LazyLock::new(Mutex::default);

/// Runs a launch to its end. A fault with what the emulator found wrong, and where.
pub(super) fn launch(launch: &Launch, arguments: &[Argument]) -> Result<()> {
    let passed: Vec<Passed> = arguments.iter().map(pass).collect();
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let library = library(&mut open, launch.source, &launch.variant)?;
    let name = format!("{}_entry\0", launch.entry);
    // SAFETY: ENTRY defines this symbol with this signature; its types are checked against the kernel's by C++.
    let entry = unsafe { library.get::<Entry>(name.as_bytes()) };
    let entry = entry.map_err(|error| Fault::failed(format!("no ENTRY({}): {error}", launch.entry)))?;
    // SAFETY: tensors live through the call, which touches none of their bytes but through checked accesses.
    let reason =
        unsafe { entry(passed.as_ptr(), passed.len(), launch.grid.as_ptr(), launch.threads, launch.shared as u32) };
    if reason.is_null() {
        return Ok(());
    }
    // SAFETY: a C string that lives until the next launch, for which the lock is needed.
    Err(Fault::failed(unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned()))
}

fn pass(argument: &Argument) -> Passed {
    let number = |bits: u64| Passed { data: bits as *mut c_void, bytes: 0 };
    match *argument {
        Argument::Tensor(tensor) => {
            Passed { data: tensor.data_ptr(), bytes: tensor.numel() * tensor.kind().elt_size_in_bytes() }
        }
        Argument::Absent => number(0),
        Argument::I32(value) => number(u64::from(value as u32)),
        Argument::I64(value) => number(value as u64),
        Argument::U64(value) => number(value),
        Argument::F32(value) => number(u64::from(value.to_bits())),
    }
}

fn library<'a>(open: &'a mut HashMap<String, Library>, source: &Source, variant: &Variant) -> Result<&'a Library> {
    let macros: Vec<String> = variant.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
    let files = files(source)?;
    let parts: Vec<&str> = files.iter().map(|(_, text)| &**text).chain(macros.iter().map(String::as_str)).collect();
    let key = digest(&parts);
    if !open.contains_key(&key) {
        let path = cache()?.join(format!("{}-{key}.so", source.name));
        if !path.exists() {
            compile(&files, &macros, &path)?;
        }
        // SAFETY: a library that the compiler just made of our own source; it runs nothing when it is opened.
        let library = unsafe { Library::new(&path) };
        open.insert(key.clone(), library.map_err(|error| Fault::failed(format!("{}: {error}", path.display())))?);
    }
    Ok(&open[&key])
}

/// The source and what it includes, by name.
fn files(source: &Source) -> Result<Vec<(String, Cow<'static, str>)>> {
    let included = HEADERS.iter().chain(&HOST).map(|(name, built_in)| Ok(((*name).to_owned(), text(name, built_in)?)));
    std::iter::once(Ok((format!("{}.cu", source.name), source.text()?))).chain(included).collect()
}

fn compile(files: &[(String, Cow<str>)], macros: &[String], path: &Path) -> Result<()> {
    let folder = path.with_extension(format!("{}.src", std::process::id()));
    for (name, text) in files {
        let path = folder.join(name);
        let made = std::fs::create_dir_all(path.parent().expect("a folder"));
        made.and_then(|()| std::fs::write(&path, &**text)).map_err(|error| Fault::disk(path.display(), error))?;
    }
    let file = &files[0].0;
    let made = folder.join("made.so");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    // No library may share the emulator's state with another, hence hidden symbols and no unique ones.
    let flags = "-std=c++20 -O1 -g1 -fPIC -shared -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -Wall -Wno-unused \
                 -Wno-unknown-pragmas -DOCCLUDE_HOST -U_FORTIFY_SOURCE -x c++";
    let mut command = Command::new(&compiler);
    command.current_dir(&folder).args(flags.split(' ').filter(|flag| !flag.is_empty())).args(macros).arg(file);
    let output = command.arg("-o").arg(&made).output();
    let output = output.map_err(|error| Fault::failed(format!("the compiler {compiler} does not start: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Fault::failed(format!("{file} {macros:?} does not compile for the emulator:\n{said}")));
    }
    let moved = std::fs::rename(&made, path).and_then(|()| std::fs::remove_dir_all(&folder));
    moved.map_err(|error| Fault::disk(path.display(), error))
}
