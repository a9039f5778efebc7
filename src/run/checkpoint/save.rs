//! The writer: parts, then the manifest, on a thread of its own while training goes on; then retention.

use super::manifest::{Entry, FORMAT, MANIFEST, Manifest, Part, Refusal, build, folder, part_name, read, survey};
use super::{Named, Snapshot};
use crate::data::store::Store;
use crate::fault::{Code, Fault, Result};
use crate::run::lease::{self, Lease};
use safetensors::tensor::TensorView;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Parts hold at most this many bytes, unless a single tensor is larger: it then has a part of its own.
const PART_BYTES: u64 = 1 << 30;

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// The newest so many (at least one stays whatever is asked).
    pub last: usize,
    /// Besides, every one whose step is a multiple of this.
    pub every: Option<u64>,
}

/// The moments of a save at which a test may interfere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Before this part (from 0) is written.
    BeforePart(usize),
    /// All parts are durable, the manifest is not written.
    AfterParts,
    /// The manifest is written: the checkpoint is committed.
    AfterManifest,
    /// Before an old checkpoint or an orphan is removed.
    Retention,
}

/// What is called at each [`Point`].
type Hook = Box<dyn Fn(Point) -> Result<()> + Send + Sync>;

/// Writes the checkpoints of the run that its lease holds. One save runs at a time, in the background.
pub struct Saver {
    writer: Arc<Writer>,
    running: Option<JoinHandle<Result<()>>>,
}

struct Writer {
    run: Store,
    keep: Keep,
    lease: Arc<Lease>,
    part_bytes: u64,
    faults: Hook,
    saved: AtomicU64,
    /// Digest of the newest committed manifest.
    previous: Mutex<Option<String>>,
}

impl Saver {
    /// A saver for `run`, which `lease` must hold. Reads the manifests that are there, so that the chain goes on.
    pub fn new(run: Store, keep: Keep, lease: Arc<Lease>) -> Result<Saver> {
        let entries = survey(&run, lease::fence(&run)?)?;
        let newest = entries.iter().rev().find_map(Entry::usable);
        let writer = Writer {
            saved: AtomicU64::new(newest.map_or(0, |(manifest, _)| manifest.step)),
            previous: Mutex::new(newest.map(|(_, digest)| digest.clone())),
            part_bytes: PART_BYTES,
            faults: Box::new(|_| Ok(())),
            run,
            keep,
            lease,
        };
        Ok(Saver { writer: Arc::new(writer), running: None })
    }

    /// Calls `hook` at every [`Point`]; what it returns happens there. For tests.
    pub fn with_faults(mut self, hook: impl Fn(Point) -> Result<()> + Send + Sync + 'static) -> Saver {
        self.unstarted().faults = Box::new(hook);
        self
    }

    /// Begins a new part after this many bytes instead of 1 GiB.
    pub fn with_part_bytes(mut self, bytes: u64) -> Saver {
        self.unstarted().part_bytes = bytes;
        self
    }

    /// Writes the snapshot in the background. Returns at once, unless the save before it still runs: then it waits.
    ///
    /// When that earlier save failed, its fault is returned and this snapshot is not written; a further call tries
    /// anew. Until a save is committed the checkpoint before it stays whole.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<()> {
        self.wait()?;
        check(&snapshot)?;
        let writer = self.writer.clone();
        let thread = std::thread::Builder::new().name("save".into()).spawn(move || writer.save(snapshot));
        self.running =
            Some(thread.map_err(|error| Fault::failed(format!("cannot start the thread that saves: {error}")))?);
        Ok(())
    }

    /// Waits for the save that runs, and says how it went. The lease is let go with the last reference to it.
    pub fn finish(mut self) -> Result<()> {
        self.wait()
    }

    /// The last committed step, 0 before the first.
    pub fn saved(&self) -> u64 {
        self.writer.saved.load(Ordering::Acquire)
    }

    fn wait(&mut self) -> Result<()> {
        match self.running.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(Fault::failed("the thread that saves checkpoints panicked; see above")),
        }
    }

    fn unstarted(&mut self) -> &mut Writer {
        Arc::get_mut(&mut self.writer).expect("set up before the first save")
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Err(fault) = self.wait() {
            tracing::warn!("the last save failed: {fault}");
        }
    }
}

impl Writer {
    fn save(&self, snapshot: Snapshot) -> Result<()> {
        let step = snapshot.step;
        self.lease.check()?;
        self.room(&snapshot)?;
        let nonce = lease::nonce()?;
        let at = self.run.at(&folder(step));
        let mut written = Vec::new();
        let manifest = match self.parts(&at, snapshot, &nonce, &mut written).and_then(|manifest| {
            self.lease.check()?;
            (self.faults)(Point::AfterParts).map(|()| manifest)
        }) {
            Ok(manifest) => manifest,
            Err(fault) => return Err(self.withdraw(&at, &written, fault)),
        };
        let digest = self.commit(&at, &manifest, &written)?;
        *self.previous.lock().unwrap_or_else(PoisonError::into_inner) = Some(digest);
        self.saved.store(step, Ordering::Release);
        (self.faults)(Point::AfterManifest)?;
        if let Err(fault) = self.retain(&manifest) {
            tracing::warn!("old checkpoints were not removed: {fault}");
        }
        Ok(())
    }

    /// Refuses a save for which the disk has no room, before it fills it.
    fn room(&self, snapshot: &Snapshot) -> Result<()> {
        let needed = required_bytes(snapshot.tensors.iter().map(|tensor| tensor.bytes.len() as u64));
        match self.run.free_bytes() {
            Some(free) if free < needed => Err(Fault::new(
                Code::Disk,
                format!(
                    "{}: the checkpoint at step {} needs {needed} bytes and {free} are free. Free space there, or \
                     keep fewer checkpoints. The one before is whole.",
                    self.run.url(),
                    snapshot.step
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Writes the parts; `written` names each that may be there, also when this fails.
    fn parts(&self, at: &Store, snapshot: Snapshot, nonce: &str, written: &mut Vec<Part>) -> Result<Manifest> {
        let count = snapshot.tensors.len();
        for (index, tensors) in split(snapshot.tensors, self.part_bytes).into_iter().enumerate() {
            (self.faults)(Point::BeforePart(index))?;
            let bytes = pack(tensors)?;
            let part = Part {
                name: part_name(nonce, index),
                bytes: bytes.len() as u64,
                blake3: blake3::hash(&bytes).to_hex().to_string(),
            };
            written.push(part.clone());
            at.put_owned(&part.name, bytes)?;
        }
        Ok(Manifest {
            format: FORMAT,
            build: build(),
            step: snapshot.step,
            samples: snapshot.samples,
            world: snapshot.world,
            epoch: self.lease.epoch(),
            nonce: nonce.to_owned(),
            previous: self.previous.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            tensors: count,
            parts: written.clone(),
            meta: snapshot.meta,
            seal: String::new(),
        })
    }

    /// Writes the manifest and returns its digest. Afterwards the lease is looked at once more. A writer that lost the
    /// run in between leaves its manifest where it is: readers pass over it for its epoch, the new holder removes
    /// it, and removing it here could hit the new holder's own.
    fn commit(&self, at: &Store, manifest: &Manifest, written: &[Part]) -> Result<String> {
        let text = manifest.to_text();
        match at.create(MANIFEST, text.as_bytes()) {
            Ok(true) => {}
            Ok(false) => self.replace(at, manifest, &text).map_err(|fault| self.withdraw(at, written, fault))?,
            // A full disk is certain not to have taken it; any other trouble may have, and then the parts must stay.
            Err(fault) if fault.code == Code::Disk => return Err(self.withdraw(at, written, fault)),
            Err(fault) => return Err(fault),
        }
        match self.lease.check() {
            Err(fault) if fault.code == Code::Held => Err(fault),
            // A lease that cannot be read now will be read before the next save; this one is committed.
            _ => Ok(blake3::hash(text.as_bytes()).to_hex().to_string()),
        }
    }

    /// Puts the manifest over one of an earlier writer at the same step: the run was taken back and came by again,
    /// or the earlier one is damaged.
    fn replace(&self, at: &Store, manifest: &Manifest, text: &str) -> Result<()> {
        let place = format!("{}/{MANIFEST}", at.url());
        match read(at, Some(manifest.step))? {
            Some(Ok((there, _))) if there.epoch > manifest.epoch => Err(Fault::new(
                Code::Held,
                format!("{place}: a later writer (epoch {}, ours {}) holds this run.", there.epoch, manifest.epoch),
            )),
            Some(Err(Refusal::Newer(why))) => {
                Err(Fault::new(Code::Checkpoint, format!("{place} stands in the way: {why}.")))
            }
            _ => {
                tracing::warn!("{place}: replacing the checkpoint that an earlier writer left at this step");
                at.put(MANIFEST, text.as_bytes())
            }
        }
    }

    /// Removes the parts of a save that failed before its commit, and gives its fault back.
    fn withdraw(&self, at: &Store, written: &[Part], fault: Fault) -> Fault {
        for part in written {
            if let Err(error) = at.delete(&part.name) {
                tracing::warn!("a part of a failed save was not removed: {error}");
            }
        }
        fault
    }

    /// Removes what is neither among the last, nor a multiple, nor newer than `newest`: old checkpoints, manifest
    /// first; folders that dead attempts left; parts of dead attempts at the same step.
    fn retain(&self, newest: &Manifest) -> Result<()> {
        let entries = survey(&self.run, lease::fence(&self.run)?)?;
        let whole: Vec<u64> = entries.iter().filter(|entry| entry.usable().is_some()).map(|entry| entry.step).collect();
        let mut kept: BTreeSet<u64> = whole.iter().rev().take(self.keep.last.max(1)).copied().collect();
        kept.extend(
            whole.iter().filter(|&step| self.keep.every.is_some_and(|every| step.is_multiple_of(every.max(1)))),
        );
        for entry in entries.iter().filter(|entry| entry.step != newest.step && !kept.contains(&entry.step)) {
            // Ahead of the newest may lie a dead attempt, which a later commit collects; a superseded manifest goes
            // at once; what a newer build wrote is not ours to remove.
            let collect = match &entry.found {
                None | Some(Ok(_)) | Some(Err(Refusal::Damaged(_))) => entry.step < newest.step,
                Some(Err(Refusal::Superseded(_))) => true,
                Some(Err(Refusal::Newer(_))) => false,
            };
            if collect {
                self.remove(entry);
            }
        }
        let ours: BTreeSet<&str> = newest.parts.iter().map(|part| part.name.as_str()).collect();
        let at = self.run.at(&folder(newest.step));
        let dead = |name: &str| name.ends_with(".safetensors") && !ours.contains(name);
        at.list("")?.iter().filter(|(name, _)| dead(name)).try_for_each(|(name, _)| at.delete(name))
    }

    fn remove(&self, entry: &Entry) {
        let place = folder(entry.step);
        // A writer that was frozen just here and has lost the run must not remove what its successor stands on.
        let removed = (self.faults)(Point::Retention)
            .and_then(|()| self.lease.check())
            .and_then(|()| self.run.at(&place).delete(MANIFEST))
            .and_then(|()| self.run.delete_folder(&place));
        if let Err(fault) = removed {
            tracing::warn!("{place} was not removed: {fault}");
        }
    }
}

/// Bytes that a checkpoint of tensors of these sizes takes in the store, headers and manifest generously included.
pub fn required_bytes(sizes: impl IntoIterator<Item = u64>) -> u64 {
    sizes.into_iter().fold(64 << 10, |sum, bytes| sum.saturating_add(bytes).saturating_add(512))
}

/// A snapshot that could not be read back is refused before anything is written: the caller's error, not the disk's.
fn check(snapshot: &Snapshot) -> Result<()> {
    let mut names = BTreeSet::new();
    for tensor in &snapshot.tensors {
        let bad = |why: &str| Err(Fault::failed(format!("step {}: the tensor {} {why}", snapshot.step, tensor.name)));
        if tensor.name == "__metadata__" || !names.insert(tensor.name.as_str()) {
            return bad("has a name that another has, or that safetensors reserves");
        }
        if TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).is_err() {
            return bad(&format!(
                "of {} bytes is no {:?} of shape {:?}",
                tensor.bytes.len(),
                tensor.dtype,
                tensor.shape
            ));
        }
    }
    Ok(())
}

/// The tensors in runs of at most `limit` bytes, in order; a larger one stands alone. Never empty.
fn split(tensors: Vec<Named>, limit: u64) -> Vec<Vec<Named>> {
    let mut parts = vec![Vec::new()];
    let mut filled = 0u64;
    for tensor in tensors {
        let bytes = tensor.bytes.len() as u64;
        if filled > 0 && filled + bytes > limit {
            parts.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        parts.last_mut().expect("one part at least").push(tensor);
    }
    parts
}

/// One part's file. The tensors are let go here, so that a save holds no more than one part twice.
fn pack(tensors: Vec<Named>) -> Result<Vec<u8>> {
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|t| TensorView::new(t.dtype, t.shape.clone(), &t.bytes).map(|view| (t.name.as_str(), view)))
        .collect();
    views
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|error| Fault::failed(format!("cannot pack tensors for a checkpoint: {error}")))
}
