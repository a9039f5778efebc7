//! Tests of the store contract: writing, reading, listing, paths, errors.

use crate::support::Outcome;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::*;
use occlude::data::store::Store;
use occlude::error::ExitCode;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

crate::trials![
    get_returns_what_was_put,
    put_replaces_an_existing_object,
    one_of_many_concurrent_creates_wins,
    a_lost_response_to_create_is_resolved_by_reading_back,
    a_false_conflict_is_retried,
    listings_are_sorted_relative_and_recursive,
    a_missing_object_is_distinguished_from_a_failing_store,
    a_range_read_is_complete_or_an_error,
    a_path_cannot_escape_its_store,
    urls_and_paths_open_the_same_folder,
    an_unknown_scheme_is_rejected_without_showing_secrets,
    removing_a_folder_removes_unlisted_files,
    free_space_is_known_before_the_folder_exists,
];

pub fn local_store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path().to_str().expect("UTF-8")).expect("a store");
    (folder, store)
}

fn get_returns_what_was_put() -> Outcome {
    let (_folder, store) = local_store();
    let bytes: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
    store.put("a/b.bin", &bytes)?;
    assert_eq!(store.get("a/b.bin")?, bytes);
    assert_eq!(store.subfolder("a").get("b.bin")?, bytes);
    assert_eq!(store.size("a/b.bin")?, Some(100_000));
    store.put("empty", b"")?;
    assert_eq!(store.get("empty")?, b"");
    Ok(())
}

fn put_replaces_an_existing_object() -> Outcome {
    let (folder, store) = local_store();
    store.put("x", b"a longer first version")?;
    store.put("x", b"second")?;
    assert_eq!(store.get("x")?, b"second");
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1, "a staged file was left");
    Ok(())
}

fn one_of_many_concurrent_creates_wins() -> Outcome {
    let (_folder, store) = local_store();
    for round in 0..20 {
        let path = format!("r/{round}");
        let won: usize = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..4u8)
                .map(|me| {
                    scope.spawn({
                        let store = &store;
                        let path = &path;
                        move || store.create(path, &[me]).expect("a result")
                    })
                })
                .collect();
            racers.into_iter().map(|racer| usize::from(racer.join().expect("a racer"))).sum()
        });
        assert_eq!(won, 1, "round {round}");
    }
    Ok(())
}

fn a_lost_response_to_create_is_resolved_by_reading_back() -> Outcome {
    let store = Store::from_backend(Arc::new(FaultyStore::new(StoreFault::CommitThenFail)), "memory://");
    assert!(store.create("mine", b"nonce 1")?, "the client's own object was mistaken for a conflict");
    assert!(!store.create("mine", b"nonce 2")?, "the object of another client was overwritten");
    assert_eq!(store.get("mine")?, b"nonce 1");
    let store = Store::from_backend(Arc::new(FaultyStore::new(StoreFault::CommitThenConflict)), "memory://");
    assert!(store.create("mine", b"nonce 1")?, "the client's own object was mistaken for a conflict");
    Ok(())
}

fn a_false_conflict_is_retried() -> Outcome {
    let store = Store::from_backend(Arc::new(FaultyStore::new(StoreFault::ConflictOnce)), "memory://");
    assert!(store.create("free", b"nonce")?);
    assert_eq!(store.get("free")?, b"nonce");
    Ok(())
}

fn listings_are_sorted_relative_and_recursive() -> Outcome {
    let (_folder, store) = local_store();
    for path in ["run/b/2", "run/b/1", "run/a/deep/x", "run/top", "other"] {
        store.put(path, path.as_bytes())?;
    }
    let names = |rows: Vec<(String, u64)>| rows.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(store.list("run")?), ["run/a/deep/x", "run/b/1", "run/b/2", "run/top"]);
    assert_eq!(names(store.subfolder("run").list("")?), ["a/deep/x", "b/1", "b/2", "top"]);
    assert_eq!(store.subfolder("run").list("b")?, [("b/1".to_owned(), 7), ("b/2".to_owned(), 7)]);
    assert_eq!(store.list_folders("run")?, ["a", "b"]);
    assert_eq!(store.list("nothing")?, []);
    assert!(store.list_folders("nothing")?.is_empty());
    Ok(())
}

fn a_missing_object_is_distinguished_from_a_failing_store() -> Outcome {
    let (_folder, store) = local_store();
    assert_eq!(store.get_optional("no")?, None);
    assert_eq!(store.size("no")?, None);
    store.delete("no")?;
    let error = store.get("no").expect_err("it does not exist");
    assert_eq!(error.code, ExitCode::Usage);
    assert!(error.message.contains("no: not found"), "{error}");
    // A file where a folder should be is an error, neither presence nor absence.
    store.put("file", b"x")?;
    assert_eq!(store.get_optional("file/below").expect_err("not a folder").code, ExitCode::Store);
    let broken = Store::from_backend(Arc::new(FaultyStore::new(StoreFault::ReadsFail)), "memory://");
    assert_eq!(broken.get_optional("x").expect_err("reads fail").code, ExitCode::Store);
    assert_eq!(broken.size("x").expect_err("reads fail").code, ExitCode::Store);
    Ok(())
}

fn a_range_read_is_complete_or_an_error() -> Outcome {
    let (_folder, store) = local_store();
    store.put("x", b"0123456789")?;
    assert_eq!(store.get_range("x", 3..7)?, b"3456");
    assert_eq!(store.get_range("x", 5..5)?, b"");
    for beyond in [8..12, 10..11, 50..60] {
        assert_eq!(store.get_range("x", beyond).expect_err("short").code, ExitCode::Corrupt);
    }
    Ok(())
}

fn a_path_cannot_escape_its_store() -> Outcome {
    let (folder, store) = local_store();
    let inside = store.subfolder("inside");
    for path in ["../x", "a/../../x", "a//b", "a\0b"] {
        assert_eq!(inside.put(path, b"x").expect_err(path).code, ExitCode::Usage, "{path:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 0);
    // An absolute path is relative to the store.
    inside.put("/etc/x", b"x")?;
    assert!(folder.path().join("inside/etc/x").exists());
    Ok(())
}

fn urls_and_paths_open_the_same_folder() -> Outcome {
    let (folder, store) = local_store();
    let odd = store.subfolder("a b%20ü#1");
    odd.put("x", b"here")?;
    assert!(folder.path().join("a b%20ü#1/x").exists());
    assert_eq!(Store::open(&odd.url())?.get("x")?, b"here");
    assert_eq!(odd.local_path(), Some(folder.path().canonicalize()?.join("a b%20ü#1")));
    assert_eq!(Store::open(&format!("{}?token=secret", odd.url()))?.url(), odd.url());
    assert_eq!(Store::open("some/new folder")?.local_path(), Some(std::env::current_dir()?.join("some/new folder")));
    assert_eq!(Store::open("file://relative/x").expect_err("two slashes").code, ExitCode::Usage);
    assert_eq!(Store::open("/surely/not/../there").expect_err("it escapes the store").code, ExitCode::Usage);
    Ok(())
}

fn an_unknown_scheme_is_rejected_without_showing_secrets() -> Outcome {
    let error = Store::open("gopher://user:hunter2@host/data?sig=hunter2").expect_err("unknown scheme");
    assert_eq!(error.code, ExitCode::Usage);
    assert!(error.message.contains("file://") && error.message.contains("gopher://host/data"), "{error}");
    assert!(!error.message.contains("hunter2"), "{error}");
    Ok(())
}

fn removing_a_folder_removes_unlisted_files() -> Outcome {
    let (folder, store) = local_store();
    store.put("gone/x", b"x")?;
    std::fs::write(folder.path().join("gone/part.safetensors#1"), b"half")?;
    assert_eq!(store.list("gone")?.len(), 1, "a half-written object was listed");
    store.delete_folder("gone")?;
    store.delete_folder("gone")?;
    assert!(!folder.path().join("gone").exists());
    let memory = Store::from_backend(Arc::new(InMemory::new()), "memory://");
    memory.put("gone/x", b"x")?;
    memory.put("kept", b"x")?;
    memory.delete_folder("gone")?;
    assert_eq!(memory.list("")?, [("kept".to_owned(), 1)]);
    Ok(())
}

fn free_space_is_known_before_the_folder_exists() -> Outcome {
    let (_folder, store) = local_store();
    assert!(store.subfolder("not/yet").free_bytes().is_some_and(|bytes| bytes > 0));
    assert_eq!(Store::from_backend(Arc::new(InMemory::new()), "memory://").free_bytes(), None);
    Ok(())
}

/// A store in memory that gives false responses.
#[derive(Debug)]
pub struct FaultyStore {
    inner: InMemory,
    lie: StoreFault,
    puts: AtomicUsize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StoreFault {
    /// The object is written and the response lost.
    CommitThenFail,
    /// The object is written, the client retries and finds its own object.
    CommitThenConflict,
    /// A conflict is reported although there is no object.
    ConflictOnce,
    ReadsFail,
    /// Only checkpoint parts cannot be read.
    PartsFail,
    /// Checkpoint parts cannot be removed.
    PartsStay,
}

impl FaultyStore {
    pub fn new(lie: StoreFault) -> Self {
        FaultyStore { inner: InMemory::new(), lie, puts: AtomicUsize::new(0) }
    }
}

impl std::fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Liar")
    }
}

fn failure() -> Error {
    Error::Generic { store: "Liar", source: "connection reset".into() }
}

fn conflict(path: &Key) -> Error {
    Error::AlreadyExists { path: path.to_string(), source: "conflict".into() }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

impl ObjectStore for FaultyStore {
    fn put_opts<'a: 'c, 'b: 'c, 'c>(
        &'a self,
        to: &'b Key,
        payload: PutPayload,
        options: PutOptions,
    ) -> Answer<'c, PutResult> {
        Box::pin(async move {
            let first = self.puts.fetch_add(1, Ordering::Relaxed) == 0;
            if first && self.lie == StoreFault::ConflictOnce {
                return Err(conflict(to));
            }
            let written = self.inner.put_opts(to, payload, options).await?;
            match self.lie {
                StoreFault::CommitThenFail if first => Err(failure()),
                StoreFault::CommitThenConflict if first => Err(conflict(to)),
                _ => Ok(written),
            }
        })
    }
    fn put_multipart_opts<'a: 'c, 'b: 'c, 'c>(
        &'a self,
        to: &'b Key,
        options: PutMultipartOptions,
    ) -> Answer<'c, Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options)
    }
    fn get_opts<'a: 'c, 'b: 'c, 'c>(&'a self, from: &'b Key, options: GetOptions) -> Answer<'c, GetResult> {
        match self.lie {
            StoreFault::ReadsFail => Box::pin(async { Err(failure()) }),
            StoreFault::PartsFail if from.as_ref().ends_with(".safetensors") && !options.head => {
                Box::pin(async { Err(failure()) })
            }
            _ => self.inner.get_opts(from, options),
        }
    }
    fn delete_stream(&self, paths: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        let stays = self.lie == StoreFault::PartsStay;
        let tried = paths.map(move |path| match path {
            Ok(path) if stays && path.as_ref().ends_with(".safetensors") => Err(failure()),
            path => path,
        });
        self.inner.delete_stream(tried.boxed())
    }
    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    fn list_with_delimiter<'a: 'c, 'b: 'c, 'c>(&'a self, prefix: Option<&'b Key>) -> Answer<'c, ListResult> {
        match self.lie {
            StoreFault::ReadsFail => Box::pin(async { Err(failure()) }),
            _ => self.inner.list_with_delimiter(prefix),
        }
    }
    fn copy_opts<'a: 'd, 'b: 'd, 'c: 'd, 'd>(
        &'a self,
        from: &'b Key,
        to: &'c Key,
        options: CopyOptions,
    ) -> Answer<'d, ()> {
        self.inner.copy_opts(from, to, options)
    }
}
