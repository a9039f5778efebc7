//! The transformer over a caption's tokens.

use super::block::Biases;
use super::stack::{Shape, Stack};
use crate::fault::{Fault, Result};
use crate::op::bias_gelu::Form;
use crate::op::patch::gather;
use crate::part::weights::{Init, Slot, Table, Weights};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// A text tower in a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub shape: Shape,
    /// How many tokens there are: at least as many as the tokenizer of `view.caption` knows.
    pub vocabulary: i64,
    /// Tokens of a caption, as `view.caption.length` says.
    pub length: i64,
}

impl Config {
    pub fn check(&self, at: &str) -> Result<()> {
        self.shape.check(&format!("{at}.shape"))?;
        for (name, value, most) in [("vocabulary", self.vocabulary, 1 << 24), ("length", self.length, 4096)] {
            if !(1..=most).contains(&value) {
                return Err(Fault::usage(format!("{at}.{name} is {value}; it must lie in 1..={most}")));
            }
        }
        Ok(())
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

    /// ids int64 [B, L] → what each caption says [B, D].
    pub fn forward(&self, w: &Weights, ids: &Tensor) -> Result<Tensor> {
        let x = Tensor::embedding(&w[self.token], ids, -1, false, false) + &w[self.positions]; // [B, L, D]
        let all = self.stack.forward(w, x, 0)?;
        Ok(match self.reading {
            Reading::Whole => all.select(1, 0),
            Reading::Forward => gather(&all, &ids.argmax(1, true)).squeeze_dim(1),
        })
    }
}
