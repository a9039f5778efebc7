//! Kernel sources and their launches: compiled by NVRTC for a GPU, or by the C++ compiler for the emulator, which runs
//! the same source on a CPU in tests.
//!
//! A source is compiled once per variant; a variant is a list of macros such as the element type. Compiled programs are
//! cached in the user's cache folder under a digest of everything they are compiled from; a distribution may ship them
//! in the folder `kernels/` next to the program, which is searched first. Kernel developers set `OCCLUDE_KERNELS` to
//! the folder of sources, which are then read from there without recompiling the program.

mod driver;
mod emulator;
mod nvrtc;
pub mod occupancy; // blocks per multiprocessor
mod planned;

pub use nvrtc::{CompiledProgram, Resources, compile, cubin_file_name};
pub use planned::{PlannedLaunch, record_launches};

use crate::error::{Error, Result};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Names and texts of the headers that sources include.
const HEADERS: [(&str, &str); 3] = [
    ("device.cuh", include_str!("../../../kernels/device.cuh")),
    ("philox.cuh", include_str!("../../../kernels/philox.cuh")),
    ("attention.cuh", include_str!("../../../kernels/attention.cuh")),
];
/// The header of the emulator.
const HOST: [(&str, &str); 1] = [("host/emulator.hpp", include_str!("../../../kernels/host/emulator.hpp"))];

/// The architectures that tests and distributions compile for: Ampere, Hopper, Blackwell.
pub const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];

/// Names and values of the macros of one variant of a source.
pub type Variant = Vec<(&'static str, String)>;

/// A file of kernels.
pub struct KernelSource {
    /// Name of the operation, and of `kernels/<name>.cu`.
    pub name: &'static str,
    /// Text of the file, embedded in the program.
    pub embedded: &'static str,
    /// Returns every variant that is launched.
    pub variants: fn() -> Vec<Variant>,
}

/// Returns the text of a kernel file, embedded or from the folder OCCLUDE_KERNELS.
fn source_text(name: &str, embedded: &'static str) -> Result<Cow<'static, str>> {
    let Some(folder) = std::env::var_os("OCCLUDE_KERNELS") else { return Ok(embedded.into()) };
    let path = PathBuf::from(folder).join(name);
    let text = std::fs::read_to_string(&path).map_err(|error| Error::disk(path.display(), error))?;
    Ok(text.into())
}

impl KernelSource {
    fn text(&self) -> Result<Cow<'static, str>> {
        source_text(&format!("{}.cu", self.name), self.embedded)
    }
}

/// Returns the one variant of a source without macros.
pub fn single_variant() -> Vec<Variant> {
    vec![Variant::new()]
}

/// Returns the variants of a source whose only macro is the element type, `ELEMENT`.
pub fn variants_by_type(types: &[Kind]) -> Vec<Variant> {
    types.iter().map(|kind| vec![("ELEMENT", type_name(*kind).to_owned())]).collect()
}

/// Returns the variant, for rows of `width` elements, of a source whose macros are the element type, `ELEMENT`, and the
/// elements per load and store, `WIDE`.
pub fn variant_by_width(kind: Kind, width: i64) -> Variant {
    vec![("ELEMENT", type_name(kind).to_owned()), ("WIDE", vector_width(kind, width).to_string())]
}

/// Returns the elements per load and store: 16 bytes if a row of `width` elements is a multiple of them, else one
/// element.
pub fn vector_width(kind: Kind, width: i64) -> i64 {
    let max_width = 16 / kind.elt_size_in_bytes() as i64;
    if width % max_width == 0 { max_width } else { 1 }
}

/// Returns the name of a dtype in kernels.
///
/// # Panics
/// If kernels do not support the dtype.
pub fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Uint8 => "u8",
        Kind::Int64 => "i64",
        Kind::Half => "f16",
        Kind::BFloat16 => "bf16",
        Kind::Float => "float",
        other => panic!("no kernel supports {other:?}"),
    }
}

/// An argument of a kernel: a contiguous tensor for a `Global`, nothing for an optional `Global`, or a number.
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

macro_rules! impl_from_number {
    ($($from:ty => $to:ident),*) => {$(
        impl From<$from> for Argument<'_> {
            fn from(number: $from) -> Self {
                Argument::$to(number)
            }
        }
    )*};
}
impl_from_number!(i32 => I32, i64 => I64, u64 => U64, f32 => F32);

/// Returns the number of blocks for `n` items, `per_block` items each.
pub fn block_count(n: i64, per_block: i64) -> u32 {
    u32::try_from((n + per_block - 1) / per_block).expect("a grid of less than 2³² blocks")
}

/// One launch of a kernel.
pub struct Launch<'a> {
    pub source: &'a KernelSource,
    pub variant: Variant,
    /// Name of the kernel.
    pub entry: &'static str,
    /// Number of blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads per block, in one dimension.
    pub threads: u32,
    /// Dynamic shared memory per block.
    pub shared_bytes: usize,
}

impl Launch<'_> {
    /// Launches on the device of the first tensor: on a GPU asynchronously on libtorch's current stream; on a CPU in
    /// the emulator, to completion.
    ///
    /// # Errors
    /// If the program does not compile or load, if tensors are on different devices or not contiguous, or if the
    /// emulator finds an invalid access.
    pub fn run(&self, arguments: &[Argument]) -> Result<()> {
        let device = self.check(arguments)?;
        if self.grid.contains(&0) || planned::record(self) {
            return Ok(());
        }
        let result = match device {
            Device::Cuda(index) => driver::launch(self, arguments, index),
            _ => emulator::launch(self, arguments),
        };
        result.map_err(|error| error.with_context(format!("kernel {}", self.entry)))
    }

    /// Returns the common device of all tensors.
    fn check(&self, arguments: &[Argument]) -> Result<Device> {
        let tensors = || arguments.iter().filter_map(|a| if let Argument::Tensor(t) = a { Some(*t) } else { None });
        let device = tensors().next().map(Tensor::device);
        let device = device.ok_or_else(|| Error::failed(format!("kernel {}: no argument is a tensor", self.entry)))?;
        for tensor in tensors() {
            if tensor.device() != device || !tensor.is_contiguous() {
                return Err(Error::failed(format!(
                    "kernel {}: wants contiguous tensors on {device:?}; got {:?} with strides {:?} on {:?}",
                    self.entry,
                    tensor.size(),
                    tensor.stride(),
                    tensor.device()
                )));
            }
        }
        Ok(device)
    }
}

/// Returns a digest of everything a program is compiled from.
fn digest(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// Creates the cache folder of compiled programs and returns its path.
fn cache_folder() -> Result<PathBuf> {
    let home_cache = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let xdg_cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = xdg_cache.or_else(home_cache).unwrap_or_else(std::env::temp_dir);
    let folder = cache.join("occlude/kernels");
    std::fs::create_dir_all(&folder).map_err(|error| Error::disk(folder.display(), error))?;
    Ok(folder)
}

/// Writes a file and renames it into place, so that concurrent readers and writers see a complete file or none.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let disk_error = |error| Error::disk(path.display(), error);
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, bytes).map_err(disk_error)?;
    std::fs::rename(&temporary, path).map_err(disk_error)
}
