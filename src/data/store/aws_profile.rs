//! Reads keys, region and endpoint from ~/.aws/credentials and ~/.aws/config, which object_store does not read.

use crate::error::{Error, Result};
use std::collections::HashMap;
use std::path::PathBuf;

/// An access key. Without Debug, because it must not be printed.
pub(super) struct AccessKey {
    pub id: String,
    pub secret: String,
    pub token: Option<String>,
}

/// The settings of the selected profile.
#[derive(Default)]
pub(super) struct AwsProfile {
    pub access_key: Option<AccessKey>,
    pub region: Option<String>,
    pub endpoint: Option<String>,
}

/// Reads the profile named by AWS_PROFILE, or `default`. Missing files are empty.
///
/// # Errors
/// ExitCode::Usage where neither file has the profile named by AWS_PROFILE.
pub(super) fn read() -> Result<AwsProfile> {
    let requested = std::env::var("AWS_PROFILE").ok().filter(|name| !name.is_empty());
    let name = requested.as_deref().unwrap_or("default");
    let folder = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default().join(".aws");
    let read_file = |variable: &str, default: &str| {
        let path = std::env::var_os(variable).map_or(folder.join(default), PathBuf::from);
        std::fs::read_to_string(path).unwrap_or_default()
    };
    let mut values = read_section(&read_file("AWS_CONFIG_FILE", "config"), &["profile ", ""], name);
    values.extend(read_section(&read_file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), &[""], name));
    if requested.is_some() && values.is_empty() {
        return Err(Error::usage(format!(
            "AWS_PROFILE is {name}, and neither ~/.aws/credentials nor ~/.aws/config has a section of that name"
        )));
    }
    let mut take = |key: &str| values.remove(key);
    let pair = take("aws_access_key_id").zip(take("aws_secret_access_key"));
    let access_key = pair.map(|(id, secret)| AccessKey { id, secret, token: take("aws_session_token") });
    Ok(AwsProfile { access_key, region: take("region"), endpoint: take("endpoint_url") })
}

/// Returns the `key = value` lines of section `[name]`, whose heading may have one of the prefixes.
fn read_section(text: &str, prefixes: &[&str], name: &str) -> HashMap<String, String> {
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
