//! PyTorch's own files, `.pth` or `.bin`: a zip archive of stored members, a pickle that describes tensors and a member
//! for each storage. They are read without executing anything; a file that cannot be read this way is rejected with
//! instructions to convert it.
//!
//! ```text
//! <name>/data.pkl      the pickle
//!        byteorder     "little", if present
//!        data/<key>    the elements of a storage
//! ```

use super::pickle::{self, Pickle};
use super::torch::{Node, NodeId, Storage, StridedView};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use tch::{Kind, Tensor};
use zip::{CompressionMethod, ZipArchive};

/// Keys under which training scripts save the state dict; the first one present is used.
const STATE_DICT_KEYS: [&str; 4] = ["model", "state_dict", "module", "model_state_dict"];

/// Returns the model's tensors by name, and the plain values among the saved training arguments.
pub fn read_pth(path: &Path) -> Result<(BTreeMap<String, Tensor>, Value)> {
    let reject = |why: String| unsupported_error(path, &why);
    let mut archive = PthArchive::open(path).map_err(reject)?;
    let pickle = archive.pickle().map_err(reject)?;
    let views = state_dict(&pickle).map_err(reject)?;
    for (name, view) in &views {
        if !matches!(view.storage.kind, Kind::Float | Kind::Half | Kind::BFloat16) {
            return Err(dtype_error(path, name, &format!("{:?}", view.storage.kind)));
        }
    }
    let tensors = archive.tensors(&views).map_err(reject)?;
    Ok((tensors, train_args(&pickle)))
}

/// Returns the error of a file that cannot be read, with instructions to convert it.
pub fn unsupported_error(path: &Path, why: &str) -> Error {
    let from = path.display();
    Error::usage(format!(
        "{from}: {why}. If you trust its source (torch.load can execute code from such a file), convert it in Python \
         and import model.safetensors:\n  import torch; from safetensors.torch import save_file; x = \
         torch.load(\"{from}\", map_location=\"cpu\", weights_only=False)\n  save_file({{k: v.clone() for k, v in \
         x.get(\"model\", x).items()}}, \"model.safetensors\")"
    ))
}

/// Returns the error of a tensor whose dtype is not that of weights.
pub fn dtype_error(path: &Path, name: &str, found: &str) -> Error {
    Error::usage(format!(
        "{}: {name} is {found}; weights must be fp32, fp16 or bf16. Convert it, or remove it from the file.",
        path.display()
    ))
}

struct PthArchive {
    archive: ZipArchive<BufReader<File>>,
    /// Size of the file in bytes: the limit for any member, and half the limit for all tensors together.
    length: u64,
    /// Prefix of all member names.
    prefix: String,
}

impl PthArchive {
    fn open(path: &Path) -> Result<PthArchive, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        let archive =
            ZipArchive::new(BufReader::new(file)).map_err(|error| format!("it is not a complete archive: {error}"))?;
        let pickles: Vec<&str> = archive.file_names().filter_map(|name| name.strip_suffix("data.pkl")).collect();
        let [prefix] = pickles[..] else {
            return Err(format!("it has {} members data.pkl and should have one", pickles.len()));
        };
        let prefix = prefix.to_owned();
        Ok(PthArchive { archive, length, prefix })
    }

    fn pickle(&mut self) -> Result<Pickle, String> {
        let has_byte_order = self.archive.index_for_name(&format!("{}byteorder", self.prefix)).is_some();
        if has_byte_order && self.member("byteorder", 16)? != b"little" {
            return Err("its numbers are big-endian".into());
        }
        pickle::parse(&self.member("data.pkl", pickle::MAX_BYTES)?)
    }

    /// Reads a whole member of at most `max_bytes` bytes.
    fn member(&mut self, name: &str, max_bytes: u64) -> Result<Vec<u8>, String> {
        let read_error = |error: &dyn std::fmt::Display| format!("its member {name} cannot be read: {error}");
        let member = self.archive.by_name(&format!("{}{name}", self.prefix)).map_err(|error| read_error(&error))?;
        if member.compression() != CompressionMethod::Stored {
            return Err(read_error(&"it is compressed, which PyTorch never does"));
        }
        let size = member.size();
        let max_bytes = max_bytes.min(self.length);
        if size > max_bytes {
            return Err(read_error(&format!("it claims {size} bytes, more than {max_bytes}")));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        member.take(max_bytes).read_to_end(&mut bytes).map_err(|error| read_error(&error))?;
        Ok(bytes)
    }

    /// Reads all elements of a storage, [number of elements in the member].
    fn storage(&mut self, storage: &Storage) -> Result<Tensor, String> {
        let bytes = self.member(&format!("data/{}", storage.key), self.length)?;
        let element_bytes = storage.kind.elt_size_in_bytes();
        let count = bytes.len() / element_bytes;
        Tensor::f_from_data_size(&bytes[..count * element_bytes], &[count as i64], storage.kind)
            .map_err(|error| error.to_string())
    }

    /// Reads the tensors of `views`. Views may share a storage, and each storage is read once.
    fn tensors(&mut self, views: &BTreeMap<String, &StridedView>) -> Result<BTreeMap<String, Tensor>, String> {
        let total = views.values().fold(0u64, |sum, view| sum.saturating_add(tensor_bytes(view)));
        if total > 2 * self.length {
            return Err(format!("its tensors take {total} bytes, and the file has {}", self.length));
        }
        let mut storages: HashMap<(&str, Kind), Tensor> = HashMap::new();
        let mut tensors = BTreeMap::new();
        for (name, view) in views {
            let key = (view.storage.key.as_str(), view.storage.kind);
            let elements = match storages.entry(key) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(self.storage(&view.storage)?),
            };
            if elements.size()[0] < view.storage.count {
                return Err(format!("the storage of {name} has fewer elements than the pickle claims"));
            }
            let tensor = elements
                .f_as_strided(&view.size, &view.stride, view.offset)
                .map_err(|error| format!("{name} cannot be built: {error}"))?;
            tensors.insert(name.clone(), tensor.contiguous());
        }
        Ok(tensors)
    }
}

fn tensor_bytes(view: &StridedView) -> u64 {
    view.size.iter().product::<i64>() as u64 * view.storage.kind.elt_size_in_bytes() as u64
}

/// Returns the value of a dictionary's key; of repeated keys the last one counts, as in Python.
fn entry(pickle: &Pickle, dict: NodeId, key: &str) -> Option<NodeId> {
    let Node::Dict(items) = &pickle.nodes[dict] else { return None };
    let is_key = |id: NodeId| matches!(&pickle.nodes[id], Node::Text(text) if text == key);
    items.iter().rev().find(|(key, _)| is_key(*key)).map(|(_, value)| *value)
}

/// Returns the tensors of the state dict: the root, or its value under one of [`STATE_DICT_KEYS`].
fn state_dict(pickle: &Pickle) -> Result<BTreeMap<String, &StridedView>, String> {
    let dict = STATE_DICT_KEYS.iter().find_map(|key| entry(pickle, pickle.root, key)).unwrap_or(pickle.root);
    let Node::Dict(items) = &pickle.nodes[dict] else {
        return Err("it has no state dict, but another object".into());
    };
    let mut tensors = BTreeMap::new();
    for (key, value) in items {
        match (&pickle.nodes[*key], &pickle.nodes[*value]) {
            (Node::Text(name), Node::Tensor(view)) => drop(tensors.insert(name.clone(), view)),
            (Node::Text(name), _) => {
                let keys = STATE_DICT_KEYS.join(", ");
                return Err(format!(
                    "{name:?} in it is not a tensor; wanted a state dict, at the top or under one of {keys}"
                ));
            }
            _ => return Err("a key of its state dict is not a text".into()),
        }
    }
    Ok(tensors)
}

/// Returns the plain values of the saved `args`.
fn train_args(pickle: &Pickle) -> Value {
    let Some(Node::Object(Some(state))) = entry(pickle, pickle.root, "args").map(|id| &pickle.nodes[id]) else {
        return Value::Null;
    };
    let Node::Dict(items) = &pickle.nodes[*state] else { return Value::Null };
    let mut arguments = Map::new();
    for (key, value) in items {
        let Node::Text(key) = &pickle.nodes[*key] else { continue };
        let value = match &pickle.nodes[*value] {
            Node::Bool(value) => Value::from(*value),
            Node::Int(value) => Value::from(*value),
            Node::Float(value) => Value::from(*value),
            Node::Text(value) => Value::from(value.clone()),
            _ => continue,
        };
        arguments.insert(key.clone(), value);
    }
    Value::Object(arguments)
}
