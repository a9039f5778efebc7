//! A config as a JSON value: its paths, overrides of single keys, differences between two configs, and error messages.

use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::BTreeSet;

/// Returns every value of a config with its dotted path.
pub fn leaves(value: &Value) -> Vec<(String, Value)> {
    let Value::Object(object) = value else { return vec![(String::new(), value.clone())] };
    let below = |(key, value): (&String, &Value)| {
        let join = |(path, leaf): (String, Value)| (format!("{key}.{path}").trim_end_matches('.').to_string(), leaf);
        leaves(value).into_iter().map(join).collect::<Vec<_>>()
    };
    object.iter().flat_map(below).collect()
}

/// Returns the dotted paths at which two JSON values differ, with both values.
pub fn differences(a: &Value, b: &Value) -> Vec<(String, Value, Value)> {
    let mut differences = Vec::new();
    collect_differences("", a, b, &mut differences);
    differences
}

fn collect_differences(path: &str, a: &Value, b: &Value, differences: &mut Vec<(String, Value, Value)>) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<_> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let a = a.get(key).unwrap_or(&Value::Null);
                let b = b.get(key).unwrap_or(&Value::Null);
                collect_differences(&path, a, b, differences);
            }
        }
        _ if a != b => differences.push((path.to_string(), a.clone(), b.clone())),
        _ => {}
    }
}

/// Pairs of keys that exclude each other: the path that was set, and the key of the same section that it replaces.
const ALTERNATIVES: [(&str, &str); 4] =
    [("train.steps", "epochs"), ("train.epochs", "steps"), ("optim.lr", "base_lr"), ("optim.base_lr", "lr")];

/// Applies an override `path.to.key=value`. The value is parsed as JSON, or else taken as a string.
pub fn apply_override(root: &mut Value, line: &str) -> Result<()> {
    let malformed = || Error::usage(format!("--set {line}: wanted path.to.key=value, such as train.steps=100"));
    let (path, value) = line.split_once('=').ok_or_else(malformed)?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_string()));
    let mut section = &mut *root;
    let mut keys = path.split('.').peekable();
    while let Some(key) = keys.next() {
        if key.is_empty() {
            return Err(malformed());
        }
        let Value::Object(object) = section else {
            return Err(Error::usage(format!("--set {line}: the path before `{key}` is no section of the config")));
        };
        if keys.peek().is_none() {
            object.insert(key.to_string(), value);
            break;
        }
        section = object.entry(key).or_insert_with(|| Value::Object(Default::default()));
    }
    for (set_path, replaced_key) in ALTERNATIVES {
        if path == set_path
            && let Some(section) = root[path.split('.').next().expect("a section")].as_object_mut()
        {
            section.remove(replaced_key);
        }
    }
    Ok(())
}

/// Converts serde's error to a message with the place, the problem, and the nearest valid name for an unknown key.
pub fn describe_error(error: serde_path_to_error::Error<serde_json::Error>) -> Error {
    let path = error.path().to_string();
    let path = if path == "." { "the config".to_string() } else { path };
    let text = error.inner().to_string();
    let what = if text.starts_with("unknown field") {
        "key"
    } else if text.starts_with("unknown variant") {
        "value"
    } else {
        return Error::usage(format!("at {path}: {text}"));
    };
    // serde writes: unknown field `x`, expected one of `a`, `b`
    let names: Vec<&str> = text.split('`').skip(1).step_by(2).collect();
    let [unknown, valid @ ..] = names.as_slice() else {
        return Error::usage(format!("at {path}: {text}"));
    };
    let similarity = |name: &&&str| strsim::jaro_winkler(unknown, name);
    let nearest = valid.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    let hint = nearest.map_or(String::new(), |name| format!("; did you mean `{name}`?"));
    Error::usage(format!("at {path}: unknown {what} `{unknown}`{hint} Valid: {}", valid.join(", ")))
}
