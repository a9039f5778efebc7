//! Runs kernels on a CPU: compiled with the C++ compiler against `kernels/host/emulator.hpp`, which checks every
//! access.

use super::{Argument, HEADERS, HOST, KernelSource, Launch, Variant, cache_folder, digest, source_text};
use crate::error::{Error, Result};
use libloading::Library;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// A lock for each variant by digest, so that it is compiled once.
static COMPILING: LazyLock<Mutex<HashMap<String, Arc<Mutex<()>>>>> = LazyLock::new(Mutex::default);

/// One argument in the emulator's form: a tensor's address and bytes, or a number in place of the address.
#[repr(C)]
struct EmulatorArgument {
    data: *mut c_void,
    bytes: usize,
}

type EntryPoint = unsafe extern "C" fn(*const EmulatorArgument, usize, *const u32, u32, u32) -> *const c_char;

/// Loaded programs by digest. The lock is held during a launch, because a program has one emulator state.
static LOADED: LazyLock<Mutex<HashMap<String, Library>>> = LazyLock::new(Mutex::default);

/// Runs a launch to completion. Returns the emulator's message and its location as an error.
pub(super) fn launch(launch: &Launch, arguments: &[Argument]) -> Result<()> {
    let arguments: Vec<EmulatorArgument> = arguments.iter().map(to_emulator_argument).collect();
    let program = Program::compiled(launch.source, &launch.variant)?;
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let library = program.load(&mut loaded)?;
    let name = format!("{}_entry\0", launch.entry);
    // SAFETY: ENTRY defines this symbol with this signature; C++ checks the argument types against the kernel's.
    let entry = unsafe { library.get::<EntryPoint>(name.as_bytes()) };
    let entry = entry.map_err(|error| Error::failed(format!("no ENTRY({}): {error}", launch.entry)))?;
    let grid = launch.grid.as_ptr();
    let shared_bytes = launch.shared_bytes as u32;
    // SAFETY: the tensors outlive the call, which accesses their bytes only through checked accesses.
    let message = unsafe { entry(arguments.as_ptr(), arguments.len(), grid, launch.threads, shared_bytes) };
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a C string that is valid until the next launch, which needs the lock.
    Err(Error::failed(unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()))
}

fn to_emulator_argument(argument: &Argument) -> EmulatorArgument {
    let number = |bits: u64| EmulatorArgument { data: bits as *mut c_void, bytes: 0 };
    match *argument {
        Argument::Tensor(tensor) => {
            let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
            EmulatorArgument { data: tensor.data_ptr(), bytes }
        }
        Argument::Absent => number(0),
        Argument::I32(value) => number(u64::from(value as u32)),
        Argument::I64(value) => number(value as u64),
        Argument::U64(value) => number(value),
        Argument::F32(value) => number(u64::from(value.to_bits())),
    }
}

/// The compiled program of a variant.
struct Program {
    digest: String,
    path: PathBuf,
}

impl Program {
    /// Compiles a variant unless the cache has it. Threads compile different variants at the same time.
    fn compiled(source: &KernelSource, variant: &Variant) -> Result<Program> {
        let macros: Vec<String> = variant.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        let files = files(source)?;
        let parts: Vec<&str> = files.iter().map(|(_, text)| &**text).chain(macros.iter().map(String::as_str)).collect();
        let digest = digest(&parts);
        let path = cache_folder()?.join(format!("{}-{digest}.so", source.name));
        let turn = {
            let mut turns = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
            turns.entry(digest.clone()).or_default().clone()
        };
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        if !path.exists() {
            compile(&files, &macros, &path)?;
        }
        Ok(Program { digest, path })
    }

    fn load(self, loaded: &mut HashMap<String, Library>) -> Result<&Library> {
        if !loaded.contains_key(&self.digest) {
            // SAFETY: the compiler built this library from our own source; it has no initializers with side effects.
            let library = unsafe { Library::new(&self.path) };
            let library = library.map_err(|error| Error::failed(format!("{}: {error}", self.path.display())))?;
            loaded.insert(self.digest.clone(), library);
        }
        Ok(&loaded[&self.digest])
    }
}

/// Returns names and texts of the source and everything it includes.
fn files(source: &KernelSource) -> Result<Vec<(String, Cow<'static, str>)>> {
    let mut files = vec![(format!("{}.cu", source.name), source.text()?)];
    for (name, embedded) in HEADERS.iter().chain(&HOST) {
        files.push(((*name).to_owned(), source_text(name, embedded)?));
    }
    Ok(files)
}

/// Compiles the first of the files to `path`.
fn compile(files: &[(String, Cow<str>)], macros: &[String], path: &Path) -> Result<()> {
    let folder = path.with_extension(format!("{}.src", std::process::id()));
    for (name, text) in files {
        let path = folder.join(name);
        let created = std::fs::create_dir_all(path.parent().expect("the folder of the file"));
        let written = created.and_then(|()| std::fs::write(&path, &**text));
        written.map_err(|error| Error::disk(path.display(), error))?;
    }
    let file = &files[0].0;
    let output_path = folder.join("made.so");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    // Libraries must not share the emulator's state, hence hidden visibility and no unique symbols.
    let flags = "-std=c++20 -O1 -g1 -fPIC -shared -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -Wall -Wno-unused \
                 -Wno-unknown-pragmas -DOCCLUDE_HOST -U_FORTIFY_SOURCE -x c++";
    let mut command = Command::new(&compiler);
    command.current_dir(&folder).args(flags.split_whitespace()).args(macros).arg(file).arg("-o").arg(&output_path);
    let output = command.output();
    let output = output.map_err(|error| Error::failed(format!("the compiler {compiler} does not start: {error}")))?;
    if !output.status.success() {
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::failed(format!("{file} {macros:?} does not compile for the emulator:\n{messages}")));
    }
    let moved = std::fs::rename(&output_path, path).and_then(|()| std::fs::remove_dir_all(&folder));
    moved.map_err(|error| Error::disk(path.display(), error))
}
