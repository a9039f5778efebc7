//! An object store behind a URL: whole objects in, whole objects out, and every promise that the rest of the program
//! leans on (atomic durable puts, an honest `create`, reads that are never short) kept in this one place.
//!
//! Calls block. They run on a small runtime of the process, so they must not be made from inside an async task.

mod cloud;
mod patience;
mod place;
mod profile;
mod words;

use crate::fault::{Code, Fault, Result};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{
    Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, WriteMultipart,
};
use patience::Patience;
use place::{absolute, path_of_file_url, split_scheme};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use words::Kind;

/// The URL schemes that this build reads, for messages.
const SCHEMES: &str = "file:// (or a plain path), s3://, gs://, az://, http:// and https://";

/// How often `create` asks again after an answer that settles nothing.
const CREATE_ATTEMPTS: usize = 4;

/// How long a store may be away before a program gives up, where nobody says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// An object larger than this travels in parts of this size, several at a time.
const PART: u64 = 16 << 20;
const PARTS_AT_A_TIME: usize = 8;

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("store")
        .enable_all()
        .build()
        .expect("two threads for the store")
});

/// Runs a transfer in the background, on the threads of the stores. It must not compute.
pub fn spawn(transfer: impl Future<Output = ()> + Send + 'static) {
    RUNTIME.spawn(transfer);
}

/// A folder in an object store. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    /// For uploads in parts: the same store, its client asking again by itself.
    bulk: Arc<dyn ObjectStore>,
    root: Key,
    /// Scheme and authority, in front of every URL shown.
    origin: String,
    on_disk: bool,
    patience: Arc<Patience>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.url())
    }
}

impl Store {
    /// Opens a plain path (absolute or relative) or a URL. Nothing is read or made yet: a folder that is not there
    /// reads as empty and appears with its first object. For a cloud's store the credentials are looked for now
    /// (Code::Credentials where there are none), by the cloud's usual chain.
    pub fn open(url_or_path: &str) -> Result<Store> {
        Self::open_patiently(url_or_path, PATIENCE)
    }

    /// As [`Store::open`]; the store may be away for so long before a call faults with Code::Store.
    pub fn open_patiently(url_or_path: &str, limit: Duration) -> Result<Store> {
        let (scheme, rest) = split_scheme(url_or_path);
        match scheme {
            None => Self::on_disk(Path::new(rest)),
            Some("file") => Self::on_disk(&path_of_file_url(rest)?),
            Some(_) => {
                let cloud::Opened { quick, bulk, root, origin } = cloud::open(url_or_path)?;
                let patience = Arc::new(Patience::new(&origin, limit));
                Ok(Store { inner: quick, bulk, root, origin, on_disk: false, patience })
            }
        }
    }

    /// A store over a given backend; `origin` (such as `memory://`) names it in messages.
    pub fn over(inner: Arc<dyn ObjectStore>, origin: &str) -> Store {
        let patience = Arc::new(Patience::new(origin, Duration::ZERO));
        Store { bulk: inner.clone(), inner, root: Key::default(), origin: origin.to_owned(), on_disk: false, patience }
    }

    fn on_disk(path: &Path) -> Result<Store> {
        let path = absolute(path)?;
        let text = path.to_str().ok_or_else(|| {
            Fault::usage(format!("{}: a store's path must be valid UTF-8; rename it", path.display()))
        })?;
        let root = Key::parse(text).map_err(|e| Fault::usage(format!("{text}: not usable as a store's path: {e}")))?;
        let inner = Arc::new(object_store::local::LocalFileSystem::new().with_fsync(true));
        // A disk that fails is not waited for.
        let (origin, patience) = ("file:///".to_owned(), Arc::new(Patience::new("file:///", Duration::ZERO)));
        Ok(Store { bulk: inner.clone(), inner, root, origin, on_disk: true, patience })
    }

    /// The sub-folder `child` (which may hold slashes).
    ///
    /// # Panics
    /// When `child` climbs out of its parent or holds control characters: names from outside are checked where
    /// they are read.
    pub fn at(&self, child: &str) -> Store {
        let root = self.key(child).unwrap_or_else(|fault| panic!("{fault}"));
        Store { root, ..self.clone() }
    }

    /// The whole object. Absent: a usage fault, since a path that must exist came from the user.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        self.get_if_there(path)?.ok_or_else(|| {
            Fault::usage(format!(
                "{}: not found. Check the path, and that the data were written there.",
                self.name(path)
            ))
        })
    }

    /// The whole object, or None when the store says that it is not there. Any other trouble is a fault.
    pub fn get_if_there(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let key = self.key(path)?;
        let answer = RUNTIME.block_on(self.patience.over(|| self.whole(&key)));
        match answer {
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.reading(path, error)),
            Ok((size, bytes)) if bytes.len() as u64 == size => Ok(Some(bytes)),
            Ok((size, bytes)) => Err(self.short(path, bytes.len(), size)),
        }
    }

    /// An object and the size that the store gives for it: in one request, or in several at a time where it is large.
    async fn whole(&self, key: &Key) -> object_store::Result<(u64, Vec<u8>)> {
        let answer = self.inner.get_opts(key, GetOptions::default()).await?;
        let (size, tag) = (answer.meta.size, answer.meta.e_tag.clone());
        if self.on_disk || size <= PART {
            return Ok((size, answer.bytes().await?.into()));
        }
        drop(answer);
        let parts = (0..size.div_ceil(PART)).map(|part| part * PART..((part + 1) * PART).min(size));
        // Every part is of the object that was asked about first, or there is an error.
        let options =
            |range| GetOptions { range: Some(GetRange::Bounded(range)), if_match: tag.clone(), ..Default::default() };
        let fetch = |range: Range<u64>| {
            let options = options(range);
            self.patience.over(move || {
                let options = options.clone();
                async move { self.inner.get_opts(key, options).await?.bytes().await }
            })
        };
        let parts = futures::stream::iter(parts.map(fetch)).buffered(PARTS_AT_A_TIME);
        let bytes = parts.try_fold(Vec::new(), |mut bytes, part| async move {
            bytes.extend_from_slice(&part);
            Ok(bytes)
        });
        Ok((size, bytes.await?))
    }

    /// Bytes `range` of the object, all of them: a range beyond the object's end is a fault.
    pub fn get_range(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>> {
        match self.on_disk {
            true => self.read_range(path, range),
            false => RUNTIME.block_on(self.fetch(path, range)).map(Into::into),
        }
    }

    /// As [`Store::get_range`], for many requests in flight: to be awaited in what is given to [`spawn`].
    pub async fn fetch(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let key = self.key(path)?;
        let wanted = range.end - range.start;
        let mut again = true;
        loop {
            let bytes = self.patience.over(|| self.inner.get_range(&key, range.clone())).await;
            let bytes =
                bytes.map_err(|error| self.reading(&format!("{path} bytes {}..{}", range.start, range.end), error))?;
            // A store or a proxy may end an answer early and call it whole; once is bad luck.
            match bytes.len() as u64 == wanted {
                true => return Ok(bytes),
                false if again => again = false,
                false => return Err(self.short(path, bytes.len(), wanted)),
            }
        }
    }

    /// A run of bytes of a file on this machine, without a detour.
    fn read_range(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>> {
        self.key(path)?;
        let mut bytes = vec![0; (range.end - range.start) as usize];
        read_file(Path::new(&self.name(path)), range, &mut bytes)?;
        Ok(bytes)
    }

    /// The object's size in bytes, or None when it is not there.
    pub fn size(&self, path: &str) -> Result<Option<u64>> {
        let key = self.key(path)?;
        match RUNTIME.block_on(self.patience.over(|| self.inner.head(&key))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.reading(path, error)),
        }
    }

    /// Writes the whole object, over an older one if there is one. Readers see the old or the new, never a part;
    /// when this returns, the object survives a power cut.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Result<()> {
        self.put_owned(path, bytes.to_vec())
    }

    /// As [`Store::put`], without a copy.
    pub fn put_owned(&self, path: &str, bytes: Vec<u8>) -> Result<()> {
        let key = self.key(path)?;
        let length = bytes.len();
        let payload = Bytes::from(bytes);
        let put = async {
            if !self.on_disk && length as u64 > 4 * PART {
                return self.in_parts(&key, payload).await;
            }
            let put = || self.inner.put_opts(&key, PutPayload::from(payload.clone()), PutOptions::default());
            self.patience.over(put).await.map(drop)
        };
        RUNTIME.block_on(put).map_err(|error| self.writing(path, length, error))
    }

    /// Uploads parts, several at a time; the object appears with the last word, whole.
    async fn in_parts(&self, key: &Key, mut bytes: Bytes) -> object_store::Result<()> {
        let upload = self.patience.over(|| self.bulk.put_multipart(key)).await?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART as usize);
        while !bytes.is_empty() {
            parts.wait_for_capacity(PARTS_AT_A_TIME).await?;
            parts.put(bytes.split_to(bytes.len().min(PART as usize)));
        }
        parts.finish().await.map(drop)
    }

    /// Writes the object only if none is there: true when these bytes are now the object, false when another's are.
    ///
    /// A store may commit and lose its answer, or report a conflict that is none, so whatever is not a plain success
    /// is settled by reading back. The bytes must therefore be unique to the writer (hold a nonce).
    pub fn create(&self, path: &str, bytes: &[u8]) -> Result<bool> {
        let key = self.key(path)?;
        let mut last = None;
        for _ in 0..CREATE_ATTEMPTS {
            let options = PutOptions::from(PutMode::Create);
            let Err(error) = RUNTIME.block_on(self.inner.put_opts(&key, PutPayload::from(bytes.to_vec()), options))
            else {
                return Ok(true);
            };
            let fault = self.writing(path, bytes.len(), error);
            match self.get_if_there(path) {
                Ok(Some(there)) => return Ok(there == bytes),
                // Nothing is there: the conflict was false, or the write failed for good.
                Ok(None) if fault.code == Code::Disk => return Err(fault),
                Ok(None) => last = Some(fault),
                Err(_) => return Err(fault),
            }
        }
        Err(last.expect("an attempt was made"))
    }

    /// All objects below `prefix`, as (path relative to this store, bytes), sorted by path.
    pub fn list(&self, prefix: &str) -> Result<Vec<(String, u64)>> {
        let key = self.key(prefix)?;
        let found: Vec<_> = RUNTIME
            .block_on(self.patience.over(|| self.inner.list(Some(&key)).try_collect()))
            .map_err(|error| self.reading(prefix, error))?;
        let mut rows: Vec<_> = found.iter().map(|meta| (self.relative(&meta.location), meta.size)).collect();
        rows.sort();
        Ok(rows)
    }

    /// The names of the immediate sub-folders of `prefix`, sorted. On a disk a folder may be empty.
    pub fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let key = self.key(prefix)?;
        let found = RUNTIME
            .block_on(self.patience.over(|| self.inner.list_with_delimiter(Some(&key))))
            .map_err(|error| self.reading(prefix, error))?;
        let mut names: Vec<_> = found.common_prefixes.iter().filter_map(|k| k.filename().map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    }

    /// Removes the object. One that is not there is no fault.
    pub fn delete(&self, path: &str) -> Result<()> {
        let key = self.key(path)?;
        match RUNTIME.block_on(self.patience.over(|| self.inner.delete(&key))) {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.writing(path, 0, error)),
        }
    }

    /// Removes the folder and all that is in it; on a disk also what a killed write left behind, which no listing
    /// shows. A folder that is not there is no fault.
    pub fn delete_folder(&self, path: &str) -> Result<()> {
        if let Some(folder) = self.at_checked(path)?.local() {
            return match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Fault::disk(folder.display(), error)),
                _ => Ok(()),
            };
        }
        self.list(path)?.iter().try_for_each(|(object, _)| self.delete(object))
    }

    /// Whether its bytes travel over a network.
    pub fn remote(&self) -> bool {
        !self.on_disk
    }

    /// The folder on this machine's disk, for a local store.
    pub fn local(&self) -> Option<PathBuf> {
        self.on_disk.then(|| Path::new("/").join(self.root.as_ref()))
    }

    /// The URL, which [`Store::open`] takes back. It never holds a query or a secret.
    pub fn url(&self) -> String {
        let mut url = self.origin.clone();
        for byte in self.root.as_ref().bytes() {
            match byte {
                b'a'..=b'z'
                | b'A'..=b'Z'
                | b'0'..=b'9'
                | b'/'
                | b'-'
                | b'.'
                | b'_'
                | b'~'
                | b'+'
                | b'='
                | b','
                | b'@' => url.push(byte as char),
                _ => url.push_str(&format!("%{byte:02X}")),
            }
        }
        url
    }

    /// Bytes that this process may still write to a local store, None for any other.
    pub fn free_bytes(&self) -> Option<u64> {
        let folder = self.local()?;
        let there = folder.ancestors().find(|ancestor| ancestor.exists())?;
        let stat = rustix::fs::statvfs(there).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn at_checked(&self, child: &str) -> Result<Store> {
        Ok(Store { root: self.key(child)?, ..self.clone() })
    }

    /// The full key of a path relative to this store. Refuses `..`, empty segments and control characters.
    fn key(&self, path: &str) -> Result<Key> {
        let relative = Key::parse(path)
            .map_err(|error| Fault::usage(format!("{}: not a path inside a store: {error}", path.escape_debug())))?;
        Ok(self.root.parts().chain(relative.parts()).collect())
    }

    fn relative(&self, location: &Key) -> String {
        let full = location.as_ref();
        full.strip_prefix(self.root.as_ref()).unwrap_or(full).trim_start_matches('/').to_owned()
    }

    /// Whether the store can be asked what it holds.
    pub fn lists(&self) -> bool {
        !self.origin.starts_with("http")
    }

    /// The last part of the URL: the folder's own name, or the bucket's.
    pub fn folder_name(&self) -> String {
        let bucket = || self.origin.trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty());
        self.root.filename().or_else(bucket).unwrap_or("data").to_owned()
    }

    /// How a message names an object.
    pub fn name(&self, path: &str) -> String {
        match self.local() {
            Some(folder) => folder.join(path).display().to_string(),
            None => format!("{}/{path}", self.url().trim_end_matches('/')),
        }
    }

    fn short(&self, path: &str, got: usize, wanted: u64) -> Fault {
        let name = self.name(path);
        Fault::new(
            Code::Store,
            format!("{name}: the store gave {got} of {wanted} bytes. Try again; if it stays, the object is damaged."),
        )
    }

    fn reading(&self, path: &str, error: Error) -> Fault {
        let name = self.name(path);
        match words::kind(&error) {
            Kind::Absent => {
                Fault::usage(format!("{name}: not found. Check the path, and that the data were written there."))
            }
            Kind::Refused => self.refused(&name, &error),
            _ => self.away(&name, "read", &error),
        }
    }

    fn writing(&self, path: &str, bytes: usize, error: Error) -> Fault {
        let name = self.name(path);
        if words::kind(&error) == Kind::Refused {
            return self.refused(&name, &error);
        }
        match disk_error(&error) {
            Some(cause) => Fault::new(
                Code::Disk,
                format!("{name}: cannot write {bytes} bytes: {cause}. Free space there, or choose another place."),
            ),
            None => self.away(&name, &format!("written ({bytes} bytes)"), &error),
        }
    }

    fn refused(&self, name: &str, error: &Error) -> Fault {
        let why = words::shortly(error);
        // A clock that is off looks like a wrong key to a store that checks signatures.
        let hint =
            if why.contains("TimeTooSkewed") { "set this machine's clock" } else { "check them, and their rights" };
        Fault::new(Code::Credentials, format!("{name}: the store refused the credentials: {why}; {hint}"))
    }

    fn away(&self, name: &str, what: &str, error: &Error) -> Fault {
        let waited = match words::kind(error) == Kind::Passing && !self.patience.limit().is_zero() {
            true => format!(" after {} s of trying", self.patience.limit().as_secs()),
            false => String::new(),
        };
        Fault::new(Code::Store, format!("{name}: cannot be {what}{waited}: {}", words::shortly(error)))
    }
}

/// Bytes `range` of a file on this machine, as many as `into` has. Code::Corrupt where the file ends before.
pub(super) fn read_file(path: &Path, range: Range<u64>, into: &mut [u8]) -> Result<()> {
    let file = std::fs::File::open(path).map_err(|error| Fault::disk(path.display(), error))?;
    file.read_exact_at(into, range.start).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            Fault::new(Code::Corrupt, format!("{}: it ends before byte {}", path.display(), range.end))
        }
        _ => Fault::disk(path.display(), error),
    })
}

/// The local I/O error behind `error`, if it is one that a person mends on the disk.
fn disk_error(error: &Error) -> Option<&std::io::Error> {
    use std::io::ErrorKind::*;
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(here) = cause {
        if let Some(io) = here.downcast_ref::<std::io::Error>() {
            let local =
                matches!(io.kind(), StorageFull | QuotaExceeded | PermissionDenied | ReadOnlyFilesystem | FileTooLarge);
            return (local || io.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())).then_some(io);
        }
        cause = here.source();
    }
    None
}
