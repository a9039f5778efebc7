//! NCCL itself: the copy that libtorch has loaded, and what we call of it.
//!
//! It is opened by the name under which libtorch_cuda has it in the process already (`libnccl.so.2`), so that there is
//! never a second copy with a state of its own. cudarc's own loader does not know this name, hence the table here.

use crate::fault::{Fault, Result};
use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::LazyLock;

/// The id by which the ranks of a communicator find each other.
pub const ID_BYTES: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Id(pub [u8; ID_BYTES]);

/// A communicator's handle, opaque.
pub type Handle = *mut c_void;

/// ncclResult_t: 0 is success, 7 that work is under way.
type Code = c_int;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;

type Reduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code;

/// The functions of NCCL's interface that are used, by their names there.
pub struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> Code,
    get_unique_id: unsafe extern "C" fn(*mut Id) -> Code,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    pub comm_init_rank: unsafe extern "C" fn(*mut Handle, c_int, Id, c_int) -> Code,
    pub comm_abort: unsafe extern "C" fn(Handle) -> Code,
    group_start: unsafe extern "C" fn() -> Code,
    group_end: unsafe extern "C" fn() -> Code,
    comm_get_async_error: unsafe extern "C" fn(Handle, *mut Code) -> Code,
    pub all_reduce: Reduce,
    pub reduce_scatter: Reduce,
    pub all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> Code,
    pub broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code,
    /// Never closed: the functions above live in it.
    _shared: Shared,
}

/// The oldest version whose calls these are, as NCCL counts: 2.18.0.
const OLDEST: c_int = 21800;

impl Library {
    /// The library, opened at the first call. A fault where there is none, or one that is too old.
    pub fn get() -> Result<&'static Library> {
        static OPENED: LazyLock<Result<Library>> = LazyLock::new(Library::open);
        OPENED.as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Library> {
        let fault = |error: libloading::Error| {
            Fault::failed(format!("no NCCL here: {error}. It comes with the CUDA build of torch."))
        };
        // SAFETY: a library that libtorch_cuda depends on, and so has mostly loaded already.
        let shared = unsafe { Shared::open(Some("libnccl.so.2"), RTLD_NOW | RTLD_LOCAL) }.map_err(fault)?;
        macro_rules! find {
            ($name:literal) => {
                // SAFETY: the type is that of the function in nccl.h, stable since 2.0.
                *unsafe { shared.get($name) }.map_err(fault)?
            };
        }
        let library = Library {
            get_version: find!(b"ncclGetVersion\0"),
            get_unique_id: find!(b"ncclGetUniqueId\0"),
            get_error_string: find!(b"ncclGetErrorString\0"),
            comm_init_rank: find!(b"ncclCommInitRank\0"),
            comm_abort: find!(b"ncclCommAbort\0"),
            group_start: find!(b"ncclGroupStart\0"),
            group_end: find!(b"ncclGroupEnd\0"),
            comm_get_async_error: find!(b"ncclCommGetAsyncError\0"),
            all_reduce: find!(b"ncclAllReduce\0"),
            reduce_scatter: find!(b"ncclReduceScatter\0"),
            all_gather: find!(b"ncclAllGather\0"),
            broadcast: find!(b"ncclBroadcast\0"),
            _shared: shared,
        };
        let version = library.version()?;
        if version < OLDEST {
            return Err(Fault::failed(format!("NCCL {version} is too old: {OLDEST} or newer is wanted")));
        }
        Ok(library)
    }

    /// As NCCL counts: 22809 is 2.28.9.
    pub fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: a place for a number.
        self.checked(unsafe { (self.get_version)(&mut version) }, "its version")?;
        Ok(version)
    }

    /// The same as people write it: "2.28.9".
    pub fn named(&self) -> Result<String> {
        let version = self.version()?;
        Ok(format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100))
    }

    /// Starts what `calls` asks for together, in one launch where NCCL can.
    pub fn group(&self, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        // SAFETY: no arguments; a group is its thread's own.
        self.checked(unsafe { (self.group_start)() }, "a group")?;
        let called = calls();
        // SAFETY: as above; also where a call has failed, since the group is open.
        let ended = self.checked(unsafe { (self.group_end)() }, "a group");
        called.and(ended)
    }

    pub fn unique_id(&self) -> Result<Id> {
        let mut id = Id([0; ID_BYTES]);
        // SAFETY: a place of the size that NCCL writes.
        self.checked(unsafe { (self.get_unique_id)(&mut id) }, "an id for a communicator")?;
        Ok(id)
    }

    /// What has gone wrong in a communicator since it was made, if anything.
    ///
    /// # Safety
    /// `comm` is alive.
    pub unsafe fn trouble(&self, comm: Handle) -> Option<String> {
        let mut code = SUCCESS;
        // SAFETY: the caller's, and a place for a number.
        let asked = unsafe { (self.comm_get_async_error)(comm, &mut code) };
        [asked, code].into_iter().find(|code| ![SUCCESS, IN_PROGRESS].contains(code)).map(|code| self.words(code))
    }

    pub fn checked(&self, code: Code, what: &str) -> Result<()> {
        if code == SUCCESS { Ok(()) } else { Err(Fault::failed(format!("NCCL, {what}: {}", self.words(code)))) }
    }

    fn words(&self, code: Code) -> String {
        // SAFETY: NCCL answers any number with a string that it keeps.
        unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned()
    }
}
