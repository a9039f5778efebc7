//! A palette: pixels as indices of a few colors, learned from the training set by k-means (iGPT §3.2).

use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::op::k_means::{Clusters, k_means, nearest};
use crate::op::sizes;
use crate::part::buffers::{BufferId, BufferSpecs};
use crate::part::params::Init;
use crate::part::step::Step;
use crate::part::training_samples::{LearnedValues, TrainingSamples};
use std::path::Path;
use tch::{Kind, Tensor};

/// Number of pixels that colors are learned from.
const PIXELS: i64 = 1 << 18;
/// Most rounds of k-means.
const MAX_ROUNDS: usize = 50;

/// Colors in a buffer `palette` [V, C], each channel in −1..1.
#[derive(Clone, Copy, Debug)]
pub struct Palette {
    pub buffer: BufferId,
    colors: i64,
}

impl Palette {
    /// Declares the buffer of `colors` colors.
    pub fn new(buffers: &mut BufferSpecs, colors: i64, channels: i64) -> Palette {
        Palette { buffer: buffers.add("palette", &[colors, channels], Init::FromData), colors }
    }

    /// Pixels as 0..1 [B, C, 1, Y, X] → the index of each pixel's nearest color in row-major order, the lower of two at
    /// the same distance: int64 [B, Y·X].
    pub fn indices(&self, step: &Step, pixels: &Tensor) -> Tensor {
        let [batch, channels, _, height, width] = sizes(pixels);
        let points = (pixels * 2.0 - 1.0).permute([0, 2, 3, 4, 1]).reshape([-1, channels]);
        nearest(&points, &step.buffers[self.buffer]).0.view([batch, height * width])
    }

    /// Indices int64 [B, Y·X] → pixels as 0..1, fp32 [B, C, 1, Y, X].
    pub fn pixels(&self, step: &Step, indices: &Tensor, grid: &Grid) -> Tensor {
        let [batch, _] = sizes(indices);
        let colors = (&step.buffers[self.buffer] + 1.0) / 2.0;
        let pixels =
            colors.index_select(0, &indices.reshape([-1])).view([batch, 1, grid.rows, grid.cols, grid.channels]);
        pixels.permute([0, 4, 1, 2, 3])
    }

    /// Reads the palette of `file`, or learns one from the training set: fp32 [V, C], from dark to bright.
    ///
    /// # Errors
    /// ExitCode::Usage if the file is of another data set or of another shape, or if the set has too few colors.
    pub fn learn(&self, file: Option<&Path>, samples: &mut TrainingSamples) -> Result<Tensor> {
        if let Some(path) = file {
            return self.read(path, samples);
        }
        let (points, weights) = count_colors(samples)?;
        let [found, _] = sizes(&points);
        if found < self.colors {
            return Err(Error::usage(format!(
                "the method wants a palette of {} colors, and the training set's first pixels have {found}; set its colors to \
                 at most {found}",
                self.colors
            )));
        }
        let Clusters { centers, distance, rounds } = k_means(&points, &weights, self.colors, MAX_ROUNDS, samples.seed);
        tracing::info!(
            "learned a palette of {} colors from {} pixels of {found} colors in {rounds} rounds; mean squared distance \
             {distance:.2e} of channels in -1..1",
            self.colors,
            weights.sum(Kind::Int64).int64_value(&[]),
        );
        let order = centers.sum_dim_intlist([1i64].as_slice(), false, None).argsort(0, false);
        Ok(centers.index_select(0, &order).to_kind(Kind::Float))
    }

    fn read(&self, path: &Path, samples: &TrainingSamples) -> Result<Tensor> {
        let at = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| Error::usage(format!("{at}: {error}")))?;
        let file: LearnedValues = serde_json::from_str(&text)
            .map_err(|error| Error::usage(format!("{at} is no palette.json of a run: {error}")))?;
        if file.data_set != samples.data_set {
            return Err(Error::usage(format!(
                "the palette {at} was learned from another data set; leave the key out to learn one from this set"
            )));
        }
        let channels = samples.channels;
        let fits = file.values.iter().all(|color| color.len() as i64 == channels)
            && file.values.len() as i64 == self.colors
            && file.values.iter().flatten().all(|value| (-1.0..=1.0).contains(value));
        if !fits {
            return Err(Error::usage(format!(
                "the palette {at} does not hold {} colors of {channels} channels in -1..1; give the method's colors as they \
                 are there, or leave the palette out",
                self.colors
            )));
        }
        Ok(Tensor::from_slice(&file.values.concat()).view([self.colors, channels]))
    }
}

/// Reads the first pixels of the training set → their different colors fp64 [n, C] in −1..1 and how often each occurs,
/// fp64 `[n]`.
fn count_colors(samples: &mut TrainingSamples) -> Result<(Tensor, Tensor)> {
    let mut codes = Vec::new();
    let mut pixels = 0;
    let channels = samples.channels;
    while pixels < PIXELS {
        let Some(batch) = samples.batches.next() else { break };
        let batch = batch?;
        if batch.kind() != Kind::Uint8 {
            return Err(Error::usage(
                "a palette is of pixels, and the config's view.audio makes spectrograms; leave it out",
            ));
        }
        let rows = batch.permute([0, 2, 3, 4, 1]).reshape([-1, channels]).to_kind(Kind::Int64);
        pixels += rows.size()[0];
        let code = rows.unbind(1).into_iter().reduce(|code, channel| code * 256 + channel);
        codes.push(code.expect("a channel"));
    }
    let (sorted, _) = Tensor::cat(&codes, 0).sort(0, false);
    let (codes, _, counts) = sorted.unique_consecutive(false, true, None);
    let channel = |index: i64| codes.bitwise_right_shift_tensor_scalar(8 * (channels - 1 - index)).bitwise_and(255);
    let points = Tensor::stack(&(0..channels).map(channel).collect::<Vec<_>>(), 1);
    Ok((points.to_kind(Kind::Double) / 127.5 - 1.0, counts.to_kind(Kind::Double)))
}
