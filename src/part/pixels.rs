//! Samples as the rows of patches that a transformer reads, and rows as pictures again.

use crate::fault::Result;
use crate::grid::{Grid, Input};
use crate::op::patch::{self, Level, Scale};
use crate::part::lengths::{self, Group};
use crate::part::mask::Mask;
use tch::{Kind, Tensor};

/// What a model makes of hidden places, for people to look at; pixels as 0..1 [B, C, T, Y, X].
pub struct Reconstruction {
    pub original: Tensor,
    /// The original with hidden places in grey.
    pub masked: Tensor,
    /// The original where visible, the guess where hidden.
    pub guessed: Tensor,
}

impl Reconstruction {
    /// Those of each group's samples, in the order of the batch.
    pub fn in_order(groups: &[Group], of: impl Fn(&Group) -> Result<Reconstruction>) -> Result<Reconstruction> {
        let parts = groups.iter().map(of).collect::<Result<Vec<_>>>()?;
        let all = |picture: fn(&Reconstruction) -> &Tensor| {
            lengths::in_order(groups, &parts.iter().map(|part| picture(part).shallow_clone()).collect::<Vec<_>>())
        };
        Ok(Reconstruction { original: all(|p| &p.original), masked: all(|p| &p.masked), guessed: all(|p| &p.guessed) })
    }
}

/// How a data set's pixels are cut and scaled. Samples x are uint8 or normalised fp32 [B, C, T, Y, X]; rows are
/// [B, .., P] with the channel last. A sample may have fewer frames than the grid: a still picture is a clip of one slot.
pub struct Pixels {
    /// Of the longest samples.
    pub grid: Grid,
    scale: Scale,
}

impl Pixels {
    pub fn new(input: &Input) -> Result<Pixels> {
        let (mean, std) = input.scale()?;
        Ok(Pixels { grid: input.grid()?, scale: Scale { mean, std } })
    }

    /// The grid of samples x, which has as many slots as their frames make.
    pub fn grid_of(&self, x: &Tensor) -> Grid {
        Grid { frames: x.size()[2] / self.grid.patch_frames, ..self.grid }
    }

    /// The patches at `at` int64 [B, K], normalised: [B, K, P] of this kind.
    pub fn rows(&self, x: &Tensor, at: &Tensor, kind: Kind) -> Result<Tensor> {
        patch::patch(x, &self.grid_of(x), &self.scale, at, kind)
    }

    /// All patches in row-major order, normalised: [B, N, P] of this kind.
    pub fn all(&self, x: &Tensor, kind: Kind) -> Result<Tensor> {
        self.first(x, self.grid_of(x).tokens(), kind)
    }

    /// As many of them, from the first on: [B, tokens, P].
    pub fn first(&self, x: &Tensor, tokens: i64, kind: Kind) -> Result<Tensor> {
        self.rows(x, &Mask::none(x.size()[0], tokens, x.device()).keep, kind)
    }

    /// Whole samples, normalised: fp32 [B, C, T, Y, X].
    pub fn normalised(&self, x: &Tensor) -> Result<Tensor> {
        Ok(patch::pixels(&self.all(x, Kind::Float)?, &self.grid_of(x)))
    }

    /// Targets: the patches at `at` levelled, as the model receives them, or with `unit` as 0..1: fp32 [B, M, P].
    pub fn target(&self, x: &Tensor, at: &Tensor, level: Level, unit: bool) -> Result<Tensor> {
        let raw = Scale { mean: vec![0.0; self.scale.mean.len()], std: vec![1.0; self.scale.std.len()] };
        let grid = self.grid_of(x);
        match (unit, x.kind()) {
            (false, _) => patch::target(x, &grid, &self.scale, at, level),
            (true, Kind::Uint8) => patch::target(x, &grid, &raw, at, level),
            (true, _) => patch::target(&self.to_unit(x), &grid, &raw, at, level),
        }
    }

    /// Normalised samples → the same as 0..1, not clamped.
    fn to_unit(&self, x: &Tensor) -> Tensor {
        let of = |values: &[f64]| patch::by_channel(values, x.device()).view([-1, 1, 1, 1]);
        x * of(&self.scale.std) + of(&self.scale.mean)
    }

    /// Rows of pixels as 0..1 → normalised rows.
    pub fn from_unit(&self, rows: &Tensor) -> Tensor {
        (rows - self.constants(&self.scale.mean, rows)) / self.constants(&self.scale.std, rows)
    }

    /// Pictures of a guess, normalised rows [B, M, P] at the dropped places. Where the mask is of the first tokens alone,
    /// those behind them are shown as they are.
    pub fn reconstruction(&self, x: &Tensor, guess: &Tensor, mask: &Mask) -> Result<Reconstruction> {
        let [seen, hidden] = [self.rows(x, &mask.keep, Kind::Float)?, self.rows(x, &mask.drop, Kind::Float)?];
        let restore = mask.restore();
        let known = restore.size()[1];
        let grid = self.grid_of(x);
        let rest = self.all(x, Kind::Float)?.narrow(1, known, grid.tokens() - known);
        let picture = |at_hidden: &Tensor| {
            let rows = patch::gather(&Tensor::cat(&[&seen, at_hidden], 1), &restore);
            self.scale.to_unit(&patch::pixels(&Tensor::cat(&[&rows, &rest], 1), &grid))
        };
        let grey = hidden.zeros_like();
        Ok(Reconstruction { original: picture(&hidden), masked: picture(&grey), guessed: picture(guess) })
    }

    /// One value for each channel as a row [P].
    fn constants(&self, values: &[f64], like: &Tensor) -> Tensor {
        patch::by_channel(values, like.device()).repeat([self.grid.values() / self.grid.channels])
    }
}
