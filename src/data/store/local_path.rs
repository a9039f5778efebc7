//! The location of a local store: plain paths and file:// URLs.

use crate::error::{Error, Result};
use object_store::path::Path as Key;
use std::path::{Component, Path, PathBuf};

/// Splits `scheme://rest`; without a scheme, returns the text itself.
pub(super) fn split_scheme(text: &str) -> (Option<&str>, &str) {
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

/// Returns the path of a `file://` URL, of which `rest` follows the two slashes.
pub(super) fn file_url_to_path(rest: &str) -> Result<PathBuf> {
    let without_query = rest.split(['?', '#']).next().unwrap_or_default();
    let path = without_query.strip_prefix("localhost").unwrap_or(without_query);
    if !path.starts_with('/') {
        return Err(Error::usage(format!(
            "file://{without_query}: a file URL has three slashes and an absolute path, as in file:///data/run; for a \
             relative path leave file:// out"
        )));
    }
    let key = Key::from_url_path(path)
        .map_err(|error| Error::usage(format!("file://{without_query}: not a usable path: {error}")))?;
    Ok(Path::new("/").join(key.as_ref()))
}

/// Returns the absolute path with symbolic links resolved in the part that exists. The rest must not contain `..`.
pub(super) fn to_absolute(path: &Path) -> Result<PathBuf> {
    let unusable = |why: &str| Error::usage(format!("{}: not usable as a store's path: {why}", path.display()));
    let full = std::path::absolute(path).map_err(|error| unusable(&error.to_string()))?;
    for ancestor in full.ancestors() {
        let Ok(real) = ancestor.canonicalize() else { continue };
        let rest = full.strip_prefix(ancestor).expect("an ancestor is a prefix");
        if !rest.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(unusable("it contains .. below a folder that does not exist"));
        }
        return Ok(if rest.as_os_str().is_empty() { real } else { real.join(rest) });
    }
    Err(unusable("no part of it exists"))
}
