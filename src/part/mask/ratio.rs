//! The config's `mask` of every policy that hides a fixed share.

use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The share of tokens that a random mask hides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ratio {
    /// The share of patches hidden, in (0, 1).
    pub ratio: f64,
}

impl Ratio {
    /// Refuses a share, called `<at>.ratio`, that hides nothing or all of `total` patches; it keeps `kept` of them.
    pub fn check(&self, at: &str, total: i64, kept: i64, papers: f64) -> Result<()> {
        let ratio = self.ratio;
        if !(ratio > 0.0 && ratio < 1.0) {
            return Err(Error::usage(format!(
                "{at}.ratio is {ratio}; it is the share of patches hidden and must lie in (0, 1), {papers} in the paper"
            )));
        }
        if kept == 0 || kept == total {
            return Err(Error::usage(format!(
                "{at}.ratio is {ratio}, which keeps {kept} of {total} patches; at least one must be kept and one hidden: \
                 choose a ratio between {:.3} and {:.3}, or smaller patches",
                1.0 / total as f64,
                1.0 - 1.0 / total as f64
            )));
        }
        Ok(())
    }
}
