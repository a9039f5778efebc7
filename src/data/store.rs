//! An object store behind a URL: whole objects in and out. All guarantees that the rest of the program relies on are
//! made here: atomic durable puts, a reliable `create`, reads that are never short.
//!
//! Calls block on a small runtime of the process, so they must not be made from inside an async task.

mod cloud;
mod error;
mod local_path;
mod aws_profile;
mod retry;

use crate::error::{Error, ExitCode, Result};
use bytes::Bytes;
use error::StoreErrorKind;
use futures::{StreamExt, TryStreamExt};
use local_path::{file_url_to_path, split_scheme, to_absolute};
use object_store::path::Path as Key;
use object_store::{
    Error as StoreError, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    WriteMultipart,
};
use retry::RetryBudget;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// The URL schemes that this build reads, for messages.
const SCHEMES: &str = "file:// (or a plain path), s3://, gs://, az://, http:// and https://";

/// Maximum number of attempts of `create` after ambiguous errors.
const MAX_CREATE_ATTEMPTS: usize = 4;

/// Default time for which a store may be unavailable before a call fails.
pub const DEFAULT_STORE_TIMEOUT: Duration = Duration::from_secs(300);

/// Bytes of a part; a larger object is read in parts, several at a time.
const PART_BYTES: u64 = 16 << 20;
/// Bytes above which an object is written in parts.
const MIN_MULTIPART_BYTES: u64 = 4 * PART_BYTES;
/// Maximum number of parts in flight.
const MAX_CONCURRENT_PARTS: usize = 8;

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("store")
        .enable_all()
        .build()
        .expect("two threads for the store")
});

/// Runs a transfer in the background, on the stores' threads. It must not compute.
pub fn spawn(transfer: impl Future<Output = ()> + Send + 'static) {
    RUNTIME.spawn(transfer);
}

/// A folder in an object store. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Store {
    /// Client whose failed calls are repeated by `retry`.
    client: Arc<dyn ObjectStore>,
    /// Client for multipart uploads, which repeats failed calls itself.
    upload_client: Arc<dyn ObjectStore>,
    root: Key,
    /// Scheme and authority, the start of every URL in messages.
    origin: String,
    is_local: bool,
    retry: Arc<RetryBudget>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.url())
    }
}

impl Store {
    /// Opens a plain path (absolute or relative) or a URL. Nothing is read or written: a folder that does not exist
    /// reads as empty and is created with its first object. For a cloud store the credentials are looked up now, by the
    /// cloud's usual chain.
    ///
    /// # Errors
    /// ExitCode::Credentials where there are no credentials.
    pub fn open(url_or_path: &str) -> Result<Store> {
        Self::open_with_timeout(url_or_path, DEFAULT_STORE_TIMEOUT)
    }

    /// Opens like [`Store::open`]; calls fail with ExitCode::Store once the store was unavailable for `timeout`.
    pub fn open_with_timeout(url_or_path: &str, timeout: Duration) -> Result<Store> {
        let (scheme, rest) = split_scheme(url_or_path);
        match scheme {
            None => Self::open_local(Path::new(rest)),
            Some("file") => Self::open_local(&file_url_to_path(rest)?),
            Some(_) => {
                let cloud::CloudStore { client, upload_client, root, origin } = cloud::open(url_or_path)?;
                let retry = Arc::new(RetryBudget::new(&origin, timeout));
                Ok(Store { client, upload_client, root, origin, is_local: false, retry })
            }
        }
    }

    /// Makes a store over a given backend, without retries; `origin` (such as `memory://`) names it in messages.
    pub fn from_backend(backend: Arc<dyn ObjectStore>, origin: &str) -> Store {
        Store {
            upload_client: backend.clone(),
            client: backend,
            root: Key::default(),
            origin: origin.to_owned(),
            is_local: false,
            retry: Arc::new(RetryBudget::new(origin, Duration::ZERO)),
        }
    }

    /// Opens a folder on a local disk. Its errors are not retried.
    fn open_local(path: &Path) -> Result<Store> {
        let path = to_absolute(path)?;
        let text = path.to_str().ok_or_else(|| {
            Error::usage(format!("{}: a store's path must be valid UTF-8; rename it", path.display()))
        })?;
        let root = Key::parse(text);
        let root = root.map_err(|error| Error::usage(format!("{text}: not usable as a store's path: {error}")))?;
        let client = Arc::new(object_store::local::LocalFileSystem::new().with_fsync(true));
        let origin = "file:///".to_owned();
        let retry = Arc::new(RetryBudget::new(&origin, Duration::ZERO));
        Ok(Store { upload_client: client.clone(), client, root, origin, is_local: true, retry })
    }

    /// Returns the sub-folder `child` (which may contain slashes).
    ///
    /// # Panics
    /// Panics if `child` leaves its parent or contains control characters: names from outside are checked where they
    /// are read.
    pub fn subfolder(&self, child: &str) -> Store {
        self.try_subfolder(child).unwrap_or_else(|error| panic!("{error}"))
    }

    fn try_subfolder(&self, child: &str) -> Result<Store> {
        Ok(Store { root: self.key(child)?, ..self.clone() })
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// ExitCode::Usage where it does not exist, because a required path comes from the user.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        self.get_optional(path)?.ok_or_else(|| not_found(&self.display_name(path)))
    }

    /// Reads a whole object; none where it does not exist.
    pub fn get_optional(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let key = self.key(path)?;
        match RUNTIME.block_on(self.retry.retry(|| self.get_with_size(&key))) {
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.read_error(path, error)),
            Ok((size, bytes)) if bytes.len() as u64 == size => Ok(Some(bytes)),
            Ok((size, bytes)) => Err(self.short_read_error(path, bytes.len(), size)),
        }
    }

    /// Reads an object and the size that the store reports: in one request, or in concurrent parts where it is large.
    async fn get_with_size(&self, key: &Key) -> object_store::Result<(u64, Vec<u8>)> {
        let response = self.client.get_opts(key, GetOptions::default()).await?;
        let size = response.meta.size;
        if self.is_local || size <= PART_BYTES {
            return Ok((size, response.bytes().await?.into()));
        }
        let etag = response.meta.e_tag.clone();
        drop(response);
        let ranges = (0..size.div_ceil(PART_BYTES)).map(|part| part * PART_BYTES..((part + 1) * PART_BYTES).min(size));
        let fetch = |range: Range<u64>| {
            // The ETag makes every part belong to the same version of the object.
            let options =
                GetOptions { range: Some(GetRange::Bounded(range)), if_match: etag.clone(), ..Default::default() };
            self.retry.retry(move || {
                let options = options.clone();
                async move { self.client.get_opts(key, options).await?.bytes().await }
            })
        };
        let parts = futures::stream::iter(ranges.map(fetch)).buffered(MAX_CONCURRENT_PARTS);
        let bytes = parts.try_fold(Vec::new(), |mut bytes, part| async move {
            bytes.extend_from_slice(&part);
            Ok(bytes)
        });
        Ok((size, bytes.await?))
    }

    /// Reads a range of an object, in full: a range beyond the object's end is an error.
    pub fn get_range(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>> {
        if self.is_local {
            self.read_local_range(path, range)
        } else {
            RUNTIME.block_on(self.fetch(path, range)).map(Into::into)
        }
    }

    /// Reads a range like [`Store::get_range`], for many requests in flight: to be awaited inside [`spawn`].
    pub async fn fetch(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let key = self.key(path)?;
        let length = range.end - range.start;
        let mut may_repeat = true;
        loop {
            let bytes = self.retry.retry(|| self.client.get_range(&key, range.clone())).await;
            let bytes = bytes
                .map_err(|error| self.read_error(&format!("{path} bytes {}..{}", range.start, range.end), error))?;
            if bytes.len() as u64 == length {
                return Ok(bytes);
            }
            // A store or a proxy may end a response early without an error; that is tolerated once.
            if !may_repeat {
                return Err(self.short_read_error(path, bytes.len(), length));
            }
            may_repeat = false;
        }
    }

    /// Reads a range of a local file directly, without the runtime.
    fn read_local_range(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>> {
        // Refuses the same paths as the other calls.
        self.key(path)?;
        let mut bytes = vec![0; (range.end - range.start) as usize];
        read_file_range(Path::new(&self.display_name(path)), range, &mut bytes)?;
        Ok(bytes)
    }

    /// Returns the object's size in bytes; none where it does not exist.
    pub fn size(&self, path: &str) -> Result<Option<u64>> {
        let key = self.key(path)?;
        match RUNTIME.block_on(self.retry.retry(|| self.client.head(&key))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.read_error(path, error)),
        }
    }

    /// Writes a whole object and replaces an older one. Readers see the old or the new object, never a part; when this
    /// returns, the object survives a power failure.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Result<()> {
        self.put_owned(path, bytes.to_vec())
    }

    /// Writes like [`Store::put`], without a copy.
    pub fn put_owned(&self, path: &str, bytes: Vec<u8>) -> Result<()> {
        let key = self.key(path)?;
        let length = bytes.len();
        let payload = Bytes::from(bytes);
        let put = async {
            if !self.is_local && length as u64 > MIN_MULTIPART_BYTES {
                return self.put_multipart(&key, payload).await;
            }
            let put = || self.client.put_opts(&key, PutPayload::from(payload.clone()), PutOptions::default());
            self.retry.retry(put).await.map(drop)
        };
        RUNTIME.block_on(put).map_err(|error| self.write_error(path, length, error))
    }

    /// Uploads concurrent parts; the whole object appears when the upload completes.
    async fn put_multipart(&self, key: &Key, mut bytes: Bytes) -> object_store::Result<()> {
        let upload = self.retry.retry(|| self.upload_client.put_multipart(key)).await?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES as usize);
        while !bytes.is_empty() {
            parts.wait_for_capacity(MAX_CONCURRENT_PARTS).await?;
            parts.put(bytes.split_to(bytes.len().min(PART_BYTES as usize)));
        }
        parts.finish().await.map(drop)
    }

    /// Writes an object only if none exists. Returns true where the object now consists of these bytes, false where it
    /// consists of others.
    ///
    /// A store may commit a write and lose the response, or report a false conflict, so anything but a plain success is
    /// settled by reading back. The bytes must therefore be unique to the writer (contain a nonce).
    pub fn create(&self, path: &str, bytes: &[u8]) -> Result<bool> {
        let key = self.key(path)?;
        let mut last = None;
        for _ in 0..MAX_CREATE_ATTEMPTS {
            let payload = PutPayload::from(bytes.to_vec());
            let put = self.client.put_opts(&key, payload, PutOptions::from(PutMode::Create));
            let Err(error) = RUNTIME.block_on(put) else {
                return Ok(true);
            };
            let error = self.write_error(path, bytes.len(), error);
            match self.get_optional(path) {
                Ok(Some(existing)) => return Ok(existing == bytes),
                Ok(None) if error.code == ExitCode::Disk => return Err(error),
                // The conflict was false, or the write failed.
                Ok(None) => last = Some(error),
                Err(_) => return Err(error),
            }
        }
        Err(last.expect("an attempt was made"))
    }

    /// Returns all objects below `prefix`, as (path relative to this store, bytes), sorted by path.
    pub fn list(&self, prefix: &str) -> Result<Vec<(String, u64)>> {
        let key = self.key(prefix)?;
        let objects: Vec<_> = RUNTIME
            .block_on(self.retry.retry(|| self.client.list(Some(&key)).try_collect()))
            .map_err(|error| self.read_error(prefix, error))?;
        let mut files: Vec<_> = objects.iter().map(|meta| (self.relative_path(&meta.location), meta.size)).collect();
        files.sort();
        Ok(files)
    }

    /// Returns the names of the immediate sub-folders of `prefix`, sorted. On a disk a folder may be empty.
    pub fn list_folders(&self, prefix: &str) -> Result<Vec<String>> {
        let key = self.key(prefix)?;
        let listing = RUNTIME
            .block_on(self.retry.retry(|| self.client.list_with_delimiter(Some(&key))))
            .map_err(|error| self.read_error(prefix, error))?;
        let mut names: Vec<_> =
            listing.common_prefixes.iter().filter_map(|key| key.filename().map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    }

    /// Removes an object; it need not exist.
    pub fn delete(&self, path: &str) -> Result<()> {
        let key = self.key(path)?;
        match RUNTIME.block_on(self.retry.retry(|| self.client.delete(&key))) {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.write_error(path, 0, error)),
        }
    }

    /// Removes a folder and everything in it; it need not exist. On a disk this includes temporary files of a killed
    /// write, which are not listed.
    pub fn delete_folder(&self, path: &str) -> Result<()> {
        if let Some(folder) = self.try_subfolder(path)?.local_path() {
            return match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::disk(folder.display(), error)),
                _ => Ok(()),
            };
        }
        self.list(path)?.iter().try_for_each(|(object, _)| self.delete(object))
    }

    /// Returns whether the store is accessed over a network.
    pub fn is_remote(&self) -> bool {
        !self.is_local
    }

    /// Returns the folder on the local disk, for a local store.
    pub fn local_path(&self) -> Option<PathBuf> {
        self.is_local.then(|| Path::new("/").join(self.root.as_ref()))
    }

    /// Returns the URL, which [`Store::open`] accepts. It contains neither a query nor a secret.
    pub fn url(&self) -> String {
        let mut url = self.origin.clone();
        for byte in self.root.as_ref().bytes() {
            let is_plain = byte.is_ascii_alphanumeric() || b"/-._~+=,@".contains(&byte);
            if is_plain {
                url.push(byte as char);
            } else {
                url.push_str(&format!("%{byte:02X}"));
            }
        }
        url
    }

    /// Returns the bytes that this process may still write to a local store; none for any other.
    pub fn free_bytes(&self) -> Option<u64> {
        let folder = self.local_path()?;
        let existing = folder.ancestors().find(|ancestor| ancestor.exists())?;
        let stat = rustix::fs::statvfs(existing).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Returns the full key of a path relative to this store. Refuses `..`, empty segments and control characters.
    fn key(&self, path: &str) -> Result<Key> {
        let relative = Key::parse(path)
            .map_err(|error| Error::usage(format!("{}: not a path inside a store: {error}", path.escape_debug())))?;
        Ok(self.root.parts().chain(relative.parts()).collect())
    }

    fn relative_path(&self, location: &Key) -> String {
        let full = location.as_ref();
        full.strip_prefix(self.root.as_ref()).unwrap_or(full).trim_start_matches('/').to_owned()
    }

    /// Returns whether the store can list its objects; a web server cannot.
    pub fn can_list(&self) -> bool {
        !self.origin.starts_with("http")
    }

    /// Returns the last part of the URL: the name of the folder or the bucket.
    pub fn folder_name(&self) -> String {
        let bucket = || self.origin.trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty());
        self.root.filename().or_else(bucket).unwrap_or("data").to_owned()
    }

    /// Returns the name of an object for messages: its path or its URL.
    pub fn display_name(&self, path: &str) -> String {
        match self.local_path() {
            Some(folder) => folder.join(path).display().to_string(),
            None => format!("{}/{path}", self.url().trim_end_matches('/')),
        }
    }

    fn short_read_error(&self, path: &str, received: usize, expected: u64) -> Error {
        let name = self.display_name(path);
        Error::new(
            ExitCode::Store,
            format!(
                "{name}: the store returned {received} of {expected} bytes. Try again; if it stays, the object is \
                 damaged."
            ),
        )
    }

    fn read_error(&self, path: &str, error: StoreError) -> Error {
        let name = self.display_name(path);
        match error::classify(&error) {
            StoreErrorKind::NotFound => not_found(&name),
            StoreErrorKind::Denied => denied(&name, &error),
            _ => self.unavailable(&name, "read", &error),
        }
    }

    fn write_error(&self, path: &str, bytes: usize, error: StoreError) -> Error {
        let name = self.display_name(path);
        if error::classify(&error) == StoreErrorKind::Denied {
            return denied(&name, &error);
        }
        match disk_error(&error) {
            Some(cause) => Error::new(
                ExitCode::Disk,
                format!("{name}: cannot write {bytes} bytes: {cause}. Free space there, or choose another place."),
            ),
            None => self.unavailable(&name, &format!("written ({bytes} bytes)"), &error),
        }
    }

    /// Makes the error of a store that could not be used; `action` is a participle, such as "read".
    fn unavailable(&self, name: &str, action: &str, error: &StoreError) -> Error {
        let limit = self.retry.limit();
        let retried = error::classify(error) == StoreErrorKind::Transient && !limit.is_zero();
        let duration = if retried { format!(" after {} s of trying", limit.as_secs()) } else { String::new() };
        let message = format!("{name}: cannot be {action}{duration}: {}", error::summarize(error));
        Error::new(ExitCode::Store, message)
    }
}

fn not_found(name: &str) -> Error {
    Error::usage(format!("{name}: not found. Check the path, and that the data were written there."))
}

fn denied(name: &str, error: &StoreError) -> Error {
    let why = error::summarize(error);
    // To a store that checks signatures a wrong clock looks like a wrong key.
    let remedy =
        if why.contains("TimeTooSkewed") { "set this machine's clock" } else { "check them, and their permissions" };
    Error::new(ExitCode::Credentials, format!("{name}: the store refused the credentials: {why}; {remedy}"))
}

/// Fills `buffer` with the bytes of a local file from `range.start` on.
///
/// # Errors
/// ExitCode::Corrupt where the file ends too early.
pub(super) fn read_file_range(path: &Path, range: Range<u64>, buffer: &mut [u8]) -> Result<()> {
    let file = std::fs::File::open(path).map_err(|error| Error::disk(path.display(), error))?;
    file.read_exact_at(buffer, range.start).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            Error::new(ExitCode::Corrupt, format!("{}: it ends before byte {}", path.display(), range.end))
        }
        _ => Error::disk(path.display(), error),
    })
}

/// Returns the local I/O error behind `error`, if it is one that the user can fix on the disk.
fn disk_error(error: &StoreError) -> Option<&std::io::Error> {
    use std::io::ErrorKind::*;
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            let is_disk =
                matches!(io.kind(), StorageFull | QuotaExceeded | PermissionDenied | ReadOnlyFilesystem | FileTooLarge);
            return (is_disk || io.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())).then_some(io);
        }
        cause = current.source();
    }
    None
}
