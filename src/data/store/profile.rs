//! Keys, region and endpoint out of ~/.aws/credentials and ~/.aws/config, which object_store does not read.

use crate::fault::{Fault, Result};
use std::collections::HashMap;
use std::path::PathBuf;

/// An access key. No Debug: it must not be printed.
pub(super) struct Keys {
    pub id: String,
    pub secret: String,
    pub token: Option<String>,
}

/// What the chosen profile says.
#[derive(Default)]
pub(super) struct Profile {
    pub keys: Option<Keys>,
    pub region: Option<String>,
    pub endpoint: Option<String>,
}

/// The profile AWS_PROFILE, or `default`. A file that is not there says nothing; a profile asked for by name must be
/// in one of them.
pub(super) fn read() -> Result<Profile> {
    let asked = std::env::var("AWS_PROFILE").ok().filter(|name| !name.is_empty());
    let name = asked.as_deref().unwrap_or("default");
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default().join(".aws");
    let file = |variable: &str, usual: &str| {
        std::fs::read_to_string(std::env::var_os(variable).map_or(home.join(usual), PathBuf::from)).unwrap_or_default()
    };
    let mut values = section(&file("AWS_CONFIG_FILE", "config"), &["profile ", ""], name);
    values.extend(section(&file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), &[""], name));
    if asked.is_some() && values.is_empty() {
        return Err(Fault::usage(format!(
            "AWS_PROFILE is {name}, and neither ~/.aws/credentials nor ~/.aws/config has a section of that name"
        )));
    }
    let mut take = |key: &str| values.remove(key);
    let keys = take("aws_access_key_id").zip(take("aws_secret_access_key"));
    let keys = keys.map(|(id, secret)| Keys { id, secret, token: take("aws_session_token") });
    Ok(Profile { keys, region: take("region"), endpoint: take("endpoint_url") })
}

/// The `key = value` lines below `[name]`, where the heading may have one of the prefixes.
fn section(text: &str, prefixes: &[&str], name: &str) -> HashMap<String, String> {
    let mut inside = false;
    let mut values = HashMap::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(heading) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = prefixes.iter().any(|prefix| heading.trim().strip_prefix(prefix) == Some(name));
        } else if let (true, Some((key, value))) = (inside, line.split_once('=')) {
            values.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    values
}
