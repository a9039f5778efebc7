//! The vision transformer over visible tokens, or over all tokens with mask tokens inserted.

use super::block::StackOptions;
use super::position::Positions;
use super::stack::Stack;
use super::{EncodeOptions, Features};
use crate::error::Result;
use crate::grid::Grid;
use crate::op::patch::gather;
use crate::op::sizes;
use crate::op::tokens::{TokenLayout, assemble_tokens};
use crate::part::batch::Batch;
use crate::part::mask::Mask;
use crate::part::params::{Init, LayerNorm, Linear, ParamId, ParamSpecs, Weights};
use crate::part::patchify::Patchify;
use crate::part::step::Step;
use tch::{Kind, Tensor};

pub use super::shape::Shape;

/// Options of an encoder besides its shape.
pub struct VitOptions {
    /// Prepends a class token to the patches.
    pub class_token: bool,
    /// Inserts mask tokens at hidden positions instead of encoding the visible patches alone.
    pub mask_tokens_in_encoder: bool,
    /// Initializer of the patch embedding's weight.
    pub embed_init: Init,
    /// Initializer of the patch embedding's bias; by default PyTorch's, uniform within ±1/√(fan in), as in MAE's code.
    pub embed_bias_init: Option<Init>,
    /// Initializer of class and mask tokens.
    pub token_init: Init,
    pub blocks: StackOptions,
    pub positions: PositionTable,
}

/// Positions of an encoder.
pub enum PositionTable {
    /// Fixed positions of the patches, fp32 [N, D]; the class token has none.
    Fixed(Tensor),
    /// Learned positions `<name>.positions` of the class token and the patches.
    Learned(LearnedPositions),
}

/// Options of learned positions.
#[derive(Clone, Copy, Debug)]
pub struct LearnedPositions {
    pub init: Init,
    pub weight_decay: bool,
    /// Normalizes the sum before the blocks, `<name>.norm_pre` (Radford et al., 2021, section 2.4).
    pub norm_pre: bool,
}

impl VitOptions {
    /// Neither class token nor mask tokens, Xavier-uniform patch embedding, biases of queries, keys and values.
    pub fn new(positions: Tensor) -> VitOptions {
        VitOptions::with_positions(PositionTable::Fixed(positions))
    }

    /// The same with any positions.
    pub fn with_positions(positions: PositionTable) -> VitOptions {
        VitOptions {
            class_token: false,
            mask_tokens_in_encoder: false,
            embed_init: Init::Xavier,
            embed_bias_init: None,
            token_init: Init::Normal(0.02),
            blocks: StackOptions::default(),
            positions,
        }
    }
}

/// The positions of an encoder as it adds them.
enum VitPositions {
    Fixed(Positions),
    Learned { table: ParamId, norm_pre: Option<LayerNorm> },
}

/// A vision transformer.
pub struct Vit {
    embed: Linear,
    pub class_token: Option<ParamId>,
    /// Present if the encoder sees mask tokens.
    mask_token: Option<ParamId>,
    positions: VitPositions,
    pub stack: Stack,
}

impl Vit {
    /// Declares `<name>.embed`, `<name>.cls_token`, `<name>.mask_token`, `<name>.positions` and `<name>.norm_pre` if
    /// present, `<name>.blocks.<i>` and `<name>.norm`.
    pub fn new(params: &mut ParamSpecs, name: &str, grid: &Grid, shape: &Shape, options: VitOptions) -> Self {
        let width = shape.width;
        let inputs = grid.patch_values();
        let bias_init = options.embed_bias_init.unwrap_or(Init::Uniform(1.0 / (inputs as f64).sqrt()));
        let embed = Linear::with_init(params, &format!("{name}.embed"), inputs, width, options.embed_init, bias_init);
        let mut token = |kind| params.add(format!("{name}.{kind}_token"), &[1, 1, width], options.token_init);
        let class_token = options.class_token.then(|| token("cls"));
        let mask_token = options.mask_tokens_in_encoder.then(|| token("mask"));
        let stack = Stack::new(params, name, shape, &options.blocks);
        let positions = match options.positions {
            PositionTable::Fixed(table) => VitPositions::Fixed(table.into()),
            PositionTable::Learned(LearnedPositions { init, weight_decay, norm_pre }) => {
                let rows = i64::from(options.class_token) + grid.tokens();
                let table = params.add(format!("{name}.positions"), &[rows, width], init);
                if !weight_decay {
                    params.no_weight_decay(table);
                }
                let norm_pre = norm_pre.then(|| LayerNorm::new(params, &format!("{name}.norm_pre"), width));
                VitPositions::Learned { table, norm_pre }
            }
        };
        Vit { embed, class_token, mask_token, positions, stack }
    }

    /// Replaces fixed positions, fp32 [N, D].
    pub fn set_positions(&mut self, table: Tensor) {
        self.positions = VitPositions::Fixed(table.into());
    }

    /// patches [B, K, P] of the visible tokens → features, the class token first if there is one: [B, 1+K, D], or with
    /// mask tokens at hidden positions [B, 1+N, D], in the order class, visible, hidden.
    pub fn forward(&self, w: &Weights, patches: &Tensor, mask: &Mask) -> Result<Tensor> {
        self.forward_from(w, patches, mask, 0)
    }

    /// The same for the tokens from `from` on; the last block computes no others.
    pub fn forward_from(&self, w: &Weights, patches: &Tensor, mask: &Mask, from: i64) -> Result<Tensor> {
        let tokens = self.assemble(w, patches, mask)?;
        let count = tokens.size()[1];
        self.stack.forward(w, tokens, from..count)
    }

    /// Returns the input of the blocks: class token, visible patches and mask tokens, with positions.
    fn assemble(&self, w: &Weights, patches: &Tensor, mask: &Mask) -> Result<Tensor> {
        let visible = self.embed.forward(w, patches)?; // [B, K, D]
        let class = self.class_token.map(|token| w[token].view(-1));
        let mask_token = self.mask_token.map(|token| w[token].view(-1));
        match &self.positions {
            VitPositions::Fixed(positions) => {
                let positions = positions.table(visible.device());
                let hidden = mask_token.as_ref().map(|token| (token, &mask.drop));
                assemble_tokens(
                    &visible,
                    class.as_ref(),
                    TokenLayout { positions: &positions, keep: &mask.keep, hidden },
                )
            }
            VitPositions::Learned { table, norm_pre } => {
                let tokens = TokenSet { visible, class, mask_token }.with_positions(&w[*table], mask);
                norm_pre.map_or(Ok(tokens.shallow_clone()), |norm| norm.forward(w, &tokens))
            }
        }
    }

    /// patches [B, K, P] of the visible tokens → features of all tokens that the encoder sees, as
    /// [`forward`](Self::forward) has them, at the input of block `layer` after its first normalization; by default after
    /// the final normalization.
    pub fn forward_to(&self, w: &Weights, patches: &Tensor, mask: &Mask, layer: Option<usize>) -> Result<Tensor> {
        self.stack.forward_to(w, self.assemble(w, patches, mask)?, layer.unwrap_or(self.stack.depth()))
    }

    /// Encodes the samples of a batch as the options say: the class token and the mean of the visible tokens.
    pub fn encode(&self, step: &Step, patchify: &Patchify, batch: &Batch, options: EncodeOptions) -> Result<Features> {
        let w = step.weights;
        let groups = patchify.groups(batch)?;
        let features = groups.iter().map(|group| {
            let x = group.batch.view();
            let mask = options.sample_mask(step, &group.grid, &group.batch)?;
            let patches = patchify.patches_at(x, &mask.keep, w.kind())?;
            let features = self.forward_to(w, &patches, &mask, options.layer)?.to_kind(Kind::Float);
            let class_tokens = i64::from(self.class_token.is_some());
            let mean = features.narrow(1, class_tokens, patches.size()[1]).mean_dim(1, false, Kind::Float);
            Ok(Features { class: self.class_token.map(|_| features.select(1, 0)), mean })
        });
        Ok(Features::from_groups(&groups, &features.collect::<Result<Vec<_>>>()?))
    }
}

/// Tokens that learned positions are added to.
struct TokenSet {
    /// [B, K, D].
    visible: Tensor,
    /// `[D]`.
    class: Option<Tensor>,
    /// `[D]`.
    mask_token: Option<Tensor>,
}

impl TokenSet {
    /// Returns class, visible and mask tokens plus their positions [1+N, D], the class token's first if there is one.
    fn with_positions(self, positions: &Tensor, mask: &Mask) -> Tensor {
        let [batch, _, width] = sizes(&self.visible);
        let class_tokens = i64::from(self.class.is_some());
        let expand = |token: &Tensor, count: i64| token.view([1, 1, width]).expand([batch, count, width], false);
        let mut tokens = vec![self.visible.shallow_clone()];
        let mut index = vec![&mask.keep + class_tokens];
        if let Some(class) = &self.class {
            tokens.insert(0, expand(class, 1));
            index.insert(0, mask.keep.narrow(1, 0, 1).zeros_like());
        }
        if let Some(mask_token) = &self.mask_token {
            tokens.push(expand(mask_token, mask.drop.size()[1]));
            index.push(&mask.drop + class_tokens);
        }
        let positions = positions.unsqueeze(0).expand([batch, positions.size()[0], width], false);
        Tensor::cat(&tokens, 1) + gather(&positions, &Tensor::cat(&index, 1))
    }
}
