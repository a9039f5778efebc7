//! A masked autoencoder of pixels, put together from the parts above: rows of visible patches → encoder → decoder →
//! guesses at the hidden ones. Papers differ in how the parts are made and in the mask.

use crate::fault::Result;
use crate::grid::Grid;
use crate::part::decoder::vit::{self as decoder, Decoder};
use crate::part::encoder::Features;
use crate::part::encoder::vit::{self as encoder, Shape, Vit};
use crate::part::mask::Mask;
use crate::part::pixels::{Pixels, Reconstruction};
use crate::part::target::pixel::Pixel;
use crate::part::weights::{Table, Weights};
use crate::part::work::{self, Op, Work};
use tch::{Kind, Tensor};

pub struct Autoencoder {
    pub pixels: Pixels,
    /// Tensors of the encoder, `encoder.*`, and of the decoder, `decoder.*`.
    pub table: Table,
    pub encoder: Vit,
    pub decoder: Decoder,
    pub target: Pixel,
    /// The encoder's shape and the decoder's.
    shapes: [Shape; 2],
    /// Whether a class token stands in front, and whether the encoder sees mask tokens.
    class: bool,
    in_place: bool,
    /// Whether the decoder is filled ahead of its first layer.
    ahead: bool,
}

impl Autoencoder {
    pub fn new(
        pixels: Pixels,
        (inside, encoder): (&Shape, encoder::Make),
        (outside, decoder): (&Shape, decoder::Make),
        target: Pixel,
    ) -> Autoencoder {
        let mut table = Table::default();
        let (shapes, class, in_place) = ([*inside, *outside], encoder.class, encoder.in_place);
        let ahead = decoder.ahead;
        let encoder = Vit::new(&mut table, "encoder", &pixels.grid, inside, encoder);
        let decoder = Decoder::new(&mut table, "decoder", &pixels.grid, inside.width, outside, decoder);
        Autoencoder { pixels, table, encoder, decoder, target, shapes, class, in_place, ahead }
    }

    /// From now on blocks are run again in backward instead of being kept.
    pub fn recompute(&mut self) {
        (self.encoder.stack.recompute, self.decoder.stack.recompute) = (true, true);
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
        self.encoder.features(w, &self.pixels.all(x, w.kind())?)
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
        let (hidden, class, [inside, outside]) = (tokens - kept, i64::from(self.class), self.shapes);
        let (all, seen) = (tokens + class, if self.in_place { tokens } else { kept } + class);
        let blocks = |shape: Shape, tokens: i64, answered: i64| {
            let of = move |i: i64| if i + 1 == shape.depth { answered } else { tokens };
            let block = move |i: i64| work::block(tokens, of(i), shape.width, shape.mlp_ratio * shape.width, i > 0);
            (0..shape.depth).flat_map(block).chain([work::add_norm(answered, shape.width)])
        };
        let mut encoder: Vec<Op> = work::embed(kept, values, inside.width).into();
        encoder.push(work::fill(kept, seen, inside.width));
        encoder.extend(blocks(inside, seen, seen));
        let mut decoder = match self.ahead {
            true => vec![work::fill(seen, all, inside.width), work::linear(all, inside.width, outside.width)],
            false => vec![work::linear(seen, inside.width, outside.width), work::fill(seen, all, outside.width)],
        };
        decoder.extend(blocks(outside, all, hidden));
        decoder.push(work::linear(hidden, outside.width, values));
        Work {
            parts: vec![("encoder", encoder), ("decoder", decoder), ("loss", vec![work::pixel_loss(hidden, values)])],
        }
    }
}
