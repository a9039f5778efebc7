//! An object store behind a URL: whole objects in, whole objects out, and every promise that the rest of the program
//! leans on (atomic durable puts, an honest `create`, reads that are never short) kept in this one place.
//!
//! Calls block. They run on a small runtime of the process, so they must not be made from inside an async task.

use crate::fault::{Code, Fault, Result};
use futures::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{Error, GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, LazyLock};

/// The URL schemes that this build reads, for messages.
const SCHEMES: &str = "file:// (or a plain path)";

/// How often `create` asks again after an answer that settles nothing.
const CREATE_ATTEMPTS: usize = 4;

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("store")
        .enable_all()
        .build()
        .expect("two threads for the store")
});

/// A folder in an object store. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    root: Key,
    /// Scheme and authority, in front of every URL shown.
    origin: String,
    on_disk: bool,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.url())
    }
}

impl Store {
    /// Opens a plain path (absolute or relative) or a URL. Nothing is read or made yet: a folder that is not there
    /// reads as empty and appears with its first object.
    pub fn open(url_or_path: &str) -> Result<Store> {
        let (scheme, rest) = split_scheme(url_or_path);
        match scheme {
            None => Self::on_disk(Path::new(rest)),
            Some("file") => Self::on_disk(&path_of_file_url(rest)?),
            Some(other) => Err(Fault::usage(format!(
                "{}: this build reads {SCHEMES}, not {other}://. Copy the data to a local folder, or use a build \
                 with that scheme.",
                without_query(url_or_path)
            ))),
        }
    }

    /// A store over a given backend; `origin` (such as `memory://`) names it in messages.
    pub fn over(inner: Arc<dyn ObjectStore>, origin: &str) -> Store {
        Store { inner, root: Key::default(), origin: origin.to_owned(), on_disk: false }
    }

    fn on_disk(path: &Path) -> Result<Store> {
        let path = absolute(path)?;
        let text = path.to_str().ok_or_else(|| {
            Fault::usage(format!("{}: a store's path must be valid UTF-8; rename it", path.display()))
        })?;
        let root = Key::parse(text).map_err(|e| Fault::usage(format!("{text}: not usable as a store's path: {e}")))?;
        let inner = Arc::new(object_store::local::LocalFileSystem::new().with_fsync(true));
        Ok(Store { inner, root, origin: "file:///".to_owned(), on_disk: true })
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
        let answer = RUNTIME.block_on(async {
            let answer = self.inner.get_opts(&key, GetOptions::default()).await?;
            let size = answer.meta.size;
            Ok((size, answer.bytes().await?))
        });
        match answer {
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.reading(path, error)),
            Ok((size, bytes)) if bytes.len() as u64 == size => Ok(Some(bytes.into())),
            Ok((size, bytes)) => Err(self.short(path, bytes.len(), size)),
        }
    }

    /// Bytes `range` of the object, all of them: a range beyond the object's end is a fault.
    pub fn get_range(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let key = self.key(path)?;
        let bytes = RUNTIME
            .block_on(self.inner.get_range(&key, range.clone()))
            .map_err(|error| self.reading(&format!("{path} bytes {}..{}", range.start, range.end), error))?;
        match bytes.len() as u64 == range.end - range.start {
            true => Ok(bytes.into()),
            false => Err(self.short(path, bytes.len(), range.end - range.start)),
        }
    }

    /// The object's size in bytes, or None when it is not there.
    pub fn size(&self, path: &str) -> Result<Option<u64>> {
        let key = self.key(path)?;
        match RUNTIME.block_on(self.inner.head(&key)) {
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
        let put = self.inner.put_opts(&key, PutPayload::from(bytes), PutOptions::default());
        RUNTIME.block_on(put).map(drop).map_err(|error| self.writing(path, length, error))
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
        let found: Vec<_> =
            RUNTIME.block_on(self.inner.list(Some(&key)).try_collect()).map_err(|error| self.reading(prefix, error))?;
        let mut rows: Vec<_> = found.iter().map(|meta| (self.relative(&meta.location), meta.size)).collect();
        rows.sort();
        Ok(rows)
    }

    /// The names of the immediate sub-folders of `prefix`, sorted. On a disk a folder may be empty.
    pub fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let key = self.key(prefix)?;
        let found = RUNTIME
            .block_on(self.inner.list_with_delimiter(Some(&key)))
            .map_err(|error| self.reading(prefix, error))?;
        let mut names: Vec<_> = found.common_prefixes.iter().filter_map(|k| k.filename().map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    }

    /// Removes the object. One that is not there is no fault.
    pub fn delete(&self, path: &str) -> Result<()> {
        let key = self.key(path)?;
        match RUNTIME.block_on(self.inner.delete(&key)) {
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

    /// How a message names an object.
    fn name(&self, path: &str) -> String {
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
        match error {
            Error::NotFound { .. } => {
                Fault::usage(format!("{name}: not found. Check the path, and that the data were written there."))
            }
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                Fault::new(Code::Credentials, format!("{name}: the store refused the credentials: {error}"))
            }
            _ => Fault::new(Code::Store, format!("{name}: cannot be read: {error}")),
        }
    }

    fn writing(&self, path: &str, bytes: usize, error: Error) -> Fault {
        let name = self.name(path);
        if matches!(error, Error::PermissionDenied { .. } | Error::Unauthenticated { .. }) {
            return Fault::new(Code::Credentials, format!("{name}: the store refused the credentials: {error}"));
        }
        match disk_error(&error) {
            Some(cause) => Fault::new(
                Code::Disk,
                format!("{name}: cannot write {bytes} bytes: {cause}. Free space there, or choose another place."),
            ),
            None => Fault::new(Code::Store, format!("{name}: cannot write {bytes} bytes: {error}")),
        }
    }
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

/// `scheme://rest`, or no scheme and the text itself.
fn split_scheme(text: &str) -> (Option<&str>, &str) {
    match text.split_once("://") {
        Some((scheme, rest))
            if scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c)) =>
        {
            (Some(scheme), rest)
        }
        _ => (None, text),
    }
}

/// A URL fit for a message: without its query and without a user's name and password.
fn without_query(url: &str) -> String {
    let bare = url.split(['?', '#']).next().unwrap_or_default();
    match split_scheme(bare) {
        (Some(scheme), rest) => {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", host.rsplit('@').next().unwrap_or_default())
        }
        (None, rest) => rest.to_owned(),
    }
}

/// The path of a `file://` URL, given what follows the two slashes.
fn path_of_file_url(rest: &str) -> Result<PathBuf> {
    let bare = rest.split(['?', '#']).next().unwrap_or_default();
    let path = bare.strip_prefix("localhost").unwrap_or(bare);
    if !path.starts_with('/') {
        return Err(Fault::usage(format!(
            "file://{bare}: a file URL has three slashes and an absolute path, as in file:///data/run; for a relative \
             path leave file:// out"
        )));
    }
    let key = Key::from_url_path(path).map_err(|e| Fault::usage(format!("file://{bare}: not a usable path: {e}")))?;
    Ok(Path::new("/").join(key.as_ref()))
}

/// The absolute path with symbolic links followed as far as it exists; what does not exist yet must not climb.
fn absolute(path: &Path) -> Result<PathBuf> {
    let bad = |why: String| Fault::usage(format!("{}: not usable as a store's path: {why}", path.display()));
    let full = std::path::absolute(path).map_err(|error| bad(error.to_string()))?;
    for there in full.ancestors() {
        let Ok(real) = there.canonicalize() else { continue };
        let rest = full.strip_prefix(there).expect("an ancestor");
        return match rest.components().all(|part| matches!(part, Component::Normal(_))) {
            true if rest.as_os_str().is_empty() => Ok(real),
            true => Ok(real.join(rest)),
            false => Err(bad("it climbs out of a folder that does not exist".into())),
        };
    }
    Err(bad("no part of it exists".into()))
}
