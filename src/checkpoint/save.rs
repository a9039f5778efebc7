//! Writes checkpoints on a background thread while training continues: parts first, then the manifest, then retention
//! removes old checkpoints.

use super::lease::{self, Lease};
use super::manifest::{
    CheckpointEntry, CheckpointPart, FORMAT_VERSION, MANIFEST_FILE, Manifest, ManifestError, build_name,
    part_file_name, read_manifest, scan, step_folder,
};
use super::{NamedTensor, Snapshot};
use crate::data::store::Store;
use crate::error::{Error, ExitCode, Result};
use safetensors::tensor::TensorView;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Maximum size of a part in bytes. A larger tensor gets a part of its own.
const MAX_PART_BYTES: u64 = 1 << 30;

/// Which checkpoints are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Number of the newest checkpoints to keep; at least one is always kept.
    pub last: usize,
    /// If set, checkpoints whose step is a multiple of this are kept as well.
    pub every: Option<u64>,
}

/// A moment of a save at which a test can interfere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavePoint {
    /// Before this part (from 0) is written.
    BeforePart(usize),
    /// All parts are durable, and the manifest is not written.
    AfterParts,
    /// The manifest is written: the checkpoint is committed.
    AfterManifest,
    /// Before an old checkpoint or an orphan is removed.
    BeforeRemoval,
}

/// A function that is called at each [`SavePoint`].
type SaveHook = Box<dyn Fn(SavePoint) -> Result<()> + Send + Sync>;

/// Writes the checkpoints of the run that its lease holds. At most one save runs at a time, in the background.
pub struct Saver {
    writer: Arc<CheckpointWriter>,
    running: Option<JoinHandle<Result<()>>>,
}

struct CheckpointWriter {
    run: Store,
    retention: Retention,
    lease: Arc<Lease>,
    max_part_bytes: u64,
    hook: SaveHook,
    saved_step: AtomicU64,
    /// Digest of the newest committed manifest.
    previous: Mutex<Option<String>>,
}

impl Saver {
    /// Creates a saver for `run`, which `lease` must hold. Reads the existing manifests, because each manifest contains
    /// the digest of the one before.
    pub fn new(run: Store, retention: Retention, lease: Arc<Lease>) -> Result<Saver> {
        let entries = scan(&run, lease::read_fence(&run)?)?;
        let newest = entries.iter().rev().find_map(CheckpointEntry::usable_manifest);
        let writer = CheckpointWriter {
            saved_step: AtomicU64::new(newest.map_or(0, |(manifest, _)| manifest.step)),
            previous: Mutex::new(newest.map(|(_, digest)| digest.clone())),
            max_part_bytes: MAX_PART_BYTES,
            hook: Box::new(|_| Ok(())),
            run,
            retention,
            lease,
        };
        Ok(Saver { writer: Arc::new(writer), running: None })
    }

    /// Calls `hook` at every [`SavePoint`]; an error that it returns is treated as the save's own. For tests.
    pub fn with_hook(mut self, hook: impl Fn(SavePoint) -> Result<()> + Send + Sync + 'static) -> Saver {
        self.unstarted_writer().hook = Box::new(hook);
        self
    }

    /// Sets the maximum size of a part, instead of 1 GiB.
    pub fn with_max_part_bytes(mut self, bytes: u64) -> Saver {
        self.unstarted_writer().max_part_bytes = bytes;
        self
    }

    /// Writes the snapshot in the background. Returns at once, unless the previous save still runs: then it waits.
    ///
    /// # Errors
    /// The error of the previous save, if that failed; this snapshot is then not written, and a further call tries
    /// again. Until a save is committed, the previous checkpoint stays intact.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<()> {
        self.wait()?;
        check(&snapshot)?;
        let writer = self.writer.clone();
        let thread = std::thread::Builder::new().name("save".into()).spawn(move || writer.save(snapshot));
        self.running =
            Some(thread.map_err(|error| Error::failed(format!("cannot start the thread that saves: {error}")))?);
        Ok(())
    }

    /// Waits for the running save and returns its result. The lease is released with the last reference to it.
    pub fn finish(mut self) -> Result<()> {
        self.wait()
    }

    /// Returns the last committed step, 0 before the first.
    pub fn saved_step(&self) -> u64 {
        self.writer.saved_step.load(Ordering::Acquire)
    }

    fn wait(&mut self) -> Result<()> {
        match self.running.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::failed("the thread that saves checkpoints panicked; see above")),
        }
    }

    fn unstarted_writer(&mut self) -> &mut CheckpointWriter {
        Arc::get_mut(&mut self.writer).expect("set up before the first save")
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Err(error) = self.wait() {
            tracing::warn!("the last save failed: {error}");
        }
    }
}

impl CheckpointWriter {
    fn save(&self, snapshot: Snapshot) -> Result<()> {
        let step = snapshot.step;
        self.lease.check()?;
        self.check_free_space(&snapshot)?;
        let nonce = lease::random_nonce()?;
        let folder = self.run.subfolder(&step_folder(step));
        let mut written = Vec::new();
        let manifest = match self.prepare(&folder, snapshot, &nonce, &mut written) {
            Ok(manifest) => manifest,
            Err(error) => {
                self.rollback(&folder, &written);
                return Err(error);
            }
        };
        let digest = self.commit(&folder, &manifest, &written)?;
        *self.previous.lock().unwrap_or_else(PoisonError::into_inner) = Some(digest);
        self.saved_step.store(step, Ordering::Release);
        (self.hook)(SavePoint::AfterManifest)?;
        if let Err(error) = self.remove_old(&manifest) {
            tracing::warn!("old checkpoints were not removed: {error}");
        }
        Ok(())
    }

    /// Refuses a save that does not fit on the disk before it fills the disk.
    fn check_free_space(&self, snapshot: &Snapshot) -> Result<()> {
        let needed = required_bytes(snapshot.tensors.iter().map(|tensor| tensor.bytes.len() as u64));
        match self.run.free_bytes() {
            Some(free) if free < needed => Err(Error::new(
                ExitCode::Disk,
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

    /// Does everything before the commit: writes the parts and checks the lease again.
    fn prepare(
        &self,
        folder: &Store,
        snapshot: Snapshot,
        nonce: &str,
        written: &mut Vec<CheckpointPart>,
    ) -> Result<Manifest> {
        let manifest = self.write_parts(folder, snapshot, nonce, written)?;
        self.lease.check()?;
        (self.hook)(SavePoint::AfterParts)?;
        Ok(manifest)
    }

    /// Writes the parts and returns the manifest. `written` lists each part that may exist, even if this fails.
    fn write_parts(
        &self,
        folder: &Store,
        snapshot: Snapshot,
        nonce: &str,
        written: &mut Vec<CheckpointPart>,
    ) -> Result<Manifest> {
        let tensor_count = snapshot.tensors.len();
        for (index, tensors) in split(snapshot.tensors, self.max_part_bytes).into_iter().enumerate() {
            (self.hook)(SavePoint::BeforePart(index))?;
            let bytes = pack(tensors)?;
            let part = CheckpointPart {
                name: part_file_name(nonce, index),
                bytes: bytes.len() as u64,
                blake3: blake3::hash(&bytes).to_hex().to_string(),
            };
            written.push(part.clone());
            folder.put_owned(&part.name, bytes)?;
        }
        Ok(Manifest {
            format: FORMAT_VERSION,
            build: build_name(),
            step: snapshot.step,
            samples: snapshot.samples,
            world: snapshot.world,
            epoch: self.lease.epoch(),
            nonce: nonce.to_owned(),
            previous: self.previous.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            tensors: tensor_count,
            parts: written.clone(),
            meta: snapshot.meta,
            seal: String::new(),
        })
    }

    /// Writes the manifest and returns its digest, then checks the lease once more. A writer that lost the run in
    /// between leaves its manifest in place: readers skip it because of its epoch, the new holder removes it, and
    /// removing it here could remove the new holder's own.
    fn commit(&self, folder: &Store, manifest: &Manifest, written: &[CheckpointPart]) -> Result<String> {
        let text = manifest.to_text();
        match folder.create(MANIFEST_FILE, text.as_bytes()) {
            Ok(true) => {}
            Ok(false) => {
                if let Err(error) = self.replace_manifest(folder, manifest, &text) {
                    self.rollback(folder, written);
                    return Err(error);
                }
            }
            Err(error) => {
                // A full disk certainly has no manifest. After any other error it may exist, so the parts must stay.
                if error.code == ExitCode::Disk {
                    self.rollback(folder, written);
                }
                return Err(error);
            }
        }
        match self.lease.check() {
            Err(error) if error.code == ExitCode::LeaseHeld => Err(error),
            // A lease that cannot be read now is read before the next save; this checkpoint is committed.
            _ => Ok(blake3::hash(text.as_bytes()).to_hex().to_string()),
        }
    }

    /// Overwrites the manifest of an earlier writer at the same step: the run went back and reached this step again, or
    /// the earlier manifest is damaged.
    fn replace_manifest(&self, folder: &Store, manifest: &Manifest, text: &str) -> Result<()> {
        let url = format!("{}/{MANIFEST_FILE}", folder.url());
        match read_manifest(folder, Some(manifest.step))? {
            Some(Ok((existing, _))) if existing.epoch > manifest.epoch => Err(Error::new(
                ExitCode::LeaseHeld,
                format!("{url}: a later writer (epoch {}, ours {}) holds this run.", existing.epoch, manifest.epoch),
            )),
            Some(Err(ManifestError::Newer(reason))) => {
                Err(Error::new(ExitCode::Checkpoint, format!("{url} stands in the way: {reason}.")))
            }
            _ => {
                tracing::warn!("{url}: replacing the checkpoint that an earlier writer left at this step");
                folder.put(MANIFEST_FILE, text.as_bytes())
            }
        }
    }

    /// Removes the parts of a save that failed before its commit.
    fn rollback(&self, folder: &Store, written: &[CheckpointPart]) {
        for part in written {
            if let Err(error) = folder.delete(&part.name) {
                tracing::warn!("a part of a failed save was not removed: {error}");
            }
        }
    }

    /// Applies the retention policy after `newest` was committed. Removes old checkpoints (manifest first), folders of
    /// interrupted saves, and parts of interrupted saves at the same step.
    fn remove_old(&self, newest: &Manifest) -> Result<()> {
        let entries = scan(&self.run, lease::read_fence(&self.run)?)?;
        let steps: Vec<u64> =
            entries.iter().filter(|entry| entry.usable_manifest().is_some()).map(|entry| entry.step).collect();
        let mut retained: BTreeSet<u64> = steps.iter().rev().take(self.retention.last.max(1)).copied().collect();
        if let Some(every) = self.retention.every {
            retained.extend(steps.iter().filter(|&step| step.is_multiple_of(every.max(1))));
        }
        for entry in entries.iter().filter(|entry| entry.step != newest.step && !retained.contains(&entry.step)) {
            // A folder of an interrupted save ahead of the newest step is removed after a later commit. A superseded
            // manifest is removed at once. A newer build's checkpoint is not ours to remove.
            let is_removable = match &entry.manifest {
                None | Some(Ok(_)) | Some(Err(ManifestError::Damaged(_))) => entry.step < newest.step,
                Some(Err(ManifestError::Superseded(_))) => true,
                Some(Err(ManifestError::Newer(_))) => false,
            };
            if is_removable {
                self.remove(entry);
            }
        }
        let parts: BTreeSet<&str> = newest.parts.iter().map(|part| part.name.as_str()).collect();
        let folder = self.run.subfolder(&step_folder(newest.step));
        let is_orphan = |name: &str| name.ends_with(".safetensors") && !parts.contains(name);
        folder.list("")?.iter().filter(|(name, _)| is_orphan(name)).try_for_each(|(name, _)| folder.delete(name))
    }

    fn remove(&self, entry: &CheckpointEntry) {
        let folder = step_folder(entry.step);
        // The lease is checked first: a writer that was suspended here and lost the run must not remove its successor's
        // checkpoints.
        let result = (self.hook)(SavePoint::BeforeRemoval)
            .and_then(|()| self.lease.check())
            .and_then(|()| self.run.subfolder(&folder).delete(MANIFEST_FILE))
            .and_then(|()| self.run.delete_folder(&folder));
        if let Err(error) = result {
            tracing::warn!("{folder} was not removed: {error}");
        }
    }
}

/// Returns an upper bound of the bytes that a checkpoint with tensors of these sizes takes in the store, including
/// headers and manifest.
pub fn required_bytes(sizes: impl IntoIterator<Item = u64>) -> u64 {
    sizes.into_iter().fold(64 << 10, |sum, bytes| sum.saturating_add(bytes).saturating_add(512))
}

/// Refuses a snapshot that could not be read back, before anything is written. That is an error of the caller, not of
/// the disk.
fn check(snapshot: &Snapshot) -> Result<()> {
    let mut names = BTreeSet::new();
    for tensor in &snapshot.tensors {
        let refuse =
            |reason: &str| Err(Error::failed(format!("step {}: the tensor {} {reason}", snapshot.step, tensor.name)));
        if tensor.name == "__metadata__" || !names.insert(tensor.name.as_str()) {
            return refuse("has a name that another has, or that safetensors reserves");
        }
        if TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).is_err() {
            return refuse(&format!(
                "of {} bytes is no {:?} of shape {:?}",
                tensor.bytes.len(),
                tensor.dtype,
                tensor.shape
            ));
        }
    }
    Ok(())
}

/// Splits the tensors, in order, into parts of at most `max_bytes` bytes; a larger tensor is a part of its own. Returns
/// at least one part, which may have no tensors.
fn split(tensors: Vec<NamedTensor>, max_bytes: u64) -> Vec<Vec<NamedTensor>> {
    let mut parts = vec![Vec::new()];
    let mut part_bytes = 0u64;
    for tensor in tensors {
        let bytes = tensor.bytes.len() as u64;
        if part_bytes > 0 && part_bytes + bytes > max_bytes {
            parts.push(Vec::new());
            part_bytes = 0;
        }
        part_bytes += bytes;
        parts.last_mut().expect("at least one part").push(tensor);
    }
    parts
}

/// Serializes one part. The tensors are consumed, so that a save holds at most one part twice in memory.
fn pack(tensors: Vec<NamedTensor>) -> Result<Vec<u8>> {
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|tensor| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            view.map(|view| (tensor.name.as_str(), view))
        })
        .collect();
    views
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|error| Error::failed(format!("cannot pack tensors for a checkpoint: {error}")))
}
