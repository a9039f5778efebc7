//! A masked autoencoder of pixels, put together from the parts above: rows of visible patches → encoder → decoder →
//! guesses at the hidden ones. Papers differ in how the parts are made and in the mask.

use crate::fault::Result;
use crate::grid::Grid;
use crate::part::decoder::{Decode, vit as decoder};
use crate::part::encoder::Features;
use crate::part::encoder::vit::{self as encoder, Shape, Vit};
use crate::part::mask::Mask;
use crate::part::pixels::{Pixels, Reconstruction};
use crate::part::target::pixel::Pixel;
use crate::part::weights::{Table, Weights};
use crate::part::work::{self, Op, Work};
use tch::{Kind, Tensor};

/// `D` is its decoder.
pub struct Autoencoder<D = decoder::Decoder> {
    pub pixels: Pixels,
    /// Tensors of the encoder, `encoder.*`, and of the decoder, `decoder.*`.
    pub table: Table,
    pub encoder: Vit,
    pub decoder: D,
    pub target: Pixel,
    /// The encoder's.
    shape: Shape,
    /// Whether a class token stands in front, and whether the encoder sees mask tokens.
    class: bool,
    in_place: bool,
}

impl Autoencoder {
    pub fn new(
        pixels: Pixels,
        (inside, encoder): (&Shape, encoder::Make),
        (outside, decoder): (&Shape, decoder::Make),
        target: Pixel,
    ) -> Autoencoder {
        let grid = pixels.grid;
        let made = Autoencoder::with(pixels, (inside, encoder), target, |table| {
            Ok(decoder::Decoder::new(table, "decoder", &grid, inside.width, outside, decoder))
        });
        made.expect("nothing that can fail")
    }
}

impl<D: Decode> Autoencoder<D> {
    /// With the decoder that `make` puts into the table.
    pub fn with(
        pixels: Pixels,
        (inside, encoder): (&Shape, encoder::Make),
        target: Pixel,
        make: impl FnOnce(&mut Table) -> Result<D>,
    ) -> Result<Self> {
        let mut table = Table::default();
        let (shape, class, in_place) = (*inside, encoder.class, encoder.in_place);
        let encoder = Vit::new(&mut table, "encoder", &pixels.grid, inside, encoder);
        let decoder = make(&mut table)?;
        Ok(Autoencoder { pixels, table, encoder, decoder, target, shape, class, in_place })
    }

    /// From now on blocks are run again in backward instead of being kept.
    pub fn recompute(&mut self) {
        self.encoder.stack.recompute = true;
        self.decoder.recompute();
    }

    /// x [B, C, T, Y, X] → guesses at the dropped places, in the target's form [B, M, P].
    pub fn guess(&self, w: &Weights, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        let visible = self.pixels.rows(x, &mask.keep, w.kind())?; // [B, K, P]
        let features = self.encoder.forward(w, &visible, mask)?;
        self.decoder.guess(w, &features, mask)
    }

    /// What is right at the dropped places, fp32 [B, M, P].
    pub fn truth(&self, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        self.target.truth(&self.pixels, x, &mask.drop)
    }

    /// The encoder on whole samples, nothing hidden.
    pub fn features(&self, w: &Weights, x: &Tensor) -> Result<Features> {
        self.features_of(w, x, self.pixels.grid_of(x).tokens())
    }

    /// The encoder on the first `tokens` of each sample, nothing hidden.
    pub fn features_of(&self, w: &Weights, x: &Tensor, tokens: i64) -> Result<Features> {
        self.encoder.features(w, &self.pixels.first(x, tokens, w.kind())?)
    }

    /// Pictures of the guesses.
    pub fn reconstruction(&self, w: &Weights, x: &Tensor, mask: &Mask) -> Result<Reconstruction> {
        let seen = self.pixels.rows(x, &mask.keep, Kind::Float)?;
        let guess = self.target.shown(&self.pixels, &self.guess(w, x, mask)?, &seen);
        self.pixels.reconstruction(x, &guess, mask)
    }

    /// What a training step does with one sample of which `kept` tokens are visible.
    pub fn work(&self, kept: i64) -> Work {
        self.work_of(self.pixels.grid.frames, kept)
    }

    /// The same with a sample of `slots` time slots.
    pub fn work_of(&self, slots: i64, kept: i64) -> Work {
        let grid = Grid { frames: slots, ..self.pixels.grid };
        let (tokens, values) = (grid.tokens(), grid.values());
        let (hidden, class, inside) = (tokens - kept, i64::from(self.class), self.shape);
        let seen = if self.in_place { tokens } else { kept } + class;
        let mut encoder: Vec<Op> = work::embed(kept, values, inside.width).into();
        encoder.push(work::fill(kept, seen, inside.width));
        encoder.extend(inside.work(seen, seen));
        let decoder = self.decoder.work(kept, hidden, class);
        Work {
            parts: vec![("encoder", encoder), ("decoder", decoder), ("loss", vec![work::pixel_loss(hidden, values)])],
        }
    }
}
