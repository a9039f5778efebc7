//! C-MAE: Kong, Zhang, "Understanding Masked Image Modeling via Learning Occlusion Invariant Feature", CVPR 2023: the
//! siamese form of MAE with InfoNCE in place of the distance of pixels, views filled with mask tokens. This is our
//! reading: the paper has no code, its body was not within our reach, and the numbers of head and temperature are ours.
//! Agrees with the encoder and the decoder's blocks of `transformers`' ViTMAE (`tests/method/contrastive_mae.rs`).

use super::prelude::*;
use crate::part::cost;
use crate::part::loss::contrastive;
use crate::part::mask::random_keep;
use crate::part::masked_embedder::MaskedEmbedder;
use crate::part::projection;

/// The config's `method.contrastive_mae`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder of both views.
    pub encoder: Shape,
    /// Blocks over visible and mask tokens.
    pub decoder: Shape,
    /// Share of patches hidden from the first view.
    pub mask: Ratio,
    #[serde(default)]
    pub second_view: SecondView,
    /// Projection of the mean token to the embeddings that are compared.
    #[serde(default)]
    pub head: projection::Config,
    #[serde(default = "Config::temperature")]
    pub temperature: f64,
}

/// The config's `method.contrastive_mae.second_view`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SecondView {
    /// The patches that the first view hides.
    #[default]
    Complement,
    /// Another mask of the same ratio.
    Independent,
}

impl Config {
    fn temperature() -> f64 {
        0.2
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "contrastive_mae";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        self.mask.check(&format!("{at}.mask"), grid.tokens(), grid.visible(self.mask.ratio), 0.75)?;
        self.head.check(&format!("{at}.head"))?;
        check_number(&format!("{at}.temperature"), self.temperature, 1e-3..=1e3)?;
        check_image(at, grid)
    }
    fn requirements(&self) -> Requirements<'_> {
        Requirements { whole_batch: true, ..Requirements::default() }
    }
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(ContrastiveMae::new(self, input)?))
    }
}

/// C-MAE for one input shape.
pub struct ContrastiveMae {
    pub model: MaskedEmbedder,
    mask: RandomMask,
    config: Config,
}

impl ContrastiveMae {
    /// Builds the model.
    pub fn new(config: &Config, input: &InputConfig) -> Result<ContrastiveMae> {
        let patchify = Patchify::new(input)?;
        config.check("method.contrastive_mae", &patchify.grid)?;
        let positions = |shape: &Shape| position::grid_positions(&patchify.grid, shape.width, None);
        let encoder = VitOptions::new(positions(&config.encoder));
        let decoder = DecoderOptions::new(positions(&config.decoder));
        let model = MaskedEmbedder::new(patchify, &config.encoder, encoder, &config.decoder, decoder, config.head);
        let mask = RandomMask { ratio: config.mask.ratio, truncate_hidden: false };
        Ok(ContrastiveMae { model, mask, config: config.clone() })
    }
}

impl Method for ContrastiveMae {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let grid = self.model.patchify.grid;
        let mask = self.mask.sample(step, &grid, batch)?;
        let second = match self.config.second_view {
            SecondView::Complement => mask.complement(),
            SecondView::Independent => random_keep(&grid, self.visible(&grid), !batch.seed, &batch.keys),
        };
        let first = self.model.embed(step.weights, batch.view(), &mask)?; // [B, E]
        let second = self.model.embed(step.weights, batch.view(), &second)?; // [B, E]
        let scale = first.new_full([], 1.0 / self.config.temperature, (first.kind(), first.device()));
        let sum = contrastive(&first, &second, &scale, &step.ranks)?;
        Ok(LossOutput::term("contrast", sum, Per::Sample))
    }
    fn cost(&self, grid: &Grid, global_batch: u64) -> ModelCost {
        let visible = self.visible(grid);
        let second = if self.config.second_view == SecondView::Complement { grid.tokens() - visible } else { visible };
        let mut cost = self.model.cost(grid, visible);
        cost.parts.extend(self.model.cost(grid, second).parts);
        cost.parts.push(("loss", cost::info_nce(global_batch as i64, self.config.head.embed_dim)));
        cost
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { gathers: true, ..Capabilities::default() }
    }
}
