//! Files of weights: read whatever they are called, by their first bytes; written as safetensors.

use super::pth;
use crate::bridge::bytes;
use crate::fault::{Fault, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// A file's tensors under its own names, in fp32, fp16 or bf16, and what was said beside them.
#[derive(Debug)]
pub struct Sheet {
    pub path: PathBuf,
    pub tensors: BTreeMap<String, Tensor>,
    /// `config.json` in the same folder; Null where there is none.
    pub config: Value,
    /// `preprocessor_config.json` in the same folder.
    pub preprocessor: Value,
    /// The numbers, texts and switches among the arguments that a training saved in its `.pth`.
    pub arguments: Value,
}

impl Sheet {
    /// A tensor's shape, or that it is missing.
    pub fn size(&self, name: &str) -> Result<Vec<i64>> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.size()),
            None => Err(self.wrong(format!("it has no tensor {name}; is it whole?"))),
        }
    }

    /// A fault of this file.
    pub fn wrong(&self, why: impl std::fmt::Display) -> Fault {
        Fault::usage(format!("{}: {why}", self.path.display()))
    }

    /// A bare encoder (`ViTMAEModel`, `VideoMAEModel`) gets the names that it has as a part of the whole.
    pub fn name_bare_encoder(&mut self) {
        let part = match self.tensors.contains_key("embeddings.cls_token") {
            true => "vit",
            false if self.tensors.contains_key("embeddings.patch_embeddings.projection.weight") => "videomae",
            false => return,
        };
        self.tensors = std::mem::take(&mut self.tensors).into_iter().map(|(n, t)| (format!("{part}.{n}"), t)).collect();
    }
}

/// Reads a file, or the one of a folder as transformers and timm save it.
pub fn read(from: &Path) -> Result<Sheet> {
    let path = match from.is_dir() {
        true => ["model.safetensors", "pytorch_model.bin"].map(|name| from.join(name)).into_iter().find(|p| p.exists()),
        false => Some(from.to_owned()),
    };
    let path = path.ok_or_else(|| {
        Fault::usage(format!("{}: neither model.safetensors nor pytorch_model.bin is there", from.display()))
    })?;
    let wrong = |error: std::io::Error| Fault::usage(format!("{}: {error}", path.display()));
    let mut head = Vec::new();
    std::fs::File::open(&path).and_then(|file| file.take(9).read_to_end(&mut head)).map_err(wrong)?;
    // A safetensors file begins with 8 bytes of any value, its header's length; only then comes what tells it.
    let (tensors, arguments) = if head.get(8) != Some(&b'{') && head.starts_with(b"PK\x03\x04") {
        pth::read(&path)?
    } else if head.get(8) != Some(&b'{') && head.starts_with(b"\x80") {
        return Err(pth::refused(&path, "it is a pickle from before PyTorch 1.6"));
    } else {
        (unpack(&path, &std::fs::read(&path).map_err(wrong)?)?, Value::Null)
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let (config, preprocessor) = (beside(folder, "config.json")?, beside(folder, "preprocessor_config.json")?);
    Ok(Sheet { path, tensors, config, preprocessor, arguments })
}

/// A JSON file of the folder; Null where there is none.
fn beside(folder: &Path, name: &str) -> Result<Value> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| Fault::usage(format!("{}: {error}", path.display())))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(Fault::usage(format!("{}: {error}", path.display()))),
    }
}

fn unpack(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let whole = SafeTensors::deserialize(bytes).map_err(|error| {
        Fault::usage(format!(
            "{}: neither a safetensors file nor a PyTorch checkpoint ({error}); is it whole?",
            path.display()
        ))
    })?;
    let mut tensors = BTreeMap::new();
    for (name, view) in whole.iter() {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => return Err(dtype(path, name, &format!("{other:?}"))),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        tensors.insert(name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    Ok(tensors)
}

/// The fault of a tensor that is no weight.
pub fn dtype(path: &Path, name: &str, found: &str) -> Fault {
    Fault::usage(format!(
        "{}: {name} is {found}; weights are read from fp32, fp16 and bf16. Convert it, or leave it out of the file.",
        path.display()
    ))
}

/// Writes `model.safetensors` as loaders of PyTorch want it, under a name of its own until it is whole.
pub fn write(folder: &Path, tensors: &[(String, Tensor)]) -> Result<PathBuf> {
    let path = folder.join("model.safetensors");
    if path.exists() {
        return Err(Fault::usage(format!("{} is there already; give --out another folder", path.display())));
    }
    std::fs::create_dir_all(folder).map_err(|error| Fault::disk(folder.display(), error))?;
    let shapes: Vec<Vec<usize>> =
        tensors.iter().map(|(_, tensor)| tensor.size().iter().map(|&size| size as usize).collect()).collect();
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .zip(shapes)
        .map(|((name, tensor), shape)| TensorView::new(Dtype::F32, shape, bytes(tensor)).map(|view| (name, view)))
        .collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let part = folder.join("model.safetensors.part");
    views
        .and_then(|views| safetensors::serialize_to_file(views, Some(metadata), &part))
        .map_err(|error| Fault::disk(part.display(), std::io::Error::other(error)))?;
    std::fs::rename(&part, &path).map_err(|error| Fault::disk(path.display(), error))?;
    Ok(path)
}
