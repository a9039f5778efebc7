//! PyTorch's own files, `.pth` or `.bin`: a zip archive of stored members, a pickle that describes tensors and a member
//! for each storage. Read without executing anything; what cannot be read so is refused with the way to convert it.
//!
//! ```text
//! <name>/data.pkl      the pickle
//!        byteorder     "little" where it is there
//!        data/<key>    the elements of a storage
//! ```

use super::file::dtype;
use super::pickle::{self, Id, Node, Pickle};
use super::torch::{Storage, View};
use crate::fault::{Fault, Result};
use serde_json::{Map, Value};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use tch::{Kind, Tensor};
use zip::{CompressionMethod, ZipArchive};

/// Where trainings keep the model among what they save; the first that is there.
const MODELS: [&str; 4] = ["model", "state_dict", "module", "model_state_dict"];

/// The model's tensors by name, and the plain values among the arguments that the training saved.
pub fn read(path: &Path) -> Result<(BTreeMap<String, Tensor>, Value)> {
    let no = |why: String| refused(path, &why);
    let mut members = Members::open(path).map_err(no)?;
    let pickle = members.pickle().map_err(no)?;
    let model = model(&pickle).map_err(no)?;
    for (name, view) in &model {
        if !matches!(view.storage.kind, Kind::Float | Kind::Half | Kind::BFloat16) {
            return Err(dtype(path, name, &format!("{:?}", view.storage.kind)));
        }
    }
    let tensors = members.tensors(&model).map_err(no)?;
    Ok((tensors, arguments(&pickle)))
}

/// The fault of a file that is not read, with the remedy.
pub fn refused(path: &Path, why: &str) -> Fault {
    let from = path.display();
    Fault::usage(format!(
        "{from}: {why}. If you trust where it comes from (torch.load can run whatever such a file says), convert it in \
         Python and import model.safetensors:\n  import torch; from safetensors.torch import save_file; x = \
         torch.load(\"{from}\", map_location=\"cpu\", weights_only=False)\n  save_file({{k: v.clone() for k, v in \
         x.get(\"model\", x).items()}}, \"model.safetensors\")"
    ))
}

/// The archive's members.
struct Members {
    archive: ZipArchive<BufReader<File>>,
    /// Bytes of the whole file: no member, and no use of them all, may claim much more.
    length: u64,
    /// What stands before every member's name.
    prefix: String,
}

impl Members {
    fn open(path: &Path) -> Result<Members, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        let archive =
            ZipArchive::new(BufReader::new(file)).map_err(|error| format!("it is no whole archive: {error}"))?;
        let pickles: Vec<&str> = archive.file_names().filter_map(|name| name.strip_suffix("data.pkl")).collect();
        let [prefix] = pickles[..] else {
            return Err(format!("it has {} members data.pkl and should have one", pickles.len()));
        };
        let prefix = prefix.to_owned();
        Ok(Members { archive, length, prefix })
    }

    fn pickle(&mut self) -> Result<Pickle, String> {
        if self.archive.index_for_name(&format!("{}byteorder", self.prefix)).is_some()
            && self.read("byteorder", 16)? != b"little"
        {
            return Err("its numbers are stored with the high byte first".into());
        }
        pickle::read(&self.read("data.pkl", pickle::MOST_BYTES)?)
    }

    /// A whole member of at most so many bytes.
    fn read(&mut self, name: &str, most: u64) -> Result<Vec<u8>, String> {
        let wrong = |error: &dyn std::fmt::Display| format!("its member {name} cannot be read: {error}");
        let member = self.archive.by_name(&format!("{}{name}", self.prefix)).map_err(|error| wrong(&error))?;
        if member.compression() != CompressionMethod::Stored {
            return Err(wrong(&"it is compressed, as PyTorch never does"));
        }
        let (size, most) = (member.size(), most.min(self.length));
        if size > most {
            return Err(wrong(&format!("it claims {size} bytes, more than {most}")));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        member.take(most).read_to_end(&mut bytes).map_err(|error| wrong(&error))?;
        Ok(bytes)
    }

    /// A storage's elements, as many as its member holds.
    fn storage(&mut self, storage: &Storage) -> Result<Tensor, String> {
        let bytes = self.read(&format!("data/{}", storage.key), self.length)?;
        let each = storage.kind.elt_size_in_bytes();
        let count = bytes.len() / each;
        Tensor::f_from_data_size(&bytes[..count * each], &[count as i64], storage.kind)
            .map_err(|error| error.to_string())
    }

    /// The tensors of these views. Several may share a storage, and each storage is read once.
    fn tensors(&mut self, model: &BTreeMap<String, &View>) -> Result<BTreeMap<String, Tensor>, String> {
        let bytes =
            |view: &View| view.size.iter().product::<i64>() as u64 * view.storage.kind.elt_size_in_bytes() as u64;
        let total = model.values().fold(0u64, |sum, view| sum.saturating_add(bytes(view)));
        if total > 2 * self.length {
            return Err(format!("its tensors take {total} bytes, and the file has {}", self.length));
        }
        let mut storages: HashMap<(&str, Kind), Tensor> = HashMap::new();
        let mut tensors = BTreeMap::new();
        for (name, view) in model {
            let key = (view.storage.key.as_str(), view.storage.kind);
            let whole = match storages.entry(key) {
                Entry::Occupied(read) => read.into_mut(),
                Entry::Vacant(place) => place.insert(self.storage(&view.storage)?),
            };
            if whole.size()[0] < view.storage.count {
                return Err(format!("the storage of {name} is shorter than it says"));
            }
            let tensor = whole
                .f_as_strided(&view.size, &view.stride, view.offset)
                .map_err(|error| format!("{name} cannot be made: {error}"))?;
            tensors.insert(name.clone(), tensor.contiguous());
        }
        Ok(tensors)
    }
}

/// The value of a dictionary's key; the last one counts, as in Python.
fn entry(pickle: &Pickle, dict: Id, key: &str) -> Option<Id> {
    let Node::Dict(items) = &pickle.nodes[dict] else { return None };
    let is = |id: Id| matches!(&pickle.nodes[id], Node::Text(text) if text == key);
    items.iter().rev().find(|(key, _)| is(*key)).map(|(_, value)| *value)
}

/// The tensors of the state dict: the whole file, or what it keeps under one of the usual names.
fn model(pickle: &Pickle) -> Result<BTreeMap<String, &View>, String> {
    let place = MODELS.iter().find_map(|key| entry(pickle, pickle.root, key)).unwrap_or(pickle.root);
    let Node::Dict(items) = &pickle.nodes[place] else {
        return Err("it holds no state dict, but another object".into());
    };
    let mut tensors = BTreeMap::new();
    for (key, value) in items {
        match (&pickle.nodes[*key], &pickle.nodes[*value]) {
            (Node::Text(name), Node::Tensor(view)) => drop(tensors.insert(name.clone(), view)),
            (Node::Text(name), _) => {
                let wanted = MODELS.join(", ");
                return Err(format!("{name:?} in it is no tensor; wanted a state dict, plain or as one of {wanted}"));
            }
            _ => return Err("a key of its state dict is no text".into()),
        }
    }
    Ok(tensors)
}

/// The plain values of the saved `args`.
fn arguments(pickle: &Pickle) -> Value {
    let Some(Node::Bag(Some(state))) = entry(pickle, pickle.root, "args").map(|id| &pickle.nodes[id]) else {
        return Value::Null;
    };
    let Node::Dict(items) = &pickle.nodes[*state] else { return Value::Null };
    let plain = |(key, value): &(Id, Id)| {
        let Node::Text(key) = &pickle.nodes[*key] else { return None };
        let value = match &pickle.nodes[*value] {
            Node::Bool(yes) => Value::from(*yes),
            Node::Int(number) => Value::from(*number),
            Node::Float(number) => Value::from(*number),
            Node::Text(text) => Value::from(text.clone()),
            _ => return None,
        };
        Some((key.clone(), value))
    };
    Value::Object(items.iter().filter_map(plain).collect::<Map<_, _>>())
}
