//! The NCCL library: the copy that libtorch has loaded, and its functions that are used here.
//!
//! It is opened under the name under which libtorch_cuda has loaded it (`libnccl.so.2`), so that there is never a
//! second copy with its own state. cudarc's loader does not know this name, hence the table here.

use crate::error::{Error, Result};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::LazyLock;

/// Size of a [`UniqueId`].
pub const UNIQUE_ID_BYTES: usize = 128;

/// ncclUniqueId: the id with which the ranks of a communicator find each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

/// ncclComm_t, opaque.
pub type CommHandle = *mut c_void;

/// ncclResult_t.
type NcclStatus = c_int;
const SUCCESS: NcclStatus = 0;
const IN_PROGRESS: NcclStatus = 7;

type ReduceFn =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, CommHandle, *mut c_void) -> NcclStatus;
type GatherFn = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, CommHandle, *mut c_void) -> NcclStatus;

/// Functions of NCCL under their own names.
pub struct NcclLibrary {
    get_version: unsafe extern "C" fn(*mut c_int) -> NcclStatus,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> NcclStatus,
    get_error_string: unsafe extern "C" fn(NcclStatus) -> *const c_char,
    pub comm_init_rank: unsafe extern "C" fn(*mut CommHandle, c_int, UniqueId, c_int) -> NcclStatus,
    pub comm_abort: unsafe extern "C" fn(CommHandle) -> NcclStatus,
    group_start: unsafe extern "C" fn() -> NcclStatus,
    group_end: unsafe extern "C" fn() -> NcclStatus,
    comm_get_async_error: unsafe extern "C" fn(CommHandle, *mut NcclStatus) -> NcclStatus,
    pub all_reduce: ReduceFn,
    pub reduce_scatter: ReduceFn,
    pub all_gather: GatherFn,
    /// Has the signature of a reduction, with the root in place of the operation.
    pub broadcast: ReduceFn,
    /// Never closed: the functions above are in it.
    _library: Library,
}

/// Minimum version, as NCCL encodes it: 2.18.0.
const MIN_VERSION: c_int = 21800;

impl NcclLibrary {
    /// Returns the library, which is opened at the first call.
    ///
    /// # Errors
    /// If there is no NCCL, or if it is too old.
    pub fn get() -> Result<&'static NcclLibrary> {
        static LIBRARY: LazyLock<Result<NcclLibrary>> = LazyLock::new(NcclLibrary::open);
        LIBRARY.as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<NcclLibrary> {
        let describe = |error: libloading::Error| {
            Error::failed(format!("no NCCL here: {error}. It comes with the CUDA build of torch."))
        };
        // SAFETY: a library that libtorch_cuda depends on, and so has usually loaded already.
        let library = unsafe { Library::open(Some("libnccl.so.2"), RTLD_NOW | RTLD_LOCAL) }.map_err(describe)?;
        macro_rules! find {
            ($name:literal) => {
                // SAFETY: the type is that of the function in nccl.h, stable since 2.0.
                *unsafe { library.get($name) }.map_err(describe)?
            };
        }
        let nccl = NcclLibrary {
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
            _library: library,
        };
        let version = nccl.version()?;
        if version < MIN_VERSION {
            return Err(Error::failed(format!("NCCL {version} is too old: {MIN_VERSION} or newer is wanted")));
        }
        Ok(nccl)
    }

    /// Returns the version as NCCL encodes it: 22809 is 2.28.9.
    pub fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: a place for a number.
        self.check(unsafe { (self.get_version)(&mut version) }, "its version")?;
        Ok(version)
    }

    /// Returns the version as text: "2.28.9".
    pub fn version_string(&self) -> Result<String> {
        let version = self.version()?;
        Ok(format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100))
    }

    /// Groups the collectives that `calls` starts into one launch.
    pub fn group(&self, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        // SAFETY: no arguments; a group belongs to its thread.
        self.check(unsafe { (self.group_start)() }, "a group")?;
        let called = calls();
        // SAFETY: as above; also after an error of a call, because the group is open.
        let ended = self.check(unsafe { (self.group_end)() }, "a group");
        called.and(ended)
    }

    /// Creates an id for a new communicator.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: a place of the size that NCCL writes.
        self.check(unsafe { (self.get_unique_id)(&mut id) }, "an id for a communicator")?;
        Ok(id)
    }

    /// Returns the asynchronous error of a communicator, if there is one.
    ///
    /// # Safety
    /// `comm` is alive.
    pub unsafe fn async_error(&self, comm: CommHandle) -> Option<String> {
        let mut error = SUCCESS;
        // SAFETY: the caller's promise, and a place for a number.
        let status = unsafe { (self.comm_get_async_error)(comm, &mut error) };
        [status, error].into_iter().find(|code| ![SUCCESS, IN_PROGRESS].contains(code)).map(|code| self.describe(code))
    }

    /// Turns a status into a result; `what` names the call in the error.
    pub fn check(&self, status: NcclStatus, what: &str) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        Err(Error::failed(format!("NCCL, {what}: {}", self.describe(status))))
    }

    fn describe(&self, status: NcclStatus) -> String {
        // SAFETY: NCCL returns a static string for any number.
        unsafe { CStr::from_ptr((self.get_error_string)(status)) }.to_string_lossy().into_owned()
    }
}
