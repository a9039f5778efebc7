//! Weight files: read by their first bytes, whatever they are called; written as safetensors.

use super::pth::{self, dtype_error};
use crate::bridge::bytes;
use crate::error::{Error, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// The tensors of a file under its own names, in fp32, fp16 or bf16, with the settings stored in the same folder.
#[derive(Debug)]
pub struct StateDict {
    pub path: PathBuf,
    pub tensors: BTreeMap<String, Tensor>,
    /// `config.json` of the same folder; `Null` if there is none.
    pub config: Value,
    /// `preprocessor_config.json` of the same folder; `Null` if there is none.
    pub preprocessor: Value,
    /// Numbers, texts and booleans of the `args` that a training script saved in its `.pth`; `Null` if there are none.
    pub train_args: Value,
}

impl StateDict {
    /// Returns the shape of a tensor.
    ///
    /// # Errors
    /// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if the file lacks the tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.size()),
            None => Err(self.error(format!("it has no tensor {name}; is the file complete?"))),
        }
    }

    /// Returns a usage error that names this file.
    pub fn error(&self, why: impl std::fmt::Display) -> Error {
        Error::usage(format!("{}: {why}", self.path.display()))
    }

    /// Adds the prefix that the full model has to the names of a bare encoder (`ViTMAEModel`, `VideoMAEModel`).
    pub fn prefix_bare_encoder(&mut self) {
        let prefix = if self.tensors.contains_key("embeddings.cls_token") {
            "vit"
        } else if self.tensors.contains_key("embeddings.patch_embeddings.projection.weight") {
            "videomae"
        } else {
            return;
        };
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors = tensors.into_iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)).collect();
    }
}

/// Reads a weight file, or the one that transformers or timm saved in a folder.
pub fn read_weights(from: &Path) -> Result<StateDict> {
    let path = if from.is_dir() {
        let candidates = ["model.safetensors", "pytorch_model.bin"].map(|name| from.join(name));
        candidates.into_iter().find(|path| path.exists()).ok_or_else(|| {
            Error::usage(format!("{}: the folder has neither model.safetensors nor pytorch_model.bin", from.display()))
        })?
    } else {
        from.to_owned()
    };
    let read_error = |error: std::io::Error| Error::usage(format!("{}: {error}", path.display()));
    let mut start = Vec::new();
    std::fs::File::open(&path).and_then(|file| file.take(9).read_to_end(&mut start)).map_err(read_error)?;
    // A safetensors file begins with the length of its header (8 arbitrary bytes), then `{`.
    let is_safetensors = start.get(8) == Some(&b'{');
    let (tensors, train_args) = if !is_safetensors && start.starts_with(b"PK\x03\x04") {
        pth::read_pth(&path)?
    } else if !is_safetensors && start.starts_with(b"\x80") {
        return Err(pth::unsupported_error(&path, "it is a pickle from before PyTorch 1.6"));
    } else {
        (parse_safetensors(&path, &std::fs::read(&path).map_err(read_error)?)?, Value::Null)
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let config = read_json(&folder.join("config.json"))?;
    let preprocessor = read_json(&folder.join("preprocessor_config.json"))?;
    Ok(StateDict { path, tensors, config, preprocessor, train_args })
}

/// Reads a JSON file; returns `Null` if it does not exist.
fn read_json(path: &Path) -> Result<Value> {
    match std::fs::read(path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| Error::usage(format!("{}: {error}", path.display())))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(Error::usage(format!("{}: {error}", path.display()))),
    }
}

fn parse_safetensors(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| {
        Error::usage(format!(
            "{}: neither a safetensors file nor a PyTorch checkpoint ({error}); is the file complete?",
            path.display()
        ))
    })?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => return Err(dtype_error(path, name, &format!("{other:?}"))),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        tensors.insert(name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    Ok(tensors)
}

/// Writes `model.safetensors` with the metadata that PyTorch loaders require. The file gets its name only when it is
/// complete.
pub fn write_weights(folder: &Path, tensors: &[(String, Tensor)]) -> Result<PathBuf> {
    let path = folder.join("model.safetensors");
    if path.exists() {
        return Err(Error::usage(format!("{} exists already; give --out another folder", path.display())));
    }
    std::fs::create_dir_all(folder).map_err(|error| Error::disk(folder.display(), error))?;
    let shapes: Vec<Vec<usize>> =
        tensors.iter().map(|(_, tensor)| tensor.size().iter().map(|&size| size as usize).collect()).collect();
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .zip(shapes)
        .map(|((name, tensor), shape)| TensorView::new(Dtype::F32, shape, bytes(tensor)).map(|view| (name, view)))
        .collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let partial = folder.join("model.safetensors.part");
    views
        .and_then(|views| safetensors::serialize_to_file(views, Some(metadata), &partial))
        .map_err(|error| Error::disk(partial.display(), std::io::Error::other(error)))?;
    std::fs::rename(&partial, &path).map_err(|error| Error::disk(path.display(), error))?;
    Ok(path)
}
