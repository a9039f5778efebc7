//! Makes the keys of samples from the paths of their files.

use super::super::index;
use std::collections::HashMap;

/// Maximum bytes of a key: with its extension it fits a USTAR name of 100 bytes.
const MAX_KEY_BYTES: usize = 90;
/// Maximum bytes of the part of a key before a digest.
const MAX_PREFIX_BYTES: usize = 57;

/// Returns a key for each relative path: the path without its extension, with dots and slashes replaced. Where two
/// paths would share a key, or the key would be empty or too long, a digest of the path makes it unique.
pub fn sample_keys(paths: &[String]) -> Vec<String> {
    let plain: Vec<String> = paths.iter().map(|path| plain_key(path)).collect();
    let mut uses: HashMap<&str, usize> = HashMap::new();
    for key in &plain {
        *uses.entry(key).or_default() += 1;
    }
    let unique_key = |(key, path): (&String, &String)| {
        let is_unique = uses[key.as_str()] == 1 && !key.is_empty();
        if is_unique && key.len() <= MAX_KEY_BYTES && !path.contains(char::REPLACEMENT_CHARACTER) {
            return key.clone();
        }
        let fits = |(index, c): &(usize, char)| index + c.len_utf8() <= MAX_PREFIX_BYTES;
        let prefix: String = key.char_indices().take_while(fits).map(|(_, c)| c).collect();
        format!("{prefix}-{}", index::to_hex(&index::digest(path.as_bytes())))
    };
    plain.iter().zip(paths).map(unique_key).collect()
}

fn plain_key(path: &str) -> String {
    // A dot in a folder's name begins no extension.
    let file_start = path.rfind('/').map_or(0, |slash| slash + 1);
    let stem = path[file_start..].rfind('.').map_or(path, |dot| &path[..file_start + dot]);
    let replace = |c: char| match c {
        '/' => '_',
        '.' => '-',
        c if c.is_control() => '-',
        c => c,
    };
    stem.chars().map(replace).collect()
}
