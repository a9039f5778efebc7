//! What a frozen encoder says of labelled samples.

use super::Feature;
use super::progress::Progress;
use super::ranks::Ranks;
use super::samples;
use crate::config::Config;
use crate::data::medium::Medium;
use crate::data::mix::Mix;
use crate::fault::{Code, Fault, Result};
use crate::feed::Rows;
use crate::method::{Batch, Features, Method};
use crate::op::shuffle::Origin;
use crate::optim::flat::Flat;
use crate::part::view::log_mel::LogMel;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// Samples that go through the encoder at a time.
pub const ROWS: usize = 256;

/// A checkpoint's encoder with its weights, which stay as they are.
pub struct Encoder {
    pub config: Config,
    pub method: Box<dyn Method>,
    pub flat: Flat,
    pub feature: Feature,
    /// Where views of sounds stay samples.
    log_mel: Option<LogMel>,
    /// D, known before the first sample: a rank may have none.
    pub width: i64,
}

impl Encoder {
    /// Of the features that are asked for, else of the class token where there is one, else of the mean.
    ///
    /// # Errors
    /// Code::Usage where the class token is asked for and there is none.
    pub fn new(mut config: Config, method: Box<dyn Method>, flat: Flat, asked: Option<Feature>) -> Result<Encoder> {
        let (grid, device) = (*method.grid(), flat.master.device());
        config.view = config.view.on(device);
        let log_mel = config.view.log_mel(&grid, device)?;
        let shape = [&[1][..], &config.view.shape(&grid)].concat();
        let nothing = Tensor::f_zeros(&shape, (config.view.medium().kind(), device))?;
        let mut encoder = Encoder { config, method, flat, feature: Feature::Mean, log_mel, width: 0 };
        let found = encoder.run(&encoder.batch(nothing, &[0], None)?)?;
        encoder.width = found.mean.size()[1];
        encoder.feature = match (asked, found.class) {
            (Some(Feature::Statistics), _) => {
                if encoder.config.view.medium() != Medium::Sound {
                    return Err(Fault::usage(
                        "--feature statistics is about spectrograms, and this model sees pictures",
                    ));
                }
                encoder.width = 2 * encoder.config.input.width;
                Feature::Statistics
            }
            (Some(Feature::Class), None) => {
                return Err(Fault::usage(
                    "the model has no class token; ask for --feature mean, or leave the choice to the model",
                ));
            }
            (Some(asked), _) => asked,
            (None, Some(_)) => Feature::Class,
            (None, None) => Feature::Mean,
        };
        Ok(encoder)
    }

    /// Features of rows, fp32 [R, D] on the CPU.
    pub fn features(&self, rows: &Rows) -> Result<Tensor> {
        let mut parts = vec![self.none()];
        for (number, ids) in rows.ids.chunks(ROWS).enumerate() {
            let first = number * ROWS;
            let (range, device) = (first..first + ids.len(), self.flat.master.device());
            let valid = &rows.valid[range.clone()];
            let batch = self.batch(rows.to_device(range, device)?, ids, Some(valid))?;
            let features = match self.feature {
                Feature::Class => self.run(&batch)?.class.expect("asked for where there is one alone"),
                Feature::Mean => self.run(&batch)?.mean,
                Feature::Statistics => statistics(&batch.pixels, valid),
            };
            parts.push(features.to_kind(Kind::Float).to_device(Device::Cpu));
        }
        Ok(Tensor::cat(&parts, 0))
    }

    /// Features of no sample, [0, D].
    pub fn none(&self) -> Tensor {
        Tensor::zeros([0, self.width], (Kind::Float, Device::Cpu))
    }

    /// Samples as the method reads them.
    fn batch(&self, pixels: Tensor, ids: &[u64], valid: Option<&[u32]>) -> Result<Batch> {
        let origins: Vec<Origin> = ids.iter().map(|&id| Origin { id, epoch: 0, repeat: 0 }).collect();
        let batch = Batch::new(pixels, &origins, self.config.train.seed).with_valid(valid.map(<[u32]>::to_vec));
        batch.heard(self.log_mel.as_ref())
    }

    fn run(&self, batch: &Batch) -> Result<Features> {
        no_grad(|| self.method.features(&self.flat.leaves, batch))
    }
}

/// Mean and standard deviation over time of each band of spectrograms [R, 1, 1, Y, X], of which `valid` rows are sound; [R, 2X].
fn statistics(spectrograms: &Tensor, valid: &[u32]) -> Tensor {
    let [y, x] = [3, 4].map(|dim| spectrograms.size()[dim]);
    let rows = spectrograms.view([-1, y, x]);
    let valid: Vec<f32> = valid.iter().map(|&rows| rows.max(1) as f32).collect();
    let valid = Tensor::from_slice(&valid).view([-1, 1, 1]).to_device(rows.device());
    let padding = Tensor::arange(y, (Kind::Float, rows.device())).view([1, y, 1]).ge_tensor(&valid);
    let sum = |of: Tensor| of.masked_fill(&padding, 0.0).sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    let mean = |of: Tensor| sum(of) / &valid; // [R, 1, X]
    let middle = mean(rows.shallow_clone());
    let deviation = mean((&rows - &middle).square()).sqrt();
    Tensor::cat(&[middle, deviation], 2).squeeze_dim(1)
}

/// Features [R, D], classes int64 [R], and how many samples could not be decoded.
pub struct Set {
    pub x: Tensor,
    pub labels: Tensor,
    pub left_out: i64,
}

impl Set {
    /// This rank's share of a data set in evaluation's view; `title` is for the one who waits.
    pub fn sweep(encoder: &Encoder, set: &Arc<Mix>, ranks: &mut Ranks, title: &'static str) -> Result<Set> {
        let share = samples::share(set, ranks);
        let mut progress = Progress::begin(title, share, ranks.first());
        let mut x = vec![encoder.none()];
        let mut labels = vec![Tensor::zeros([0], (Kind::Int64, Device::Cpu))];
        let grid = *encoder.method.grid();
        for (rows, step) in samples::sweep(set, ROWS as u64, &encoder.config, grid, ranks)?.zip(1..) {
            let rows = rows?;
            x.push(encoder.features(&rows)?);
            labels.push(Tensor::from_slice(&rows.labels.unwrap_or_default()));
            ranks.beat();
            progress.at((step * ROWS as u64).min(share), "");
        }
        let (x, labels) = (Tensor::cat(&x, 0), Tensor::cat(&labels, 0));
        natural(&labels)?;
        let left_out = share as i64 - labels.numel() as i64;
        Ok(Set { x, labels, left_out })
    }

    /// All ranks' samples, in the order of the data set, on every rank; collective. `name` is for the fault where
    /// nothing could be decoded.
    pub fn gather(&self, ranks: &mut Ranks, name: &str) -> Result<Set> {
        let (x, labels) = (ranks.gather(&self.x)?, ranks.gather(&self.labels)?);
        if labels.numel() == 0 {
            return Err(nothing(name));
        }
        Ok(Set { x, labels, left_out: self.left_out })
    }
}

/// The fault of a set of which no sample could be decoded.
pub fn nothing(name: &str) -> Fault {
    Fault::new(Code::Corrupt, format!("no sample of {name} could be decoded; fetch or pack the data again"))
}

/// Classes are numbered from 0.
fn natural(labels: &Tensor) -> Result<()> {
    match labels.numel() {
        0 => Ok(()),
        _ => match labels.min().int64_value(&[]) {
            least if least < 0 => Err(Fault::usage(format!(
                "a sample has the label {least}; classes are numbered from 0: write its .cls anew, or pack again"
            ))),
            _ => Ok(()),
        },
    }
}
