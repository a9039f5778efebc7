//! The block whose input is probed, and the search for the best one (iGPT §3.4).

use super::features::{FeatureExtractor, FeatureSet};
use super::linear_fast::LinearProbe;
use super::ranks::Ranks;
use crate::data::mixture::Mixture;
use crate::error::Result;
use std::str::FromStr;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// The layer that features are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeLayer {
    /// The model's own choice.
    Default,
    /// The input of this block, after its first normalization.
    At(usize),
    /// The block whose features classify held-out training samples best.
    Search,
}

impl ProbeLayer {
    /// Returns the number of a block that was given.
    pub fn fixed(self) -> Option<usize> {
        if let ProbeLayer::At(layer) = self { Some(layer) } else { None }
    }
}

impl FromStr for ProbeLayer {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "search" => Ok(ProbeLayer::Search),
            number => {
                number.parse().map(ProbeLayer::At).map_err(|_| "give the number of a block, or search".to_owned())
            }
        }
    }
}

/// Every this many samples of the training set one is held out.
const HELD_OUT: i64 = 10;

/// Fits the fast linear probe on the features of each layer of nine tenths of the training set, sets the extractor to
/// the layer that classifies the rest best, the first of several, and returns the accuracy of all layers; collective.
pub fn search(
    extractor: &mut FeatureExtractor,
    train: &Arc<Mixture>,
    name: &str,
    seed: u64,
    ranks: &mut Ranks,
) -> Result<Vec<f64>> {
    let mut accuracies: Vec<f64> = Vec::new();
    for layer in 0..=extractor.method.model().depth() {
        extractor.layer = Some(layer);
        let all =
            FeatureSet::extract(extractor, train, ranks, "layers of the training set")?.all_gather(ranks, name)?;
        let place = Tensor::arange(all.labels.numel() as i64, (Kind::Int64, all.labels.device())).remainder(HELD_OUT);
        let part = |chosen: Tensor| {
            let rows = chosen.nonzero().view(-1);
            let features = all.features.index_select(0, &rows);
            FeatureSet { features, labels: all.labels.index_select(0, &rows), skipped: 0 }
        };
        let held_out = part(place.eq(HELD_OUT - 1));
        let probe = LinearProbe::fit(&part(place.ne(HELD_OUT - 1)), seed, ranks)?;
        let correct = probe.predict(&held_out.features).eq_tensor(&held_out.labels);
        accuracies.push(correct.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]));
    }
    let best = (0..accuracies.len()).rev().max_by(|&a, &b| accuracies[a].total_cmp(&accuracies[b]));
    extractor.layer = best;
    Ok(accuracies)
}
