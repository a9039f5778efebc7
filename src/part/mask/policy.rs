//! Mask policies: which tokens of each sample a method hides. A policy is a value that a method owns; what it hides
//! depends on the sample's key, never on the rank.

use super::{Mask, can_sample_on_device};
use crate::error::Result;
use crate::grid::Grid;
use crate::op::shuffle::MaskPlan;
use crate::part::batch::Batch;
use crate::part::step::Step;
use tch::Tensor;

/// Chooses the visible tokens of samples.
pub trait MaskPolicy {
    /// Returns K, the number of visible tokens of a sample that fills this grid; the same for every sample.
    fn visible(&self, grid: &Grid) -> i64;

    /// Samples the mask of a batch of which every sample fills this grid.
    ///
    /// # Errors
    /// ExitCode::Failed where a policy that is guided by a model cannot run it.
    fn sample(&self, step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask>;

    /// Says whether `sample` can be captured in a CUDA graph, or why not.
    fn can_capture(&self, grid: &Grid) -> Result<(), &'static str> {
        can_sample_on_device(grid.tokens())
    }
}

/// Hides random tokens, the same number in each sample (MAE §3, "random sampling"). K = ⌊N · (1 − ratio)⌋ as in the
/// official MAE code, or with `truncate_hidden` N − ⌊N · ratio⌋ as in OmniMAE's.
#[derive(Clone, Copy, Debug)]
pub struct RandomMask {
    pub ratio: f64,
    pub truncate_hidden: bool,
}

impl MaskPolicy for RandomMask {
    fn visible(&self, grid: &Grid) -> i64 {
        if self.truncate_hidden { grid.visible_ceil(self.ratio) } else { grid.visible(self.ratio) }
    }
    fn sample(&self, _step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        Ok(random_keep(grid, self.visible(grid), batch.seed, &batch.keys))
    }
}

/// Hides the same places in every time slot, so that no motionless patch can be looked up in another frame (VideoMAE
/// §3.3, "tube masking"; official `TubeMaskingGenerator`).
#[derive(Clone, Copy, Debug)]
pub struct TubeMask {
    /// Share of the places of a time slot that is hidden.
    pub ratio: f64,
}

impl MaskPolicy for TubeMask {
    fn visible(&self, grid: &Grid) -> i64 {
        grid.frames * grid.visible_per_frame(self.ratio)
    }
    fn sample(&self, _step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        let plan = MaskPlan::random(grid, [grid.frames, 1, 1], grid.visible_per_frame(self.ratio));
        Ok(Mask::sample(&plan.expect("no more places visible than there are"), batch.seed, &batch.keys))
    }
    fn can_capture(&self, grid: &Grid) -> Result<(), &'static str> {
        can_sample_on_device(grid.rows * grid.cols)
    }
}

/// One policy for images and one for clips.
#[derive(Clone, Copy, Debug)]
pub struct ByFrames<I, C> {
    pub image: I,
    pub clip: C,
}

impl<I: MaskPolicy, C: MaskPolicy> ByFrames<I, C> {
    fn policy(&self, grid: &Grid) -> &dyn MaskPolicy {
        if grid.frames > 1 { &self.clip } else { &self.image }
    }
}

impl<I: MaskPolicy, C: MaskPolicy> MaskPolicy for ByFrames<I, C> {
    fn visible(&self, grid: &Grid) -> i64 {
        self.policy(grid).visible(grid)
    }
    fn sample(&self, step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        self.policy(grid).sample(step, grid, batch)
    }
    fn can_capture(&self, grid: &Grid) -> Result<(), &'static str> {
        self.policy(grid).can_capture(grid)
    }
}

impl MaskPolicy for Box<dyn MaskPolicy> {
    fn visible(&self, grid: &Grid) -> i64 {
        self.as_ref().visible(grid)
    }
    fn sample(&self, step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        self.as_ref().sample(step, grid, batch)
    }
    fn can_capture(&self, grid: &Grid) -> Result<(), &'static str> {
        self.as_ref().can_capture(grid)
    }
}

/// Hides nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoMask;

impl MaskPolicy for NoMask {
    fn visible(&self, grid: &Grid) -> i64 {
        grid.tokens()
    }
    fn sample(&self, _step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        Ok(Mask::all_visible(batch.size(), grid.tokens(), batch.view().device()))
    }
    fn can_capture(&self, _grid: &Grid) -> Result<(), &'static str> {
        Ok(())
    }
}

/// Hides all but `visible` random tokens of each sample of `keys`, int64 [3, B].
pub fn random_keep(grid: &Grid, visible: i64, seed: u64, keys: &Tensor) -> Mask {
    let plan = MaskPlan::random(grid, [1, 1, 1], visible).expect("no more tokens visible than there are");
    Mask::sample(&plan, seed, keys)
}
