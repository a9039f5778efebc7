//! From a kernel's source to its launch: compiled by NVRTC for a GPU, or by the C++ compiler for the emulator that runs
//! the same source on a CPU, in tests.
//!
//! A source is compiled once a variant, where a variant is a list of macros such as the element type. Programs are kept
//! in the user's cache folder under a digest of all that they are made from, and are looked for beside the program first
//! (`kernels/`), where a bundle has them. Whoever works on a kernel sets `OCCLUDE_KERNELS` to the folder of sources: they
//! are read from there, and the program need not be compiled again.

mod driver;
mod emulator;
mod nvrtc;
pub mod occupancy; // how many blocks of a kernel a multiprocessor holds
mod planned;

pub use nvrtc::{Compiled, Resources, compile, file_name};
pub use planned::{Planned, planned};

use crate::fault::{Fault, Result};
use std::borrow::Cow;
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

/// What sources include: name and text.
const HEADERS: [(&str, &str); 2] = [
    ("device.cuh", include_str!("../../../kernels/device.cuh")),
    ("attention.cuh", include_str!("../../../kernels/attention.cuh")),
];
/// What the emulator adds.
const HOST: [(&str, &str); 1] = [("host/emulator.hpp", include_str!("../../../kernels/host/emulator.hpp"))];

/// The architectures that are compiled for in tests and bundles: Ampere, Hopper, Blackwell.
pub const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];

/// The macros that make one variant of a source: names and values.
pub type Variant = Vec<(&'static str, String)>;

/// A file of kernels.
pub struct Source {
    /// That of the operation, and of `kernels/<name>.cu`.
    pub name: &'static str,
    /// What the file holds.
    pub built_in: &'static str,
    /// Every variant that launches ask for.
    pub variants: fn() -> Vec<Variant>,
}

/// A file of kernels, as it was built in or as it lies under OCCLUDE_KERNELS.
fn text(name: &str, built_in: &'static str) -> Result<Cow<'static, str>> {
    let Some(folder) = std::env::var_os("OCCLUDE_KERNELS") else { return Ok(built_in.into()) };
    let path = PathBuf::from(folder).join(name);
    let text = std::fs::read_to_string(&path).map_err(|error| Fault::disk(path.display(), error))?;
    Ok(text.into())
}

impl Source {
    fn text(&self) -> Result<Cow<'static, str>> {
        text(&format!("{}.cu", self.name), self.built_in)
    }
}

/// The one variant of a source without macros.
pub fn plain() -> Vec<Variant> {
    vec![Variant::new()]
}

/// The variants of a source whose macro `ELEMENT` is its element type.
pub fn by_type(types: &[Kind]) -> Vec<Variant> {
    types.iter().map(|kind| vec![("ELEMENT", type_name(*kind).to_owned())]).collect()
}

/// The variant of a source whose macro `ELEMENT` is its element type and `WIDE` the neighbours that it moves at a time,
/// for rows of `width` elements.
pub fn by_width(kind: Kind, width: i64) -> Variant {
    vec![("ELEMENT", type_name(kind).to_owned()), ("WIDE", wide(kind, width).to_string())]
}

/// Neighbours that are moved at a time: 16 bytes where a row of `width` holds a whole number of them, else one.
pub fn wide(kind: Kind, width: i64) -> i64 {
    let most = 16 / kind.elt_size_in_bytes() as i64;
    if width % most == 0 { most } else { 1 }
}

/// What kernels call a kind of number.
///
/// # Panics
/// Where no kernel knows it.
pub fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Uint8 => "u8",
        Kind::Int64 => "i64",
        Kind::Half => "f16",
        Kind::BFloat16 => "bf16",
        Kind::Float => "float",
        other => panic!("no kernel computes in {other:?}"),
    }
}

/// What a kernel is given: a contiguous tensor for `Global`, nothing for a `Global` that may be absent, or a number.
#[derive(Clone, Copy)]
pub enum Argument<'a> {
    Tensor(&'a Tensor),
    Absent,
    I32(i32),
    I64(i64),
    U64(u64),
    F32(f32),
}

impl<'a> From<&'a Tensor> for Argument<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Argument::Tensor(tensor)
    }
}

impl<'a> From<Option<&'a Tensor>> for Argument<'a> {
    fn from(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Argument::Absent, Argument::Tensor)
    }
}

macro_rules! number {
    ($($from:ty => $to:ident),*) => {$(
        impl From<$from> for Argument<'_> {
            fn from(number: $from) -> Self {
                Argument::$to(number)
            }
        }
    )*};
}
number!(i32 => I32, i64 => I64, u64 => U64, f32 => F32);

/// How many blocks of `each` hold `n`.
pub fn blocks(n: i64, each: i64) -> u32 {
    u32::try_from((n + each - 1) / each).expect("a grid of less than 2³² blocks")
}

/// One launch of a kernel.
pub struct Launch<'a> {
    pub source: &'a Source,
    pub variant: Variant,
    /// The kernel's name.
    pub entry: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads a block, all in one dimension.
    pub threads: u32,
    /// Bytes of shared memory a block.
    pub shared: usize,
}

impl Launch<'_> {
    /// Launches on the device of the first tensor: on a GPU on libtorch's current stream, without waiting; on a CPU
    /// in the emulator, to the end. A fault where a program cannot be compiled or loaded, where tensors live apart or
    /// are not contiguous, and whatever the emulator found wrong.
    pub fn run(&self, arguments: &[Argument]) -> Result<()> {
        let what = || format!("kernel {}", self.entry);
        let tensors = || arguments.iter().filter_map(|a| if let Argument::Tensor(t) = a { Some(*t) } else { None });
        let device = tensors().next().map(Tensor::device).ok_or_else(|| Fault::failed("a launch without a tensor"))?;
        for tensor in tensors() {
            if tensor.device() != device || !tensor.is_contiguous() {
                let message = format!(
                    "{}: wants contiguous tensors on {device:?}; got {:?} with strides {:?} on {:?}",
                    what(),
                    tensor.size(),
                    tensor.stride(),
                    tensor.device()
                );
                return Err(Fault::failed(message));
            }
        }
        if self.grid.contains(&0) || planned::note(self) {
            return Ok(());
        }
        match device {
            Device::Cuda(index) => driver::launch(self, arguments, index),
            _ => emulator::launch(self, arguments),
        }
        .map_err(|fault| fault.at(what()))
    }
}

/// A digest of everything a program is made from.
fn digest(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// Where compiled programs are kept.
fn cache() -> Result<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_else(std::env::temp_dir);
    let folder = cache.join("occlude/kernels");
    std::fs::create_dir_all(&folder).map_err(|error| Fault::disk(folder.display(), error))?;
    Ok(folder)
}

/// Writes a file whole or not at all, whoever else does so at the same time.
fn keep(path: &std::path::Path, bytes: &[u8]) -> Result<()> {
    let fault = |error| Fault::disk(path.display(), error);
    let open = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&open, bytes).map_err(fault)?;
    std::fs::rename(&open, path).map_err(fault)
}
