//! Byte transports between ranks. The collectives of [`channel`](super::channel) are written once, over this trait.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Error of a transfer.
#[derive(Clone, Debug)]
pub enum TransportError {
    /// The channel was aborted.
    Aborted,
    /// The transport reported this error.
    Failed(String),
}

/// A cancellation flag. Waiting threads poll it; it is never cleared.
#[derive(Clone, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Requests cancellation.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    /// Returns whether cancellation was requested.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// One rank's end of a private connection between all ranks. Every rank must make the same calls in the same order with
/// matching lengths, each below 2 GiB. Calls block until the bytes have arrived or the cancel flag is set. After a
/// [`TransportError`] the transport may still write to the buffers, so the caller must leak them.
pub trait Transport: Send {
    /// Returns the rank of this end.
    fn rank(&self) -> usize;
    /// Returns the number of ranks.
    fn size(&self) -> usize;
    /// Sends `send[from[r]]` to each rank r, and receives the bytes from each rank r in `recv[into[r]]`.
    fn all_to_all(
        &mut self,
        send: &[u8],
        from: &[Range<usize>],
        recv: &mut [u8],
        into: &[Range<usize>],
    ) -> Result<(), TransportError>;
    /// Sends `local` to every rank, and receives the bytes of each rank r in `out[into[r]]`.
    fn all_gather(&mut self, local: &[u8], out: &mut [u8], into: &[Range<usize>]) -> Result<(), TransportError>;
    /// Copies the root's bytes to every rank.
    fn broadcast(&mut self, bytes: &mut [u8], root: usize) -> Result<(), TransportError>;
}

/// The meeting point of the threads of one channel.
pub struct Rendezvous {
    round: Mutex<Round>,
    changed: Condvar,
}

/// State of the current exchange. A round ends when every thread has read the payloads.
struct Round {
    payloads: Vec<Option<Arc<Vec<u8>>>>,
    missing: usize,
    readers: usize,
}

impl Round {
    fn new(size: usize) -> Self {
        Round { payloads: vec![None; size], missing: size, readers: 0 }
    }
}

impl Rendezvous {
    /// Creates a meeting point of `size` threads.
    pub fn new(size: usize) -> Self {
        Rendezvous { round: Mutex::new(Round::new(size)), changed: Condvar::new() }
    }
}

/// A transport between threads of one process.
pub struct ThreadTransport {
    pub rendezvous: Arc<Rendezvous>,
    pub rank: usize,
    pub size: usize,
    /// The flag of this rank's channel, and the flag that is set when any rank panics.
    pub cancel_flags: [CancelFlag; 2],
}

impl ThreadTransport {
    /// Publishes `payload` and returns the payloads of all ranks.
    fn exchange(&mut self, payload: Vec<u8>) -> Result<Vec<Arc<Vec<u8>>>, TransportError> {
        let rendezvous = self.rendezvous.clone();
        let mut round = rendezvous.round.lock().unwrap_or_else(PoisonError::into_inner);
        // A fast thread may return while others still read the payloads of the previous round.
        while round.missing == 0 {
            round = self.wait(&rendezvous, round)?;
        }
        round.payloads[self.rank] = Some(Arc::new(payload));
        round.missing -= 1;
        rendezvous.changed.notify_all();
        while round.missing > 0 {
            round = self.wait(&rendezvous, round)?;
        }
        let payloads = round.payloads.iter().flatten().cloned().collect();
        round.readers += 1;
        if round.readers == self.size {
            *round = Round::new(self.size);
            rendezvous.changed.notify_all();
        }
        Ok(payloads)
    }

    fn wait<'a>(
        &self,
        rendezvous: &'a Rendezvous,
        round: MutexGuard<'a, Round>,
    ) -> Result<MutexGuard<'a, Round>, TransportError> {
        if self.cancel_flags.iter().any(CancelFlag::is_set) {
            return Err(TransportError::Aborted);
        }
        // The time-out is for the cancel flags, which notify nobody.
        let waited = rendezvous.changed.wait_timeout(round, Duration::from_millis(20));
        Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Transport for ThreadTransport {
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
        // Payload: the end offset of each rank's bytes (u64 each), then the bytes in rank order.
        let mut payload = Vec::with_capacity(8 * self.size + send.len());
        let mut end = 8 * self.size;
        for range in from {
            end += range.len();
            payload.extend_from_slice(&(end as u64).to_ne_bytes());
        }
        from.iter().for_each(|range| payload.extend_from_slice(&send[range.clone()]));
        for (payload, range) in self.exchange(payload)?.iter().zip(into) {
            let offset = 8 * self.rank;
            let end = u64::from_ne_bytes(payload[offset..offset + 8].try_into().expect("eight bytes")) as usize;
            recv[range.clone()].copy_from_slice(&payload[end - range.len()..end]);
        }
        Ok(())
    }
    fn all_gather(&mut self, local: &[u8], out: &mut [u8], into: &[Range<usize>]) -> Result<(), TransportError> {
        for (payload, range) in self.exchange(local.to_vec())?.iter().zip(into) {
            out[range.clone()].copy_from_slice(payload);
        }
        Ok(())
    }
    fn broadcast(&mut self, bytes: &mut [u8], root: usize) -> Result<(), TransportError> {
        let payload = if self.rank == root { bytes.to_vec() } else { Vec::new() };
        bytes.copy_from_slice(&self.exchange(payload)?[root]);
        Ok(())
    }
}
