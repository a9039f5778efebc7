//! Ranks over MPI.
//!
//! Uses only nonblocking calls, which are polled together with a cancel flag, because MPI itself never gives up on a
//! frozen rank. Each channel has its own communicator. Communicators are not freed: there are few, and they may carry
//! an unfinished collective when a channel is aborted.
//!
//! SAFETY of the calls below: MPI has been initialized for use by many threads (`init` checks it) and is not finalized
//! before `leave`; a communicator is used by one thread at a time; a buffer that is passed to MPI lives until its
//! request has completed, or forever after an error (the contract of `Transport`).

use super::channel::TransportChannel;
use super::transport::{CancelFlag, Transport, TransportError};
use super::world::{Channel, HeartbeatLink, HeartbeatMessage, World};
use crate::error::{Error, ExitCode, Result};
use mpi::ffi;
use std::ffi::c_int;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tch::Device;

/// Maximum time for all ranks to open a channel; one may still be reading its data.
const OPEN_TIMEOUT: Duration = Duration::from_secs(600);

/// A communicator, which MPI lets any thread use.
#[derive(Clone, Copy)]
struct MpiComm(ffi::MPI_Comm);
// SAFETY: a communicator is a handle; MPI_THREAD_MULTIPLE lets it move between threads.
unsafe impl Send for MpiComm {}

/// This process as a rank of an MPI job.
pub struct MpiWorld {
    rank: usize,
    size: usize,
    local_rank: usize,
    local_size: usize,
    /// Used only for opening channels, one at a time, and for leaving.
    root: Mutex<MpiComm>,
    left: AtomicBool,
}

impl MpiWorld {
    /// Initializes MPI in the job that the launcher has prepared. Must be called once per process, from the main
    /// thread.
    pub fn init() -> Result<Self> {
        static INITIALIZED: AtomicBool = AtomicBool::new(false);
        if INITIALIZED.swap(true, Ordering::SeqCst) {
            return Err(Error::failed("MPI can be initialized only once by a process."));
        }
        let mut provided = 0;
        // SAFETY: a constant of the library.
        let required = unsafe { ffi::RSMPI_THREAD_MULTIPLE };
        // SAFETY: the first MPI call of the process; since MPI-2 the arguments may be null.
        let code = unsafe { ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), required, &mut provided) };
        check(code, "MPI_Init_thread")?;
        if provided < required {
            return Err(Error::failed(
                "This MPI does not support calls from several threads (MPI_THREAD_MULTIPLE), which channels need. \
                 Use the Open MPI that launch/setup installs.",
            ));
        }
        let mut root = null_comm();
        let mut host = null_comm();
        // SAFETY: see the head of the file.
        unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
            check(ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut root), "MPI_Comm_dup")?;
            let kind = ffi::RSMPI_COMM_TYPE_SHARED;
            let info = ffi::RSMPI_INFO_NULL;
            check(ffi::MPI_Comm_split_type(root, kind, 0, info, &mut host), "MPI_Comm_split_type")?;
        }
        // SAFETY: a communicator.
        let (rank, size) = unsafe { rank_and_size(root)? };
        // SAFETY: a communicator.
        let (local_rank, local_size) = unsafe { rank_and_size(host)? };
        Ok(MpiWorld {
            rank,
            size,
            local_rank,
            local_size,
            root: Mutex::new(MpiComm(root)),
            left: AtomicBool::new(false),
        })
    }

    /// Creates a new communicator with the same ranks.
    fn duplicate(&self) -> Result<MpiComm> {
        let root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
        // On the heap and never freed: MPI writes here when the other ranks arrive, even after a time-out.
        let comm: &mut ffi::MPI_Comm = Box::leak(Box::new(null_comm()));
        let mut request = null_request();
        // SAFETY: see the head of the file.
        check(unsafe { ffi::MPI_Comm_idup(root.0, comm, &mut request) }, "MPI_Comm_idup")?;
        wait_for_request(request, OPEN_TIMEOUT, "opening a channel")?;
        Ok(MpiComm(*comm))
    }
}

/// Waits for `request`; `what` names it in an error.
fn wait_for_request(mut request: ffi::MPI_Request, timeout: Duration, what: &str) -> Result<()> {
    let mut backoff = Backoff::new();
    while !test(&mut request).map_err(|error| Error::from(error).with_context(what))? {
        if backoff.started.elapsed() > timeout {
            let seconds = timeout.as_secs_f64();
            return Err(Error::failed(format!("{what}: not every rank arrived within {seconds:.0} s.")));
        }
        backoff.wait();
    }
    Ok(())
}

impl World for MpiWorld {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    fn local_rank(&self) -> usize {
        self.local_rank
    }
    fn local_size(&self) -> usize {
        self.local_size
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn open_channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        let cancel = CancelFlag::default();
        let comm = self.duplicate().map_err(|error| error.with_context(format!("channel {name}")))?;
        let transport = MpiTransport { comm, rank: self.rank, size: self.size, cancel: cancel.clone() };
        Ok(Box::new(TransportChannel::open(name, Box::new(transport), cancel, OPEN_TIMEOUT)?))
    }
    fn heartbeat_link(&self) -> Result<Option<Box<dyn HeartbeatLink>>> {
        if self.size == 1 {
            return Ok(None);
        }
        let comm = self.duplicate().map_err(|error| error.with_context("heartbeat"))?;
        Ok(Some(Box::new(MpiHeartbeatLink::new(comm, self.rank, self.size)?)))
    }
    fn leave(&self, deadline: Duration) -> Result<()> {
        if self.left.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
        let mut request = null_request();
        // SAFETY: see the head of the file.
        check(unsafe { ffi::MPI_Ibarrier(root.0, &mut request) }, "MPI_Ibarrier")?;
        wait_for_request(request, deadline, "leaving the job")?;
        // SAFETY: every rank has arrived, and channels are closed before their world is left.
        Ok(check(unsafe { ffi::MPI_Finalize() }, "MPI_Finalize")?)
    }
    fn abort(&self, code: ExitCode) -> ! {
        // Ends at least this process if MPI_Abort does not return because the launcher is unreachable.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(3));
            signal_hook::low_level::exit(code as i32);
        });
        if !self.left.load(Ordering::SeqCst) {
            // SAFETY: MPI is initialized and not finalized.
            unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code as c_int) };
        }
        signal_hook::low_level::exit(code as i32)
    }
}

fn null_request() -> ffi::MPI_Request {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

fn null_comm() -> ffi::MPI_Comm {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_COMM_NULL }
}

/// Returns this process's rank in a communicator, and the number of ranks.
///
/// # Safety
/// `comm` is a communicator.
unsafe fn rank_and_size(comm: ffi::MPI_Comm) -> Result<(usize, usize)> {
    let mut rank = 0;
    let mut size = 0;
    // SAFETY: the caller's promise.
    unsafe {
        check(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN), "MPI_Comm_set_errhandler")?;
        check(ffi::MPI_Comm_rank(comm, &mut rank), "MPI_Comm_rank")?;
        check(ffi::MPI_Comm_size(comm, &mut size), "MPI_Comm_size")?;
    }
    Ok((rank as usize, size as usize))
}

fn check(code: c_int, call: &str) -> Result<(), TransportError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: MPI writes at most MPI_MAX_ERROR_STRING bytes.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let text = String::from_utf8_lossy(&text[..(length.max(0) as usize).min(text.len())]).into_owned();
    Err(TransportError::Failed(format!("{call}: {text}")))
}

/// Returns whether a request has completed.
fn test(request: &mut ffi::MPI_Request) -> Result<bool, TransportError> {
    let mut flag = 0;
    // SAFETY: `request` was made by MPI and is not complete yet, or is the null request, which tests as complete.
    check(unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) }, "MPI_Test")?;
    Ok(flag != 0)
}

/// Pauses between polls: short at first, then longer, to leave the cores to the computation.
struct Backoff {
    started: Instant,
    polls: u32,
}

impl Backoff {
    fn new() -> Self {
        Backoff { started: Instant::now(), polls: 0 }
    }
    fn wait(&mut self) {
        self.polls += 1;
        if self.polls < 100 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(u64::from(self.polls / 10).clamp(20, 100)));
        }
    }
}

/// The transport of a channel, over its own communicator.
struct MpiTransport {
    comm: MpiComm,
    rank: usize,
    size: usize,
    cancel: CancelFlag,
}

impl MpiTransport {
    /// Waits until the request has completed or the channel is canceled.
    fn wait(&self, mut request: ffi::MPI_Request) -> Result<(), TransportError> {
        let mut backoff = Backoff::new();
        while !test(&mut request)? {
            if self.cancel.is_set() {
                return Err(TransportError::Aborted);
            }
            backoff.wait();
        }
        Ok(())
    }
}

/// Lengths and offsets of ranges as MPI takes them.
struct MpiLayout {
    counts: Vec<c_int>,
    offsets: Vec<c_int>,
}

impl MpiLayout {
    fn new(ranges: &[Range<usize>]) -> Self {
        let narrow = |bytes: usize| c_int::try_from(bytes).expect("a piece is below 2 GiB");
        let (counts, offsets) = ranges.iter().map(|range| (narrow(range.len()), narrow(range.start))).unzip();
        MpiLayout { counts, offsets }
    }
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    fn all_to_all(
        &mut self,
        send: &[u8],
        from: &[Range<usize>],
        recv: &mut [u8],
        into: &[Range<usize>],
    ) -> Result<(), TransportError> {
        assert!(from.iter().all(|range| range.end <= send.len()) && into.iter().all(|range| range.end <= recv.len()));
        // MPI reads these until the request has completed, so an error leaks them with the buffers.
        let sent = MpiLayout::new(from);
        let received = MpiLayout::new(into);
        let mut request = null_request();
        // SAFETY: see the head of the file; the ranges are within the buffers.
        let code = unsafe {
            ffi::MPI_Ialltoallv(
                send.as_ptr().cast(),
                sent.counts.as_ptr(),
                sent.offsets.as_ptr(),
                ffi::RSMPI_UINT8_T,
                recv.as_mut_ptr().cast(),
                received.counts.as_ptr(),
                received.offsets.as_ptr(),
                ffi::RSMPI_UINT8_T,
                self.comm.0,
                &mut request,
            )
        };
        let result = check(code, "MPI_Ialltoallv").and_then(|()| self.wait(request));
        if result.is_err() {
            std::mem::forget((sent, received));
        }
        result
    }
    fn all_gather(&mut self, local: &[u8], out: &mut [u8], into: &[Range<usize>]) -> Result<(), TransportError> {
        assert!(into.iter().all(|range| range.end <= out.len()) && into[self.rank].len() == local.len());
        let received = MpiLayout::new(into);
        let mut request = null_request();
        // SAFETY: see the head of the file; the ranges are within the buffers.
        let code = unsafe {
            ffi::MPI_Iallgatherv(
                local.as_ptr().cast(),
                received.counts[self.rank],
                ffi::RSMPI_UINT8_T,
                out.as_mut_ptr().cast(),
                received.counts.as_ptr(),
                received.offsets.as_ptr(),
                ffi::RSMPI_UINT8_T,
                self.comm.0,
                &mut request,
            )
        };
        let result = check(code, "MPI_Iallgatherv").and_then(|()| self.wait(request));
        if result.is_err() {
            std::mem::forget(received);
        }
        result
    }
    fn broadcast(&mut self, bytes: &mut [u8], root: usize) -> Result<(), TransportError> {
        let count = c_int::try_from(bytes.len()).expect("a piece is below 2 GiB");
        let mut request = null_request();
        let data = bytes.as_mut_ptr().cast();
        // SAFETY: see the head of the file.
        let code =
            unsafe { ffi::MPI_Ibcast(data, count, ffi::RSMPI_UINT8_T, root as c_int, self.comm.0, &mut request) };
        check(code, "MPI_Ibcast").and_then(|()| self.wait(request))
    }
}

/// The heartbeat's connection: messages to the next rank, from the previous one.
struct MpiHeartbeatLink {
    comm: MpiComm,
    next: c_int,
    previous: c_int,
    outgoing: Option<MpiTransfer>,
    incoming: Option<MpiTransfer>,
}

/// A message in flight. It is on the heap because MPI holds its address, and leaked while the request is open.
struct MpiTransfer {
    message: Box<HeartbeatMessage>,
    request: ffi::MPI_Request,
}

// SAFETY: requests and communicators are handles that any one thread at a time may use.
unsafe impl Send for MpiHeartbeatLink {}

impl MpiHeartbeatLink {
    fn new(comm: MpiComm, rank: usize, size: usize) -> Result<Self> {
        let next = ((rank + 1) % size) as c_int;
        let previous = ((rank + size - 1) % size) as c_int;
        let mut link = MpiHeartbeatLink { comm, next, previous, outgoing: None, incoming: None };
        link.start_receive()?;
        Ok(link)
    }
    fn start_receive(&mut self) -> Result<()> {
        let mut message: Box<HeartbeatMessage> = Box::default();
        let mut request = null_request();
        let data = message.as_mut_ptr().cast();
        let count = message.len() as c_int;
        // SAFETY: see the head of the file; the message does not move until the request has completed.
        let code =
            unsafe { ffi::MPI_Irecv(data, count, ffi::RSMPI_UINT64_T, self.previous, 0, self.comm.0, &mut request) };
        check(code, "MPI_Irecv")?;
        self.incoming = Some(MpiTransfer { message, request });
        Ok(())
    }
}

impl HeartbeatLink for MpiHeartbeatLink {
    fn send(&mut self, message: HeartbeatMessage) -> Result<bool> {
        if let Some(transfer) = &mut self.outgoing
            && !test(&mut transfer.request)?
        {
            return Ok(false);
        }
        let message = Box::new(message);
        let mut request = null_request();
        let data = message.as_ptr().cast();
        let count = message.len() as c_int;
        // SAFETY: see the head of the file.
        let code = unsafe { ffi::MPI_Isend(data, count, ffi::RSMPI_UINT64_T, self.next, 0, self.comm.0, &mut request) };
        check(code, "MPI_Isend")?;
        self.outgoing = Some(MpiTransfer { message, request });
        Ok(true)
    }
    fn receive(&mut self) -> Result<Option<HeartbeatMessage>> {
        let Some(transfer) = &mut self.incoming else { return Ok(None) };
        if !test(&mut transfer.request)? {
            return Ok(None);
        }
        let message = self.incoming.take().map(|transfer| *transfer.message);
        self.start_receive()?;
        Ok(message)
    }
}

impl Drop for MpiHeartbeatLink {
    fn drop(&mut self) {
        std::mem::forget((self.outgoing.take(), self.incoming.take()));
    }
}
