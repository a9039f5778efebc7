//! A config as the JSON value that it is written in: its paths, overrides of them, what two differ in, and what is wrong.

use crate::fault::{Fault, Result};
use serde_json::Value;

/// Every value of a config with its dotted path.
pub fn leaves(value: &Value) -> Vec<(String, Value)> {
    let Value::Object(object) = value else { return vec![(String::new(), value.clone())] };
    let below = |(key, value): (&String, &Value)| {
        let join = |(path, leaf): (String, Value)| (format!("{key}.{path}").trim_end_matches('.').to_string(), leaf);
        leaves(value).into_iter().map(join).collect::<Vec<_>>()
    };
    object.iter().flat_map(below).collect()
}

/// Dotted paths at which two JSON values differ, with both values.
pub fn differences(a: &Value, b: &Value) -> Vec<(String, Value, Value)> {
    fn walk(path: &str, a: &Value, b: &Value, out: &mut Vec<(String, Value, Value)>) {
        match (a, b) {
            (Value::Object(x), Value::Object(y)) => {
                let keys: std::collections::BTreeSet<_> = x.keys().chain(y.keys()).collect();
                for key in keys {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(&path, x.get(key).unwrap_or(&Value::Null), y.get(key).unwrap_or(&Value::Null), out);
                }
            }
            _ if a != b => out.push((path.to_string(), a.clone(), b.clone())),
            _ => {}
        }
    }
    let mut out = Vec::new();
    walk("", a, b, &mut out);
    out
}

/// `path.to.key=value`; the value is JSON, or else a string.
pub fn set(root: &mut Value, line: &str) -> Result<()> {
    let wrong = || Fault::usage(format!("--set {line}: wanted path.to.key=value, such as train.steps=100"));
    let (path, value) = line.split_once('=').ok_or_else(wrong)?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_string()));
    let mut at = &mut *root;
    let mut keys = path.split('.').peekable();
    while let Some(key) = keys.next() {
        if key.is_empty() {
            return Err(wrong());
        }
        let Value::Object(object) = at else {
            return Err(Fault::usage(format!("--set {line}: what stands before `{key}` is no section of the config")));
        };
        if keys.peek().is_none() {
            object.insert(key.to_string(), value);
            break;
        }
        at = object.entry(key).or_insert_with(|| Value::Object(Default::default()));
    }
    // Two ways to say one thing exclude each other: the one that is set now wins.
    for (path_set, other) in
        [("train.steps", "epochs"), ("train.epochs", "steps"), ("optim.lr", "base_lr"), ("optim.base_lr", "lr")]
    {
        if path == path_set
            && let Some(section) = root[path.split('.').next().expect("a section")].as_object_mut()
        {
            section.remove(other);
        }
    }
    Ok(())
}

/// serde's complaint in our words: where, what, and the nearest valid name for an unknown key.
pub fn explain(error: serde_path_to_error::Error<serde_json::Error>) -> Fault {
    let place = error.path().to_string();
    let text = error.inner().to_string();
    let place = if place == "." { "the config".to_string() } else { place };
    let quoted: Vec<&str> = text.split('`').skip(1).step_by(2).collect();
    let names = ["unknown field", "unknown variant"];
    let Some(kind) = names.iter().find(|name| text.starts_with(*name)) else {
        return Fault::usage(format!("at {place}: {text}"));
    };
    let what = if kind.ends_with("field") { "key" } else { "value" };
    let (Some(unknown), valid) = (quoted.first(), quoted.get(1..).unwrap_or_default()) else {
        return Fault::usage(format!("at {place}: {text}"));
    };
    let nearest =
        valid.iter().max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)));
    let hint = nearest.map_or(String::new(), |name| format!("; did you mean `{name}`?"));
    Fault::usage(format!("at {place}: unknown {what} `{unknown}`{hint} Valid: {}", valid.join(", ")))
}
