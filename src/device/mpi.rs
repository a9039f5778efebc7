//! Ranks over MPI.
//!
//! Only nonblocking calls that are polled, so that a gate can be looked at meanwhile: MPI itself never gives up on a
//! rank that is frozen. Each channel has a communicator of its own. Communicators are not freed: there are few, and
//! they may carry an unfinished collective when a channel is given up.
//!
//! SAFETY of the calls below: MPI has been initialised for use by many threads (`join` refuses less) and is not
//! finalised before `leave`; a communicator is used by one thread at a time; a buffer that is handed to MPI is alive
//! until its request has completed, or for good after a halt (the contract of [`Wire`]).

use super::channel::Lane;
use super::pulse::{Ring, Word};
use super::wire::{Gate, Halt, Wire};
use super::world::{Channel, World};
use crate::fault::{Code, Fault, Result};
use mpi::ffi;
use std::ffi::c_int;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tch::Device;

/// How long ranks wait for each other when they open a channel: one may still be reading its data.
const OPENING: Duration = Duration::from_secs(600);

/// A communicator, which MPI lets any thread use.
#[derive(Clone, Copy)]
struct Comm(ffi::MPI_Comm);
// SAFETY: a communicator is a handle; MPI_THREAD_MULTIPLE lets it travel between threads.
unsafe impl Send for Comm {}

/// This process as a rank of an MPI job.
pub struct Mpi {
    rank: usize,
    size: usize,
    local_rank: usize,
    local_size: usize,
    /// Used for opening channels only, one at a time.
    root: Mutex<Comm>,
    left: AtomicBool,
}

impl Mpi {
    /// Joins the job that the launcher has prepared; once per process, from the main thread.
    pub fn join() -> Result<Self> {
        static JOINED: AtomicBool = AtomicBool::new(false);
        if JOINED.swap(true, Ordering::SeqCst) {
            return Err(Fault::failed("MPI can be joined only once by a process."));
        }
        let mut provided = 0;
        // SAFETY: the first MPI call of the process; null stands for the arguments since MPI-2.
        let (code, multiple) = unsafe {
            let wanted = ffi::RSMPI_THREAD_MULTIPLE;
            (ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), wanted, &mut provided), wanted)
        };
        checked(code, "MPI_Init_thread")?;
        if provided < multiple {
            return Err(Fault::failed(
                "This MPI does not let several threads talk at once (MPI_THREAD_MULTIPLE), which channels need. \
                 Use the Open MPI that launch/setup installs.",
            ));
        }
        // SAFETY: see the head of the file.
        unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
            let mut root = no_comm();
            checked(ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut root), "MPI_Comm_dup")?;
            let mut host = no_comm();
            let kind = ffi::RSMPI_COMM_TYPE_SHARED;
            let info = ffi::RSMPI_INFO_NULL;
            checked(ffi::MPI_Comm_split_type(root, kind, 0, info, &mut host), "MPI_Comm_split_type")?;
            let (rank, size) = place(root)?;
            let (local_rank, local_size) = place(host)?;
            Ok(Mpi { rank, size, local_rank, local_size, root: Mutex::new(Comm(root)), left: AtomicBool::new(false) })
        }
    }

    /// A new communicator with the same ranks.
    fn duplicate(&self) -> Result<Comm> {
        let root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
        // On the heap and never freed: MPI writes here when the other ranks have come, even after a time-out.
        let comm: &mut ffi::MPI_Comm = Box::leak(Box::new(no_comm()));
        let mut request = no_request();
        // SAFETY: see the head of the file.
        checked(unsafe { ffi::MPI_Comm_idup(root.0, comm, &mut request) }, "MPI_Comm_idup")?;
        self.within(request, OPENING, "opening a channel")?;
        Ok(Comm(*comm))
    }

    /// Waits for `request`, at most for `deadline`.
    fn within(&self, mut request: ffi::MPI_Request, deadline: Duration, what: &str) -> Result<()> {
        let mut pause = Pause::start();
        while !done(&mut request).map_err(|halt| Fault::from(halt).at(what))? {
            if pause.since.elapsed() > deadline {
                let seconds = deadline.as_secs_f64();
                return Err(Fault::failed(format!("{what}: not every rank came within {seconds:.0} s.")));
            }
            pause.rest();
        }
        Ok(())
    }
}

impl World for Mpi {
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
    fn channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        let gate = Gate::default();
        let comm = self.duplicate().map_err(|fault| fault.at(format!("channel {name}")))?;
        let wire = Line { comm, rank: self.rank, size: self.size, gate: gate.clone() };
        Ok(Box::new(Lane::open(name, Box::new(wire), gate, OPENING)?))
    }
    fn ring(&self) -> Result<Option<Box<dyn Ring>>> {
        if self.size == 1 {
            return Ok(None);
        }
        let comm = self.duplicate().map_err(|fault| fault.at("heartbeat"))?;
        Ok(Some(Box::new(Neighbours::new(comm, self.rank, self.size)?)))
    }
    fn leave(&self, deadline: Duration) -> Result<()> {
        if self.left.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
        let mut request = no_request();
        // SAFETY: see the head of the file.
        checked(unsafe { ffi::MPI_Ibarrier(root.0, &mut request) }, "MPI_Ibarrier")?;
        self.within(request, deadline, "leaving the job")?;
        // SAFETY: every rank is here, and channels are closed before their world is left.
        checked(unsafe { ffi::MPI_Finalize() }, "MPI_Finalize")
    }
    fn abort(&self, code: Code) -> ! {
        // Should the launcher be out of reach, this process at least goes.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(3));
            signal_hook::low_level::exit(code as i32);
        });
        if !self.left.load(Ordering::SeqCst) {
            // SAFETY: MPI is initialised and not finalised.
            unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code as c_int) };
        }
        signal_hook::low_level::exit(code as i32)
    }
}

fn no_request() -> ffi::MPI_Request {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

fn no_comm() -> ffi::MPI_Comm {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_COMM_NULL }
}

/// This process's rank and the number of ranks.
///
/// # Safety
/// `comm` is a communicator.
unsafe fn place(comm: ffi::MPI_Comm) -> Result<(usize, usize)> {
    let (mut rank, mut size) = (0, 0);
    // SAFETY: by the caller.
    unsafe {
        checked(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN), "MPI_Comm_set_errhandler")?;
        checked(ffi::MPI_Comm_rank(comm, &mut rank), "MPI_Comm_rank")?;
        checked(ffi::MPI_Comm_size(comm, &mut size), "MPI_Comm_size")?;
    }
    Ok((rank as usize, size as usize))
}

/// What MPI calls its error `code`, if it is one.
fn wrong(code: c_int, call: &str) -> Option<String> {
    if code == ffi::MPI_SUCCESS as c_int {
        return None;
    }
    let (mut text, mut length) = ([0u8; ffi::MPI_MAX_ERROR_STRING as usize], 0);
    // SAFETY: MPI writes at most MPI_MAX_ERROR_STRING bytes.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    Some(format!("{call}: {}", String::from_utf8_lossy(&text[..(length.max(0) as usize).min(text.len())])))
}

fn checked(code: c_int, call: &str) -> Result<()> {
    wrong(code, call).map_or(Ok(()), |why| Err(Halt::Broken(why).into()))
}

fn started(code: c_int, call: &str) -> Result<(), Halt> {
    wrong(code, call).map_or(Ok(()), |why| Err(Halt::Broken(why)))
}

fn done(request: &mut ffi::MPI_Request) -> Result<bool, Halt> {
    let mut flag = 0;
    // SAFETY: `request` was given by MPI and is not complete yet, or is the null request, which tests as complete.
    started(unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) }, "MPI_Test")?;
    Ok(flag != 0)
}

/// Waiting that is quick at first and then leaves the processor to those who compute.
struct Pause {
    since: Instant,
    tries: u32,
}

impl Pause {
    fn start() -> Self {
        Pause { since: Instant::now(), tries: 0 }
    }
    fn rest(&mut self) {
        self.tries += 1;
        match self.tries {
            0..100 => std::thread::yield_now(),
            tries => std::thread::sleep(Duration::from_micros(u64::from(tries / 10).clamp(20, 100))),
        }
    }
}

/// A channel's communicator.
struct Line {
    comm: Comm,
    rank: usize,
    size: usize,
    gate: Gate,
}

impl Line {
    fn finish(&self, mut request: ffi::MPI_Request) -> Result<(), Halt> {
        let mut pause = Pause::start();
        while !done(&mut request)? {
            if self.gate.closed() {
                return Err(Halt::Aborted);
            }
            pause.rest();
        }
        Ok(())
    }
}

/// The lengths and starts of spans, as MPI counts.
fn spans(spans: &[Range<usize>]) -> (Vec<c_int>, Vec<c_int>) {
    let narrow = |bytes: usize| c_int::try_from(bytes).expect("a piece is below 2 GiB");
    spans.iter().map(|span| (narrow(span.len()), narrow(span.start))).unzip()
}

impl Wire for Line {
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
    ) -> Result<(), Halt> {
        assert!(from.iter().all(|span| span.end <= send.len()) && into.iter().all(|span| span.end <= recv.len()));
        // MPI reads these while the request is under way, so a halt leaks them with the buffers.
        let (counts, starts) = spans(from);
        let (taken, places) = spans(into);
        let mut request = no_request();
        // SAFETY: see the head of the file; the spans lie within the buffers.
        let code = unsafe {
            ffi::MPI_Ialltoallv(
                send.as_ptr().cast(),
                counts.as_ptr(),
                starts.as_ptr(),
                ffi::RSMPI_UINT8_T,
                recv.as_mut_ptr().cast(),
                taken.as_ptr(),
                places.as_ptr(),
                ffi::RSMPI_UINT8_T,
                self.comm.0,
                &mut request,
            )
        };
        let result = started(code, "MPI_Ialltoallv").and_then(|()| self.finish(request));
        if result.is_err() {
            std::mem::forget((counts, starts, taken, places));
        }
        result
    }
    fn all_gather(&mut self, own: &[u8], out: &mut [u8], into: &[Range<usize>]) -> Result<(), Halt> {
        assert!(into.iter().all(|span| span.end <= out.len()) && into[self.rank].len() == own.len());
        let (counts, places) = spans(into);
        let mut request = no_request();
        // SAFETY: see the head of the file; the spans lie within the buffers.
        let code = unsafe {
            ffi::MPI_Iallgatherv(
                own.as_ptr().cast(),
                counts[self.rank],
                ffi::RSMPI_UINT8_T,
                out.as_mut_ptr().cast(),
                counts.as_ptr(),
                places.as_ptr(),
                ffi::RSMPI_UINT8_T,
                self.comm.0,
                &mut request,
            )
        };
        let result = started(code, "MPI_Iallgatherv").and_then(|()| self.finish(request));
        if result.is_err() {
            std::mem::forget((counts, places));
        }
        result
    }
    fn broadcast(&mut self, bytes: &mut [u8], root: usize) -> Result<(), Halt> {
        let count = c_int::try_from(bytes.len()).expect("a piece is below 2 GiB");
        let mut request = no_request();
        let (data, kind) = (bytes.as_mut_ptr().cast(), unsafe { ffi::RSMPI_UINT8_T });
        // SAFETY: see the head of the file.
        let code = unsafe { ffi::MPI_Ibcast(data, count, kind, root as c_int, self.comm.0, &mut request) };
        started(code, "MPI_Ibcast").and_then(|()| self.finish(request))
    }
}

/// The heartbeat's line: words to the next rank, from the one before.
struct Neighbours {
    comm: Comm,
    next: c_int,
    before: c_int,
    /// On the heap, for MPI holds their addresses; leaked while a request is open.
    out: Option<(Box<Word>, ffi::MPI_Request)>,
    coming: Option<(Box<Word>, ffi::MPI_Request)>,
}
// SAFETY: requests and communicators are handles that any one thread at a time may use.
unsafe impl Send for Neighbours {}

impl Neighbours {
    fn new(comm: Comm, rank: usize, size: usize) -> Result<Self> {
        let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
        let mut line = Neighbours { comm, next: next as c_int, before: before as c_int, out: None, coming: None };
        line.expect()?;
        Ok(line)
    }
    fn expect(&mut self) -> Result<()> {
        let mut word: Box<Word> = Box::default();
        let mut request = no_request();
        let (data, count) = (word.as_mut_ptr().cast(), word.len() as c_int);
        // SAFETY: see the head of the file; the word stays where it is until the request has completed.
        let code =
            unsafe { ffi::MPI_Irecv(data, count, ffi::RSMPI_UINT64_T, self.before, 0, self.comm.0, &mut request) };
        checked(code, "MPI_Irecv")?;
        self.coming = Some((word, request));
        Ok(())
    }
}

impl Ring for Neighbours {
    fn send(&mut self, word: Word) -> Result<bool> {
        if let Some((_, request)) = &mut self.out
            && !done(request)?
        {
            return Ok(false);
        }
        let word = Box::new(word);
        let mut request = no_request();
        let (data, count) = (word.as_ptr().cast(), word.len() as c_int);
        // SAFETY: see the head of the file.
        let code = unsafe { ffi::MPI_Isend(data, count, ffi::RSMPI_UINT64_T, self.next, 0, self.comm.0, &mut request) };
        checked(code, "MPI_Isend")?;
        self.out = Some((word, request));
        Ok(true)
    }
    fn receive(&mut self) -> Result<Option<Word>> {
        let Some((_, request)) = &mut self.coming else { return Ok(None) };
        if !done(request)? {
            return Ok(None);
        }
        let word = self.coming.take().map(|(word, _)| *word);
        self.expect()?;
        Ok(word)
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        std::mem::forget((self.out.take(), self.coming.take()));
    }
}
