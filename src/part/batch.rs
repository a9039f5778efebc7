//! A batch: the views of some samples and what goes along with them, on their way through a model.

use crate::error::{Error, Result};
use crate::op::shuffle::SampleKey;
use crate::view::log_mel::LogMel;
use std::ops::Range;
use tch::{Device, Tensor};

/// Label of a sample that has none, as PyTorch's `cross_entropy` ignores it by default.
pub const NO_LABEL: i64 = -100;

/// Fields of samples beside their pixels; each is there where the config reads it. [`Side::stack`] makes it of rows,
/// and it stays one value from the loader to the loss, so that a further field is one line here.
#[derive(Debug, Default, PartialEq)]
pub struct Side {
    /// Token ids of the captions, int64 [B, L].
    pub captions: Option<Tensor>,
    /// Class indices, int64 `[B]`; [`NO_LABEL`] where a sample has none.
    pub labels: Option<Tensor>,
    /// Number of pixel rows (Y) of each sample that are not padding.
    pub valid: Option<Vec<u32>>,
}

/// The fields of [`Side`] for one sample.
#[derive(Clone, Debug, Default)]
pub struct RowSide {
    pub caption: Option<Vec<i64>>,
    pub label: Option<i64>,
    pub valid: u32,
}

impl Side {
    /// Stacks rows; a field is there if the caller `has` it: captions of this length, and labels.
    pub fn stack(rows: &[RowSide], caption_length: Option<i64>, has_labels: bool) -> Result<Side> {
        let n = rows.len() as i64;
        let captions = caption_length.map(|length| -> Result<Tensor> {
            let ids: Vec<i64> = rows.iter().flat_map(|row| row.caption.iter().flatten()).copied().collect();
            Ok(Tensor::from_slice(&ids).f_view([n, length])?)
        });
        let labels = has_labels.then(|| {
            let labels: Vec<i64> = rows.iter().map(|row| row.label.unwrap_or(NO_LABEL)).collect();
            Tensor::from_slice(&labels)
        });
        let valid = rows.iter().map(|row| row.valid).collect();
        Ok(Side { captions: captions.transpose()?, labels, valid: Some(valid) })
    }

    /// Applies `f` to every tensor, captions first.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Side> {
        Ok(Side {
            captions: self.captions.as_ref().map(&mut f).transpose()?,
            labels: self.labels.as_ref().map(&mut f).transpose()?,
            valid: self.valid.clone(),
        })
    }

    /// Returns the rows of some samples; tensors are views.
    pub fn slice(&self, rows: Range<usize>) -> Result<Side> {
        let first = rows.start as i64;
        let size = rows.len() as i64;
        let side = self.map(|tensor| Ok(tensor.f_narrow(0, first, size)?))?;
        Ok(Side { valid: self.valid.as_ref().map(|valid| valid[rows].to_vec()), ..side })
    }

    /// Returns the rows of some samples on a device.
    pub fn to_device(&self, rows: Range<usize>, device: Device) -> Result<Side> {
        self.slice(rows)?.map(|tensor| to_device(tensor, 0..tensor.size()[0] as usize, device))
    }

    /// Returns the rows at `indices`, copied.
    pub fn select(&self, indices: &[i64]) -> Result<Side> {
        let side = self.map(|tensor| select(tensor, 0, indices))?;
        let valid = self.valid.as_ref().map(|valid| indices.iter().map(|&index| valid[index as usize]).collect());
        Ok(Side { valid, ..side })
    }
}

/// Samples that go through the model at a time, on one rank.
#[derive(Debug)]
pub struct Batch {
    /// Views of the samples, at least one: uint8 as decoded, or fp32 already normalized, [B, C, T, Y, X]. Before
    /// [`Batch::with_spectrograms`], audio may be fp32 waveforms [B, 1, 1, 1, samples].
    pub views: Vec<Tensor>,
    pub side: Side,
    /// RNG keys of the samples, int64 [3, B] on the views' device (see [`SampleKey::stack`]).
    pub keys: Tensor,
    /// The run's seed.
    pub seed: u64,
}

impl Batch {
    /// One view of samples with these keys, which are copied to the view's device.
    pub fn new(view: Tensor, keys: &[SampleKey], seed: u64) -> Batch {
        Batch { keys: SampleKey::stack(keys, view.device()), views: vec![view], side: Side::default(), seed }
    }

    /// Adds the fields beside the pixels.
    pub fn with_side(self, side: Side) -> Batch {
        Batch { side, ..self }
    }

    /// Returns the first view, [B, C, T, Y, X]; most methods have no other.
    pub fn view(&self) -> &Tensor {
        &self.views[0]
    }

    /// B.
    pub fn size(&self) -> i64 {
        self.view().size()[0]
    }

    /// Applies `f` to every tensor: views, keys, then the side's.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Batch> {
        Ok(Batch {
            views: self.views.iter().map(&mut f).collect::<Result<_>>()?,
            keys: f(&self.keys)?,
            side: self.side.map(f)?,
            seed: self.seed,
        })
    }

    /// Lists every tensor in the order of [`Batch::map`].
    pub fn tensors(&self) -> Vec<&Tensor> {
        let side = [&self.side.captions, &self.side.labels];
        self.views.iter().chain([&self.keys]).chain(side.into_iter().flatten()).collect()
    }

    /// Replaces waveforms by log-mel spectrograms where `log_mel` makes them on this device; otherwise changes nothing.
    pub fn with_spectrograms(&self, log_mel: Option<&LogMel>) -> Result<Batch> {
        let batch = self.slice(0..self.size() as usize)?;
        match log_mel {
            Some(log_mel) => {
                let views = batch.views.iter().map(|view| log_mel.forward(view)).collect::<Result<_>>()?;
                Ok(Batch { views, ..batch })
            }
            None => Ok(batch),
        }
    }

    /// Returns some of the samples; tensors are views.
    pub fn slice(&self, rows: Range<usize>) -> Result<Batch> {
        let first = rows.start as i64;
        let size = rows.len() as i64;
        Ok(Batch {
            views: self.views.iter().map(|view| Ok(view.f_narrow(0, first, size)?)).collect::<Result<_>>()?,
            keys: self.keys.f_narrow(1, first, size)?,
            side: self.side.slice(rows)?,
            seed: self.seed,
        })
    }

    /// Returns the samples at `indices`, copied.
    pub fn select(&self, indices: &[i64]) -> Result<Batch> {
        Ok(Batch {
            views: self.views.iter().map(|view| select(view, 0, indices)).collect::<Result<_>>()?,
            keys: select(&self.keys, 1, indices)?,
            side: self.side.select(indices)?,
            seed: self.seed,
        })
    }

    /// Returns the captions, int64 [B, L].
    ///
    /// # Errors
    /// ExitCode::Failed if the batch has none: a method that reads captions says so in its requirements.
    pub fn captions(&self) -> Result<&Tensor> {
        self.side
            .captions
            .as_ref()
            .ok_or_else(|| Error::failed("a batch without captions reached a method that reads them"))
    }

    /// Returns the labels, int64 `[B]`.
    ///
    /// # Errors
    /// ExitCode::Failed if the batch has none: a method that reads labels says so in its requirements.
    pub fn labels(&self) -> Result<&Tensor> {
        self.side
            .labels
            .as_ref()
            .ok_or_else(|| Error::failed("a batch without labels reached a method that reads them"))
    }
}

/// Returns some rows of a tensor on a device, without a copy where they are there already. From a CPU to a GPU the copy
/// goes through pinned memory, which libtorch keeps for the next time, and nothing waits for it.
pub fn to_device(all: &Tensor, rows: Range<usize>, device: Device) -> Result<Tensor> {
    let part = all.f_narrow(0, rows.start as i64, rows.len() as i64)?;
    if part.device() == device {
        return Ok(part);
    }
    Ok(part.f_pin_memory(device)?.f_to_device_(device, all.kind(), true, false)?)
}

fn select(x: &Tensor, dim: i64, indices: &[i64]) -> Result<Tensor> {
    let rows = indices.iter().map(|&index| Ok(x.f_narrow(dim, index, 1)?)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&rows, dim)?)
}
