//! Where a store on this machine lies: plain paths and file:// URLs.

use crate::fault::{Fault, Result};
use object_store::path::Path as Key;
use std::path::{Component, Path, PathBuf};

/// `scheme://rest`, or no scheme and the text itself.
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

/// The path of a `file://` URL, given what follows the two slashes.
pub(super) fn path_of_file_url(rest: &str) -> Result<PathBuf> {
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
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
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
