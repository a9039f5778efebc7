//! How bytes travel between ranks. The collectives of `channel` are written once, over this.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Why a transfer did not finish.
#[derive(Clone, Debug)]
pub enum Halt {
    /// Somebody gave up on the channel.
    Aborted,
    /// The transport reports an error.
    Broken(String),
}

/// Set once to give up. Whoever waits looks at it.
#[derive(Clone, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    pub fn close(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    pub fn closed(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// One rank's end of a private line between all ranks. Every rank makes the same calls in the same order with
/// matching lengths, each below 2 GiB. Calls block until the bytes have arrived or the gate has closed. After a
/// [`Halt`] the transport may still write into the buffers that it was given: the caller never frees them.
pub trait Wire: Send {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// `send[from[r]]` goes to rank r, and what rank r sends here lands in `recv[into[r]]`.
    fn all_to_all(
        &mut self,
        send: &[u8],
        from: &[Range<usize>],
        recv: &mut [u8],
        into: &[Range<usize>],
    ) -> Result<(), Halt>;
    /// Every rank's `own`, that of rank r in `out[into[r]]`.
    fn all_gather(&mut self, own: &[u8], out: &mut [u8], into: &[Range<usize>]) -> Result<(), Halt>;
    /// The root's bytes, everywhere.
    fn broadcast(&mut self, bytes: &mut [u8], root: usize) -> Result<(), Halt>;
}

/// Where the threads of one channel meet.
pub struct Hub {
    table: Mutex<Table>,
    turned: Condvar,
}

/// What lies on the table of the current round. A round ends when everyone has taken what they need.
struct Table {
    posted: Vec<Option<Arc<Vec<u8>>>>,
    waiting: usize,
    taken: usize,
}

impl Hub {
    pub fn new(size: usize) -> Self {
        let table = Table { posted: vec![None; size], waiting: size, taken: 0 };
        Hub { table: Mutex::new(table), turned: Condvar::new() }
    }
}

/// One thread's end of a [`Hub`].
pub struct Booth {
    pub hub: Arc<Hub>,
    pub rank: usize,
    pub size: usize,
    /// This rank's own, and the one that closes when any rank panics.
    pub gates: [Gate; 2],
}

impl Booth {
    /// Puts `own` on the table and returns what everyone has put there.
    fn swap(&mut self, own: Vec<u8>) -> Result<Vec<Arc<Vec<u8>>>, Halt> {
        let hub = self.hub.clone();
        let mut table = hub.table.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever is quick may come back while others still take from the round before.
        while table.waiting == 0 {
            table = self.sleep(&hub, table)?;
        }
        table.posted[self.rank] = Some(Arc::new(own));
        table.waiting -= 1;
        hub.turned.notify_all();
        while table.waiting > 0 {
            table = self.sleep(&hub, table)?;
        }
        let all = table.posted.iter().flatten().cloned().collect();
        table.taken += 1;
        if table.taken == self.size {
            *table = Table { posted: vec![None; self.size], waiting: self.size, taken: 0 };
            hub.turned.notify_all();
        }
        Ok(all)
    }

    fn sleep<'a>(
        &self,
        hub: &'a Hub,
        table: std::sync::MutexGuard<'a, Table>,
    ) -> Result<std::sync::MutexGuard<'a, Table>, Halt> {
        if self.gates.iter().any(Gate::closed) {
            return Err(Halt::Aborted);
        }
        // The time-out is for the gates, which wake nobody.
        Ok(hub.turned.wait_timeout(table, Duration::from_millis(20)).unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Wire for Booth {
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
        // Everyone's parcels end to end, after the table of their ends, so that a reader finds its own.
        let mut parcel = Vec::with_capacity(8 * self.size + send.len());
        let mut end = 8 * self.size;
        for span in from {
            end += span.len();
            parcel.extend_from_slice(&(end as u64).to_ne_bytes());
        }
        from.iter().for_each(|span| parcel.extend_from_slice(&send[span.clone()]));
        for (parcel, span) in self.swap(parcel)?.iter().zip(into) {
            let at = 8 * self.rank;
            let end = u64::from_ne_bytes(parcel[at..at + 8].try_into().expect("eight bytes")) as usize;
            recv[span.clone()].copy_from_slice(&parcel[end - span.len()..end]);
        }
        Ok(())
    }
    fn all_gather(&mut self, own: &[u8], out: &mut [u8], into: &[Range<usize>]) -> Result<(), Halt> {
        for (bytes, span) in self.swap(own.to_vec())?.iter().zip(into) {
            out[span.clone()].copy_from_slice(bytes);
        }
        Ok(())
    }
    fn broadcast(&mut self, bytes: &mut [u8], root: usize) -> Result<(), Halt> {
        let own = if self.rank == root { bytes.to_vec() } else { Vec::new() };
        bytes.copy_from_slice(&self.swap(own)?[root]);
        Ok(())
    }
}
