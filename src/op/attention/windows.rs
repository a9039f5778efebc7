//! Windows of a grid: which tokens attend to each other in local attention.

use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// The windows of a grid of tokens. Every token belongs to exactly one window; tokens attend to each other if they
/// share window and region.
pub struct Windows {
    /// The tokens of each window, i32 [W, T].
    pub(super) index: Tensor,
    /// The region of each token, i32 [W · T].
    pub(super) region: Tensor,
    /// The tokens in window order, i64 [W · T].
    order: Tensor,
    /// The position of each token in `order`, i64 [W · T].
    inverse_order: Tensor,
    /// Which tokens of a window attend to which, bool [W, T, T]; `None` if all do.
    mask: Option<Tensor>,
}

impl Windows {
    /// Windows of `size[0]` × `size[1]` on a grid of `grid[0]` rows and `grid[1]` columns, row-major, shifted by
    /// `shift` rows and columns. Windows that cross the edge of the grid wrap around, and the wrapped tokens form a
    /// region of their own (Swin Transformer, Liu et al., 2021, section 3.2 and figure 4).
    ///
    /// # Errors
    /// A usage error if the windows do not divide the grid or the shift is not smaller than a window.
    pub fn new(grid: [i64; 2], size: [i64; 2], shift: [i64; 2], device: Device) -> Result<Self> {
        Windows::with_valid_rows(grid, grid[0], size, shift, device)
    }

    /// Windows of a grid of which only the first `valid_rows` rows hold tokens: the other rows are padding, which forms
    /// regions of its own.
    ///
    /// # Errors
    /// The same as [`Windows::new`].
    pub fn with_valid_rows(
        grid: [i64; 2],
        valid_rows: i64,
        size: [i64; 2],
        shift: [i64; 2],
        device: Device,
    ) -> Result<Self> {
        check(grid, size, shift)?;
        let [rows, columns] = grid;
        let [height, width] = size;
        let mut order = Vec::new();
        let mut region = vec![0i32; (rows * columns) as usize];
        for window in 0..(rows / height) * (columns / width) {
            for token in 0..height * width {
                let row = window / (columns / width) * height + token / width + shift[0];
                let column = window % (columns / width) * width + token % width + shift[1];
                let index = row % rows * columns + column % columns;
                let padding_region = i32::from(row % rows >= valid_rows) * 4;
                region[index as usize] = padding_region + i32::from(row >= rows) * 2 + i32::from(column >= columns);
                order.push(index);
            }
        }
        let order = Tensor::from_slice(&order);
        let region = Tensor::from_slice(&region);
        let by_window = region.index_select(0, &order).view([-1, height * width]);
        let mask = by_window.unsqueeze(2).eq_tensor(&by_window.unsqueeze(1));
        let is_full = mask.all().int64_value(&[]) == 1;
        Ok(Windows {
            index: order.to_kind(Kind::Int).view([-1, height * width]).to_device(device),
            region: region.to_device(device),
            inverse_order: order.argsort(0, false).to_device(device),
            order: order.to_device(device),
            mask: (!is_full).then(|| mask.to_device(device)),
        })
    }

    /// Returns windows that share these tensors.
    pub fn shallow_clone(&self) -> Windows {
        Windows {
            index: self.index.shallow_clone(),
            region: self.region.shallow_clone(),
            order: self.order.shallow_clone(),
            inverse_order: self.inverse_order.shallow_clone(),
            mask: self.mask.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// Number of windows, W.
    pub fn count(&self) -> i64 {
        self.index.size()[0]
    }

    /// Tokens per window, T.
    pub fn size(&self) -> i64 {
        self.index.size()[1]
    }

    /// x [B, W · T, ..] in grid order → [B · W, T, ..].
    pub(super) fn gather(&self, x: &Tensor) -> Tensor {
        let width = x.size()[2];
        x.index_select(1, &self.order).view([-1, self.size(), width])
    }

    /// [B · W, T, ..] → [B, W · T, ..] in grid order.
    pub(super) fn scatter(&self, x: &Tensor) -> Tensor {
        let width = x.size()[2];
        x.view([-1, self.count() * self.size(), width]).index_select(1, &self.inverse_order)
    }

    /// Returns which tokens attend to which, bool [B · W, 1, T, T]; `None` if all do.
    pub(super) fn attention_mask(&self, batch: i64) -> Option<Tensor> {
        self.mask.as_ref().map(|mask| mask.repeat([batch, 1, 1]).unsqueeze(1))
    }

    /// Returns the position of each token in its window, i64 `[S]`.
    pub(super) fn position_in_window(&self) -> Tensor {
        self.inverse_order.remainder(self.size())
    }

    /// Returns which tokens of the grid attend to which, bool [S, S].
    pub(super) fn visibility(&self) -> Tensor {
        let window = self.inverse_order.floor_divide_scalar(self.size());
        pairwise_equal(&window).logical_and(&pairwise_equal(&self.region))
    }
}

/// x `[S]` → bool [S, S].
fn pairwise_equal(x: &Tensor) -> Tensor {
    x.unsqueeze(1).eq_tensor(&x.unsqueeze(0))
}

fn check(grid: [i64; 2], size: [i64; 2], shift: [i64; 2]) -> Result<()> {
    for axis in 0..2 {
        let name = ["rows", "columns"][axis];
        let length = grid[axis];
        let size = size[axis];
        let shift = shift[axis];
        if size < 1 || length < 1 || length % size != 0 || !(0..size).contains(&shift) {
            return Err(Error::usage(format!(
                "windows of {size} {name}, shifted by {shift}, on a grid of {length} {name}: choose a size that divides \
                 the grid and a shift of 0 to {}",
                size - 1
            )));
        }
    }
    Ok(())
}
