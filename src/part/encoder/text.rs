//! The transformer over a caption's tokens.

use super::block::Biases;
use super::stack::{Shape, Stack};
use crate::fault::{Fault, Result};
use crate::op::bias_gelu::Form;
use crate::op::patch::gather;
use crate::part::mask::Words;
use crate::part::weights::{Init, Slot, Table, Weights};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// A text tower in a config.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub shape: Shape,
    /// How many tokens there are: at least as many as the tokenizer of `view.caption` knows.
    pub vocabulary: i64,
    /// Tokens of a caption, as `view.caption.length` says.
    pub length: i64,
    /// Hides some of them in training; all are seen when left out.
    #[serde(default)]
    pub mask: Option<Words>,
}

impl Config {
    pub fn check(&self, at: &str) -> Result<()> {
        self.shape.check(&format!("{at}.shape"))?;
        for (name, value, most) in [("vocabulary", self.vocabulary, 1 << 24), ("length", self.length, 4096)] {
            if !(1..=most).contains(&value) {
                return Err(Fault::usage(format!("{at}.{name} is {value}; it must lie in 1..={most}")));
            }
        }
        self.mask.map_or(Ok(()), |mask| mask.check(&format!("{at}.mask"), self.length))
    }

    /// Tokens of a caption that training sees.
    pub fn seen(&self) -> i64 {
        self.mask.map_or(self.length, |mask| mask.kept(self.length))
    }
}

/// Whom a token sees, and which one speaks for the caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Every token sees all, padding too; the first one speaks (FLIP's code).
    Whole,
    /// A token sees itself and those before it; the one of the greatest number speaks, which is the end mark's (CLIP).
    Forward,
}

pub struct Text {
    token: Slot,
    positions: Slot,
    pub stack: Stack,
    reading: Reading,
}

impl Text {
    /// `<name>.token` [V, D], `<name>.positions` [L, D], which weight decay spares, `<name>.blocks.<i>`, `<name>.norm`.
    pub fn new(table: &mut Table, name: &str, config: &Config, reading: Reading, form: Form) -> Text {
        let width = config.shape.width;
        let mut embedding = |which, rows| table.add(format!("{name}.{which}"), &[rows, width], Init::Normal(0.02));
        let (token, positions) = (embedding("token", config.vocabulary), embedding("positions", config.length));
        table.spare(positions);
        let stack = Stack::new(table, name, &config.shape, Biases::All);
        let stack = stack.with_unit(form).looking_back(reading == Reading::Forward);
        Text { token, positions, stack, reading }
    }

    /// ids int64 [B, L] → what each caption says [B, D], as its tokens at the places `keep` int64 [B, K], ascending, have it,
    /// or all of them.
    pub fn forward(&self, w: &Weights, ids: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
        let mut x = Tensor::embedding(&w[self.token], ids, -1, false, false) + &w[self.positions]; // [B, L, D]
        let mut ids = ids.shallow_clone();
        if let Some(keep) = keep {
            (x, ids) = (gather(&x, keep), ids.gather(1, keep, false));
        }
        let all = self.stack.forward(w, x, 0)?;
        Ok(match self.reading {
            Reading::Whole => all.select(1, 0),
            Reading::Forward => gather(&all, &self.speaks(&ids)).squeeze_dim(1),
        })
    }

    /// The place of the token that speaks for each caption of ids [B, L]; int64 [B, 1].
    pub fn speaks(&self, ids: &Tensor) -> Tensor {
        match self.reading {
            Reading::Whole => ids.narrow(1, 0, 1).zeros_like(),
            Reading::Forward => ids.argmax(1, true),
        }
    }
}
