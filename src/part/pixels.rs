//! Samples as the rows of patches that a transformer reads, and rows as pictures again.

use crate::fault::Result;
use crate::grid::{Grid, Input};
use crate::op::patch::{self, Scale};
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

/// How a data set's pixels are cut and scaled. Samples x are uint8 or normalised fp32 [B, C, T, Y, X]; rows are
/// [B, .., P] with the channel last.
pub struct Pixels {
    pub grid: Grid,
    scale: Scale,
}

impl Pixels {
    pub fn new(input: &Input) -> Result<Pixels> {
        let (mean, std) = input.scale()?;
        Ok(Pixels { grid: input.grid()?, scale: Scale { mean, std } })
    }

    /// The patches at `at` int64 [B, K], normalised: fp32 [B, K, P].
    pub fn rows(&self, x: &Tensor, at: &Tensor) -> Tensor {
        patch::patch(x, &self.grid, &self.scale, at)
    }

    /// All patches in row-major order, normalised: fp32 [B, N, P].
    pub fn all(&self, x: &Tensor) -> Tensor {
        self.rows(x, &Mask::none(x.size()[0], self.grid.tokens(), x.device()).keep)
    }

    /// Whole samples, normalised: fp32 [B, C, T, Y, X].
    pub fn normalised(&self, x: &Tensor) -> Tensor {
        patch::pixels(&self.all(x), &self.grid)
    }

    /// Normalised rows → rows of pixels as 0..1, not clamped.
    pub fn to_unit(&self, rows: &Tensor) -> Tensor {
        rows * self.constants(&self.scale.std, rows) + self.constants(&self.scale.mean, rows)
    }

    /// The inverse of `to_unit`.
    pub fn from_unit(&self, rows: &Tensor) -> Tensor {
        (rows - self.constants(&self.scale.mean, rows)) / self.constants(&self.scale.std, rows)
    }

    /// Pictures of a guess, normalised rows [B, M, P] at the dropped places.
    pub fn reconstruction(&self, x: &Tensor, guess: &Tensor, mask: &Mask) -> Reconstruction {
        let (seen, hidden) = (self.rows(x, &mask.keep), self.rows(x, &mask.drop));
        let restore = mask.restore();
        let picture = |at_hidden: &Tensor| {
            let rows = patch::gather(&Tensor::cat(&[&seen, at_hidden], 1), &restore);
            self.scale.to_unit(&patch::pixels(&rows, &self.grid))
        };
        Reconstruction { original: picture(&hidden), masked: picture(&hidden.zeros_like()), guessed: picture(guess) }
    }

    /// One value for each channel as a row [P].
    fn constants(&self, values: &[f64], like: &Tensor) -> Tensor {
        let values = Tensor::from_slice(values).to_kind(Kind::Float).to_device(like.device());
        values.repeat([self.grid.values() / self.grid.channels])
    }
}
