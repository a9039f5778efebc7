//! Keys of samples, out of the paths of their pictures.

use super::super::index;
use std::collections::HashMap;

/// The longest key: with its extension it fits a USTAR name of 100 bytes.
const LONGEST: usize = 90;

/// Keys out of relative paths: without the picture's extension, dots and slashes made safe, short enough for a USTAR
/// name. Where two paths would share a key, or one had to be cut, a digest of the path tells them apart.
pub fn keys(relative: &[String]) -> Vec<String> {
    let plain: Vec<String> = relative.iter().map(|path| plain(path)).collect();
    let mut uses: HashMap<&str, usize> = HashMap::new();
    for key in &plain {
        *uses.entry(key).or_default() += 1;
    }
    let told = |(key, path): (&String, &String)| {
        let lone = uses[key.as_str()] == 1 && !key.is_empty();
        if lone && key.len() <= LONGEST && !path.contains(char::REPLACEMENT_CHARACTER) {
            return key.clone();
        }
        let short = key.char_indices().take_while(|(at, c)| at + c.len_utf8() <= 57).map(|(_, c)| c);
        format!("{}-{}", short.collect::<String>(), index::hex(&index::digest(path.as_bytes())))
    };
    plain.iter().zip(relative).map(told).collect()
}

fn plain(path: &str) -> String {
    // A dot in a folder's name begins no extension.
    let file = path.rfind('/').map_or(0, |slash| slash + 1);
    let stem = path[file..].rfind('.').map_or(path, |dot| &path[..file + dot]);
    let safe = |c: char| match c {
        '/' => '_',
        '.' => '-',
        c if c.is_control() => '-',
        c => c,
    };
    stem.chars().map(safe).collect()
}
