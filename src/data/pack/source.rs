//! Where pictures or sounds come from: a folder, or a list beside which they lie; on a disk or in a store.

use super::super::medium::Medium;
use super::super::store::Store;
use super::keys::keys;
use super::rows::{LISTS, Row, rows};
use crate::fault::{Code, Fault, Result};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// Sizes that are asked of a web server at a time.
const AT_A_TIME: usize = 32;

/// Pictures to pack, or sounds.
pub struct Source {
    place: Place,
    /// In the order of the list, or of the paths.
    pub pictures: Vec<Picture>,
    /// Names of the classes in the order of their labels; empty where there are none or they are plain numbers.
    pub classes: Vec<String>,
}

enum Place {
    Disk(PathBuf),
    Store(Store),
}

/// One picture or sound to pack.
#[derive(Debug)]
pub struct Picture {
    /// Seen from the source's folder.
    path: PathBuf,
    pub key: String,
    /// One of the medium's, or none where the path does not say.
    pub extension: Option<&'static str>,
    pub label: Option<u64>,
    pub caption: Option<String>,
    /// A JSON object.
    pub more: Option<String>,
    /// Of the file; none where there is no such file.
    pub bytes: Option<u64>,
    /// Nanoseconds since 1970 at which the file was changed; 0 in a store.
    pub changed: u128,
}

/// A file as it was found.
struct Seen {
    path: PathBuf,
    bytes: Option<u64>,
    changed: u128,
}

impl Source {
    /// Finds the pictures. `source` is a folder or a list (CSV, TSV, JSON lines, Parquet), as a path or a URL.
    /// Sub-folders of a folder are classes, numbered in the order of their names; a folder without sub-folders has no
    /// classes. Faults with Code::Usage where nothing of the medium is there.
    pub fn find(source: &str, medium: Medium) -> Result<Source> {
        let extension = source.rsplit_once('.').map(|(_, last)| last.to_ascii_lowercase()).unwrap_or_default();
        let plain = plain(source)?;
        let folder = plain.as_ref().is_some_and(|path| path.is_dir());
        match LISTS.contains(&extension.as_str()) && !folder {
            true => Self::list(source, plain, &extension, medium).map_err(|fault| fault.at(source)),
            false => Self::folder(source, plain, medium),
        }
    }

    /// How many requests for pictures should be under way at a time, on a machine of so many cores.
    pub fn lanes(&self, cores: usize) -> usize {
        match self.place {
            Place::Disk(_) => cores,
            // A store answers late, and many questions at once.
            Place::Store(_) => cores.max(16),
        }
    }

    /// A picture's bytes. Code::Usage or Code::Corrupt is the picture's own fault, anything else the place's.
    pub fn read(&self, picture: &Picture) -> Result<Vec<u8>> {
        match &self.place {
            Place::Store(store) => store.get(&picture.path.to_string_lossy()),
            Place::Disk(folder) => fs::read(folder.join(&picture.path)).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Fault::usage("there is no such file"),
                _ => Fault::new(Code::Disk, error.to_string()),
            }),
        }
    }

    /// How messages name a picture.
    pub fn name(&self, picture: &Picture) -> String {
        match &self.place {
            Place::Disk(folder) => folder.join(&picture.path).display().to_string(),
            Place::Store(store) => store.name(&picture.path.to_string_lossy()),
        }
    }

    fn folder(source: &str, plain: Option<PathBuf>, medium: Medium) -> Result<Source> {
        let (place, seen) = match plain {
            Some(folder) => {
                let mut seen = Vec::new();
                if !folder.is_dir() {
                    return Err(Fault::usage(format!(
                        "{source} is not a folder; give a folder of {}, with a sub-folder a class or without, or a \
                         list (.{})",
                        medium.plural(),
                        LISTS.join(", .")
                    )));
                }
                walk(&folder, Path::new(""), medium, &mut seen)?;
                (Place::Disk(folder), seen)
            }
            None => {
                let store = Store::open(source)?;
                if !store.lists() {
                    return Err(Fault::usage(format!(
                        "{source}: a web server cannot be asked what it holds; give a list of its pictures (.{})",
                        LISTS.join(", .")
                    )));
                }
                let hidden = |path: &str| path.split('/').any(|part| part.starts_with('.'));
                let files = store.list("")?.into_iter().filter(|(path, _)| !hidden(path));
                let seen = files.map(|(path, bytes)| Seen { path: path.into(), bytes: Some(bytes), changed: 0 });
                (Place::Store(store), seen.filter(|seen| extension(&seen.path, medium).is_some()).collect())
            }
        };
        let (pictures, classes) = by_folder(source, seen, medium)?;
        Ok(Source { place, pictures, classes })
    }

    fn list(source: &str, plain: Option<PathBuf>, extension: &str, medium: Medium) -> Result<Source> {
        let (place, rows, seen) = match plain {
            Some(file) => {
                let bytes = fs::read(&file).map_err(|error| Fault::usage(error.to_string()))?;
                let (folder, rows) = (file.parent().unwrap_or(Path::new("")).to_owned(), rows(extension, bytes)?);
                let seen = rows.iter().map(|row| on_disk(&folder, row.path.clone().into())).collect::<Result<_>>()?;
                (Place::Disk(folder), rows, seen)
            }
            None => {
                let (folder, file) = source.rsplit_once('/').expect("a URL has slashes");
                let store = Store::open(folder)?;
                let rows = rows(extension, store.get(file)?)?;
                let seen = in_store(&store, &rows)?;
                (Place::Store(store), rows, seen)
            }
        };
        let (pictures, classes) = by_row(rows, seen, medium)?;
        Ok(Source { place, pictures, classes })
    }
}

/// The path, where `source` is one on this machine.
fn plain(source: &str) -> Result<Option<PathBuf>> {
    match source.split_once("://") {
        None => Ok(Some(PathBuf::from(source))),
        Some(("file", _)) => Ok(Store::open(source)?.local()),
        Some(_) => Ok(None),
    }
}

/// The files of the medium below a folder; hidden files and folders are passed over.
fn walk(root: &Path, below: &Path, medium: Medium, seen: &mut Vec<Seen>) -> Result<()> {
    let folder = root.join(below);
    let disk = |error| Fault::disk(folder.display(), error);
    for entry in fs::read_dir(&folder).map_err(disk)? {
        let name = entry.map_err(disk)?.file_name();
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let path = below.join(name);
        if root.join(&path).is_dir() {
            walk(root, &path, medium, seen)?;
        } else if extension(&path, medium).is_some() {
            seen.push(on_disk(root, path)?);
        }
    }
    Ok(())
}

fn on_disk(folder: &Path, path: PathBuf) -> Result<Seen> {
    let full = folder.join(&path);
    match fs::metadata(&full) {
        Ok(meta) => {
            let changed = meta.modified().map_err(|error| Fault::disk(full.display(), error))?;
            let changed = changed.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
            Ok(Seen { path, bytes: Some(meta.len()), changed })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Seen { path, bytes: None, changed: 0 }),
        Err(error) => Err(Fault::disk(full.display(), error)),
    }
}

/// The sizes of a list's pictures: from one listing, or where a store has none asked one by one, many at a time.
fn in_store(store: &Store, rows: &[Row]) -> Result<Vec<Seen>> {
    let seen = |row: &Row, bytes| Seen { path: row.path.clone().into(), bytes, changed: 0 };
    if store.lists() {
        let there: HashMap<String, u64> = store.list("")?.into_iter().collect();
        return Ok(rows.iter().map(|row| seen(row, there.get(&row.path).copied())).collect());
    }
    std::thread::scope(|scope| {
        let share = |rows: &'_ [Row]| rows.iter().map(|row| Ok(seen(row, store.size(&row.path)?))).collect();
        let chunks = rows.chunks(rows.len().div_ceil(AT_A_TIME).max(1));
        let asked: Vec<_> = chunks.map(|chunk| scope.spawn(move || share(chunk))).collect();
        let answers = asked.into_iter().map(|asked| asked.join().expect("no panic in a question"));
        let answers: Result<Vec<Vec<Seen>>> = answers.collect();
        Ok(answers?.into_iter().flatten().collect())
    })
}

fn extension(path: &Path, medium: Medium) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    medium.extensions().iter().copied().find(|known| *known == extension)
}

fn by_folder(source: &str, mut seen: Vec<Seen>, medium: Medium) -> Result<(Vec<Picture>, Vec<String>)> {
    seen.sort_by(|a, b| a.path.cmp(&b.path));
    if seen.is_empty() {
        let (wanted, other) = match medium {
            Medium::Picture => ("picture", "sounds are packed with --sound"),
            Medium::Sound => ("sound", "pictures are packed without --sound"),
        };
        return Err(Fault::usage(format!(
            "{source} holds no {wanted} (.{}); {other}",
            medium.extensions().join(", .")
        )));
    }
    let class = |seen: &Seen| {
        let mut parts = seen.path.iter();
        parts.next().filter(|_| parts.next().is_some()).map(|first| first.to_string_lossy().into_owned())
    };
    let classes: BTreeSet<String> = seen.iter().filter_map(class).collect();
    let classes: Vec<String> = classes.into_iter().collect();
    let loose = seen.iter().filter(|seen| class(seen).is_none()).count();
    if loose > 0 && !classes.is_empty() {
        return Err(Fault::usage(format!(
            "{source} holds {loose} {} beside its class folders ({}, …): move them into a folder, or pack that \
             folder alone",
            medium.plural(),
            classes[0]
        )));
    }
    let label = |seen: &Seen| class(seen).and_then(|class| classes.binary_search(&class).ok());
    let labels: Vec<_> = seen.iter().map(|seen| label(seen).map(|label| label as u64)).collect();
    let keys = keys(&seen.iter().map(|seen| text(&seen.path)).collect::<Vec<_>>());
    let row = Row::default();
    let pictures = seen.into_iter().zip(keys).zip(labels);
    Ok((pictures.map(|((seen, key), label)| Picture::new(seen, key, label, row.clone(), medium)).collect(), classes))
}

fn by_row(rows: Vec<Row>, seen: Vec<Seen>, medium: Medium) -> Result<(Vec<Picture>, Vec<String>)> {
    if rows.is_empty() {
        return Err(Fault::usage("the list has no rows"));
    }
    let mut first = HashMap::new();
    for (at, row) in rows.iter().enumerate() {
        if let Some(before) = first.insert(&row.path, at) {
            let (before, at) = (before + 1, at + 1);
            return Err(Fault::usage(format!("rows {before} and {at} both name {}; leave one out", row.path)));
        }
    }
    let (labels, classes) = labels(&rows)?;
    let keys = keys(&rows.iter().map(|row| row.path.clone()).collect::<Vec<_>>());
    let pictures = rows.into_iter().zip(seen).zip(keys).zip(labels);
    Ok((pictures.map(|(((row, seen), key), label)| Picture::new(seen, key, label, row, medium)).collect(), classes))
}

/// Labels as numbers, and the names behind them: whole numbers stay, names are numbered in their order.
fn labels(rows: &[Row]) -> Result<(Vec<Option<u64>>, Vec<String>)> {
    let texts: Vec<&str> = rows.iter().filter_map(|row| row.label.as_deref()).collect();
    if !texts.is_empty() && texts.len() < rows.len() {
        let at = rows.iter().position(|row| row.label.is_none()).expect("one is missing") + 1;
        return Err(Fault::usage(format!("row {at} has no label and others have; label all pictures or none")));
    }
    let numbers: Option<Vec<i64>> = texts.iter().map(|text| text.trim().parse().ok()).collect();
    if let Some(numbers) = numbers {
        if let Some(at) = numbers.iter().position(|&number| number < 0) {
            return Err(Fault::usage(format!("row {} has the label {}; labels begin at 0", at + 1, numbers[at])));
        }
        let mut numbers = numbers.into_iter().map(|number| number as u64);
        return Ok((rows.iter().map(|_| numbers.next()).collect(), Vec::new()));
    }
    let classes: Vec<String> = texts.iter().copied().collect::<BTreeSet<_>>().into_iter().map(str::to_owned).collect();
    let number = |text: &&str| classes.binary_search_by(|class| class.as_str().cmp(text)).ok().map(|at| at as u64);
    let labels = texts.iter().map(number).collect();
    Ok((labels, classes))
}

fn text(path: &Path) -> String {
    path.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/")
}

impl Picture {
    fn new(seen: Seen, key: String, label: Option<u64>, row: Row, medium: Medium) -> Picture {
        let Seen { path, bytes, changed } = seen;
        let Row { caption, more, .. } = row;
        Picture { extension: extension(&path, medium), path, key, label, caption, more, bytes, changed }
    }
}
