//! An image tower and a text tower, and the space where both meet: one projection for each, vectors of length one, and the
//! learned scale of their likenesses.

use crate::fault::Result;
use crate::grid::Grid;
use crate::op::bias_gelu::Form;
use crate::part::encoder::stack::Shape;
use crate::part::encoder::text::{self, Reading, Text};
use crate::part::encoder::vit::{Make, Vit};
use crate::part::encoder::{Features, block::Biases, position};
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Slot, Table, Weights};
use crate::part::work::{self, Op, Work};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// How the two towers are built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Towers {
    /// Fixed positions, and an image is the mean of all its tokens; a caption's tokens see all, and the first one speaks;
    /// units in their tanh form (FLIP's code).
    #[default]
    Plain,
    /// Learned positions, a normalisation in front of the blocks, and an image is its class token; a caption's tokens see
    /// those before them, and the end mark speaks; units exact (CLIP, as open_clip trains it).
    Clip,
}

pub struct Pair {
    /// Tensors of the towers, `image.*` and `text.*`, and of the space.
    pub table: Table,
    image: Vit,
    text: Text,
    towers: Towers,
    /// `image_projection.weight` and `text_projection.weight` [E, D] of each tower's width, without biases.
    projections: [Linear; 2],
    /// `logit_scale` [1, 1], the logarithm of the inverse temperature, at first ln(1 / 0.07). FLIP's code has weight decay
    /// pull on it, which spares vectors: hence two dimensions.
    scale: Slot,
    grid: Grid,
    shape: Shape,
    captions: text::Config,
    /// E.
    width: i64,
}

impl Pair {
    /// Towers of these shapes; `width` is that of the space.
    pub fn new(grid: &Grid, towers: Towers, shape: &Shape, captions: &text::Config, width: i64) -> Pair {
        let mut table = Table::default();
        let positions = position::table(grid, shape.width, None);
        let make = Make { class: true, in_place: false, embed: Init::Xavier, biases: Biases::All, positions };
        let image = Vit::new(&mut table, "image", grid, shape, make);
        let (image, reading, form) = match towers {
            Towers::Plain => (image, Reading::Whole, Form::Tanh),
            Towers::Clip => (image.with_front(&mut table, "image"), Reading::Forward, Form::Exact),
        };
        let text = Text::new(&mut table, "text", captions, reading, form);
        let projections = [("image", shape.width), ("text", captions.shape.width)];
        let projections =
            projections.map(|(name, from)| Linear::bare(&mut table, &format!("{name}_projection"), from, width));
        let scale = table.add("logit_scale", &[1, 1], Init::Constant((1.0f64 / 0.07).ln()));
        let (grid, shape, captions) = (*grid, *shape, *captions);
        Pair { table, image: image.with_unit(form), text, towers, projections, scale, grid, shape, captions, width }
    }

    /// From now on blocks are run again in backward instead of being kept.
    pub fn recompute(&mut self) {
        (self.image.stack.recompute, self.text.stack.recompute) = (true, true);
    }

    /// What a training step over `batch` pairs does with one, of whose image `kept` tokens are visible.
    pub fn work(&self, kept: i64, batch: i64) -> Work {
        let (length, [inside, within]) = (self.captions.seen(), [self.shape.width, self.captions.shape.width]);
        let projection =
            |from: i64| Op::Product { rows: 1, inputs: from, outputs: self.width, onward: true, sums_bias: false };
        let seen = kept + 1;
        let mut image: Vec<Op> = work::embed(kept, self.grid.values(), inside).into();
        image.push(work::fill(kept, seen, inside));
        image.extend(self.shape.work(seen, seen));
        image.push(projection(inside));
        let mut text = vec![work::fill(length, length, within)];
        text.extend(self.captions.shape.work(length, length));
        text.push(projection(within));
        Work { parts: vec![("image", image), ("text", text), ("loss", work::contrast(batch, self.width))] }
    }

    /// rows [B, K, P] of the visible patches → images as unit vectors, fp32 [B, E].
    pub fn images(&self, w: &Weights, rows: &Tensor, mask: &Mask) -> Result<Tensor> {
        Ok(unit(&self.projections[0].forward(w, &self.pooled(w, rows, mask)?)?))
    }

    /// Which tokens of captions int64 [B, L] a training sees, int64 [B, K]; none where it sees all.
    pub fn words(&self, ids: &Tensor, seed: u64, origins: &Tensor) -> Option<Tensor> {
        self.captions.mask.map(|mask| mask.draw(ids, &self.text.speaks(ids), seed, origins))
    }

    /// ids int64 [B, L], of which the tokens `keep` are seen or all → captions as unit vectors, fp32 [B, E].
    pub fn captions(&self, w: &Weights, ids: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
        Ok(unit(&self.projections[1].forward(w, &self.text.forward(w, ids, keep)?)?))
    }

    /// What likenesses are multiplied by, fp32 []: exp of `logit_scale` within 0 and ln 100. It is cut here, where the
    /// gradient ends outside of these bounds, as in FLIP's code; open_clip cuts the weight itself after each update. Inside
    /// the bounds both are the same; this way needs no update of its own kind, and weight decay brings it back inside.
    pub fn scale(&self, w: &Weights) -> Tensor {
        w[self.scale].to_kind(Kind::Float).view([]).clamp(0.0, 100f64.ln()).exp()
    }

    /// The image tower's own word, ahead of the projection, of whole samples' rows: one vector, of which a class token is a
    /// part or which it is.
    pub fn features(&self, w: &Weights, rows: &Tensor) -> Result<Features> {
        let mask = Mask::none(rows.size()[0], rows.size()[1], rows.device());
        Ok(Features { class: None, mean: self.pooled(w, rows, &mask)?.to_kind(Kind::Float) })
    }

    fn pooled(&self, w: &Weights, rows: &Tensor, mask: &Mask) -> Result<Tensor> {
        let tokens = self.image.forward(w, rows, mask)?; // [B, 1+K, D]
        Ok(match self.towers {
            Towers::Plain => tokens.mean_dim(1, false, tokens.kind()), // the class token too
            Towers::Clip => tokens.select(1, 0),
        })
    }
}

/// Rows of length one in fp32; FLIP's code adds 1e-8 to the length.
fn unit(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Float);
    &x / (x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true) + 1e-8)
}
