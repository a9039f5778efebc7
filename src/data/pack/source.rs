//! The samples to pack: the files of a folder, or of a list beside them; on a disk or in a store.

use super::super::modality::Modality;
use super::super::store::Store;
use super::list::{LIST_EXTENSIONS, ListRow, read_list};
use super::sample_keys::sample_keys;
use crate::error::{Error, ExitCode, Result};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// Concurrent requests for sizes to a web server.
const SIZE_REQUESTS: usize = 32;
/// Minimum concurrent requests for samples to a store, whose latency is high.
const MIN_STORE_REQUESTS: usize = 16;

/// The samples to pack.
pub struct PackSource {
    location: SourceLocation,
    /// In the order of the list, or of the paths.
    pub samples: Vec<SourceSample>,
    /// Names of the classes in the order of their labels; empty where there are none or they are integers.
    pub classes: Vec<String>,
}

enum SourceLocation {
    Disk(PathBuf),
    Store(Store),
}

/// One sample to pack.
#[derive(Debug)]
pub struct SourceSample {
    /// Relative to the source's folder.
    path: PathBuf,
    pub key: String,
    /// An extension of the modality; none where the path has another.
    pub extension: Option<&'static str>,
    pub label: Option<u64>,
    pub caption: Option<String>,
    /// A JSON object.
    pub metadata: Option<String>,
    /// Bytes of the file; none where it does not exist.
    pub bytes: Option<u64>,
    /// Time of the file's last change, in nanoseconds since 1970; 0 in a store.
    pub modified_ns: u128,
}

/// A file of the source.
struct SourceFile {
    path: PathBuf,
    bytes: Option<u64>,
    modified_ns: u128,
}

impl PackSource {
    /// Finds the samples of a folder or a list (CSV, TSV, JSON lines, Parquet), given as a path or a URL. Sub-folders
    /// of a folder are classes, numbered in the order of their names; a folder without sub-folders has no classes.
    ///
    /// # Errors
    /// ExitCode::Usage where there is no sample of the modality.
    pub fn open(source: &str, modality: Modality) -> Result<PackSource> {
        let extension = source.rsplit_once('.').map(|(_, last)| last.to_ascii_lowercase()).unwrap_or_default();
        let path = local_path(source)?;
        let is_folder = path.as_ref().is_some_and(|path| path.is_dir());
        if LIST_EXTENSIONS.contains(&extension.as_str()) && !is_folder {
            return Self::from_list(source, path, &extension, modality).map_err(|error| error.with_context(source));
        }
        Self::from_folder(source, path, modality)
    }

    /// Returns the number of concurrent requests for samples, on a machine of `cores` cores.
    pub fn concurrency(&self, cores: usize) -> usize {
        match self.location {
            SourceLocation::Disk(_) => cores,
            SourceLocation::Store(_) => cores.max(MIN_STORE_REQUESTS),
        }
    }

    /// Reads the file of a sample.
    ///
    /// # Errors
    /// ExitCode::Usage or ExitCode::Corrupt for a defect of the file, any other code for a failure of the source.
    pub fn read(&self, sample: &SourceSample) -> Result<Vec<u8>> {
        match &self.location {
            SourceLocation::Store(store) => store.get(&sample.path.to_string_lossy()),
            SourceLocation::Disk(folder) => fs::read(folder.join(&sample.path)).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Error::usage("there is no such file"),
                _ => Error::new(ExitCode::Disk, error.to_string()),
            }),
        }
    }

    /// Returns a sample's path or URL, for messages.
    pub fn name(&self, sample: &SourceSample) -> String {
        match &self.location {
            SourceLocation::Disk(folder) => folder.join(&sample.path).display().to_string(),
            SourceLocation::Store(store) => store.display_name(&sample.path.to_string_lossy()),
        }
    }

    fn from_folder(source: &str, path: Option<PathBuf>, modality: Modality) -> Result<PackSource> {
        let (location, files) = match path {
            Some(folder) => {
                if !folder.is_dir() {
                    return Err(Error::usage(format!(
                        "{source} is not a folder; give a folder of {}, optionally with a sub-folder per class, or a \
                         list (.{})",
                        modality.plural(),
                        LIST_EXTENSIONS.join(", .")
                    )));
                }
                let mut files = Vec::new();
                walk(&folder, Path::new(""), modality, &mut files)?;
                (SourceLocation::Disk(folder), files)
            }
            None => {
                let store = Store::open(source)?;
                if !store.can_list() {
                    return Err(Error::usage(format!(
                        "{source}: a web server cannot list its files; give a list of them (.{})",
                        LIST_EXTENSIONS.join(", .")
                    )));
                }
                let files = list_store(&store, modality)?;
                (SourceLocation::Store(store), files)
            }
        };
        let (samples, classes) = samples_by_folder(source, files, modality)?;
        Ok(PackSource { location, samples, classes })
    }

    fn from_list(source: &str, path: Option<PathBuf>, extension: &str, modality: Modality) -> Result<PackSource> {
        let (location, rows, files) = match path {
            Some(path) => {
                let bytes = fs::read(&path).map_err(|error| Error::usage(error.to_string()))?;
                let folder = path.parent().unwrap_or(Path::new("")).to_owned();
                let rows = read_list(extension, bytes)?;
                let files =
                    rows.iter().map(|row| stat_file(&folder, row.path.clone().into())).collect::<Result<_>>()?;
                (SourceLocation::Disk(folder), rows, files)
            }
            None => {
                let (folder, file) = source.rsplit_once('/').expect("a URL has slashes");
                let store = Store::open(folder)?;
                let rows = read_list(extension, store.get(file)?)?;
                let files = stat_store_files(&store, &rows)?;
                (SourceLocation::Store(store), rows, files)
            }
        };
        let (samples, classes) = samples_by_row(rows, files, modality)?;
        Ok(PackSource { location, samples, classes })
    }
}

/// Returns the path of a source on this machine; none for a store.
fn local_path(source: &str) -> Result<Option<PathBuf>> {
    match source.split_once("://") {
        None => Ok(Some(PathBuf::from(source))),
        Some(("file", _)) => Ok(Store::open(source)?.local_path()),
        Some(_) => Ok(None),
    }
}

/// Appends the files of the modality below a folder, without hidden files and folders.
fn walk(root: &Path, relative: &Path, modality: Modality, files: &mut Vec<SourceFile>) -> Result<()> {
    let folder = root.join(relative);
    let disk = |error| Error::disk(folder.display(), error);
    for entry in fs::read_dir(&folder).map_err(disk)? {
        let name = entry.map_err(disk)?.file_name();
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let path = relative.join(name);
        if root.join(&path).is_dir() {
            walk(root, &path, modality, files)?;
        } else if known_extension(&path, modality).is_some() {
            files.push(stat_file(root, path)?);
        }
    }
    Ok(())
}

fn stat_file(folder: &Path, path: PathBuf) -> Result<SourceFile> {
    let full_path = folder.join(&path);
    match fs::metadata(&full_path) {
        Ok(metadata) => {
            let modified = metadata.modified().map_err(|error| Error::disk(full_path.display(), error))?;
            let modified_ns = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
            Ok(SourceFile { path, bytes: Some(metadata.len()), modified_ns })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(SourceFile { path, bytes: None, modified_ns: 0 })
        }
        Err(error) => Err(Error::disk(full_path.display(), error)),
    }
}

/// Lists the files of the modality in a store, without hidden files and folders.
fn list_store(store: &Store, modality: Modality) -> Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    for (path, bytes) in store.list("")? {
        let is_hidden = path.split('/').any(|part| part.starts_with('.'));
        let path = PathBuf::from(path);
        if !is_hidden && known_extension(&path, modality).is_some() {
            files.push(SourceFile { path, bytes: Some(bytes), modified_ns: 0 });
        }
    }
    Ok(files)
}

/// Returns the sizes of a list's files: from one listing or, where the store has none, by concurrent requests.
fn stat_store_files(store: &Store, rows: &[ListRow]) -> Result<Vec<SourceFile>> {
    let file = |row: &ListRow, bytes| SourceFile { path: row.path.clone().into(), bytes, modified_ns: 0 };
    if store.can_list() {
        let sizes: HashMap<String, u64> = store.list("")?.into_iter().collect();
        return Ok(rows.iter().map(|row| file(row, sizes.get(&row.path).copied())).collect());
    }
    std::thread::scope(|scope| {
        let request = |rows: &'_ [ListRow]| rows.iter().map(|row| Ok(file(row, store.size(&row.path)?))).collect();
        let chunks = rows.chunks(rows.len().div_ceil(SIZE_REQUESTS).max(1));
        let threads: Vec<_> = chunks.map(|chunk| scope.spawn(move || request(chunk))).collect();
        let results = threads.into_iter().map(|thread| thread.join().expect("no panic in a request"));
        let files: Result<Vec<Vec<SourceFile>>> = results.collect();
        Ok(files?.into_iter().flatten().collect())
    })
}

fn known_extension(path: &Path, modality: Modality) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    modality.extensions().iter().copied().find(|known| *known == extension)
}

/// Makes samples from the files of a folder, and the names of their classes.
fn samples_by_folder(
    source: &str,
    mut files: Vec<SourceFile>,
    modality: Modality,
) -> Result<(Vec<SourceSample>, Vec<String>)> {
    files.sort_by(|a, b| a.path.cmp(&b.path));
    if files.is_empty() {
        return Err(no_files_error(source, modality));
    }
    let classes: BTreeSet<String> = files.iter().filter_map(class_folder).collect();
    let classes: Vec<String> = classes.into_iter().collect();
    let unclassed = files.iter().filter(|file| class_folder(file).is_none()).count();
    if unclassed > 0 && !classes.is_empty() {
        return Err(Error::usage(format!(
            "{source} holds {unclassed} {} beside its class folders ({}, …): move them into a folder, or pack that \
             folder alone",
            modality.plural(),
            classes[0]
        )));
    }
    let keys = sample_keys(&files.iter().map(|file| slash_path(&file.path)).collect::<Vec<_>>());
    let sample = |(file, key): (SourceFile, String)| {
        let label = class_folder(&file).and_then(|class| classes.binary_search(&class).ok());
        SourceSample::new(file, key, label.map(|label| label as u64), ListRow::default(), modality)
    };
    let samples = files.into_iter().zip(keys).map(sample).collect();
    Ok((samples, classes))
}

fn no_files_error(source: &str, modality: Modality) -> Error {
    let extensions = modality.extensions().join(", .");
    match modality {
        Modality::Image => {
            Error::usage(format!("{source} holds no image (.{extensions}); audio is packed with --audio"))
        }
        Modality::Audio => {
            Error::usage(format!("{source} holds no audio (.{extensions}); images are packed without --audio"))
        }
    }
}

/// Returns the top folder of a file's path; none for a file outside of folders.
fn class_folder(file: &SourceFile) -> Option<String> {
    let mut parts = file.path.iter();
    let first = parts.next()?;
    parts.next().map(|_| first.to_string_lossy().into_owned())
}

/// Makes samples from the rows of a list, and the names of their classes.
fn samples_by_row(
    rows: Vec<ListRow>,
    files: Vec<SourceFile>,
    modality: Modality,
) -> Result<(Vec<SourceSample>, Vec<String>)> {
    if rows.is_empty() {
        return Err(Error::usage("the list has no rows"));
    }
    let mut seen = HashMap::new();
    for (index, row) in rows.iter().enumerate() {
        if let Some(first) = seen.insert(&row.path, index) {
            let message = format!("rows {} and {} both name {}; leave one out", first + 1, index + 1, row.path);
            return Err(Error::usage(message));
        }
    }
    let (labels, classes) = parse_labels(&rows)?;
    let keys = sample_keys(&rows.iter().map(|row| row.path.clone()).collect::<Vec<_>>());
    let samples = rows.into_iter().zip(files).zip(keys).zip(labels);
    let samples = samples.map(|(((row, file), key), label)| SourceSample::new(file, key, label, row, modality));
    Ok((samples.collect(), classes))
}

/// Returns labels as integers, and the names of the classes: integers stay, names are numbered in their order.
fn parse_labels(rows: &[ListRow]) -> Result<(Vec<Option<u64>>, Vec<String>)> {
    let texts: Vec<&str> = rows.iter().filter_map(|row| row.label.as_deref()).collect();
    if !texts.is_empty() && texts.len() < rows.len() {
        let row = rows.iter().position(|row| row.label.is_none()).expect("one is missing") + 1;
        return Err(Error::usage(format!("row {row} has no label and others have; label all samples or none")));
    }
    let integers: Option<Vec<i64>> = texts.iter().map(|text| text.trim().parse().ok()).collect();
    if let Some(integers) = integers {
        if let Some(index) = integers.iter().position(|&label| label < 0) {
            let label = integers[index];
            return Err(Error::usage(format!("row {} has the label {label}; labels begin at 0", index + 1)));
        }
        let mut labels = integers.into_iter().map(|label| label as u64);
        return Ok((rows.iter().map(|_| labels.next()).collect(), Vec::new()));
    }
    let names: BTreeSet<&str> = texts.iter().copied().collect();
    let classes: Vec<String> = names.into_iter().map(str::to_owned).collect();
    let label = |text: &&str| classes.binary_search_by(|class| class.as_str().cmp(text)).ok().map(|index| index as u64);
    let labels = texts.iter().map(label).collect();
    Ok((labels, classes))
}

/// Returns a path with slashes on every platform.
fn slash_path(path: &Path) -> String {
    path.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/")
}

impl SourceSample {
    fn new(file: SourceFile, key: String, label: Option<u64>, row: ListRow, modality: Modality) -> SourceSample {
        let SourceFile { path, bytes, modified_ns } = file;
        let ListRow { caption, metadata, .. } = row;
        let extension = known_extension(&path, modality);
        SourceSample { path, key, extension, label, caption, metadata, bytes, modified_ns }
    }
}
