//! Windows of a grid: which tokens see each other where attention is local.

use crate::fault::{Fault, Result};
use tch::{Device, Kind, Tensor};

/// The windows of a grid of tokens. Every token stands in exactly one; tokens see each other where they share window and
/// region.
pub struct Windows {
    /// i32 [W, T]: the tokens of each window.
    pub(super) index: Tensor,
    /// i32 [W · T]: the region of each token.
    pub(super) region: Tensor,
    /// i64 [W · T]: the tokens in their order by windows, and where each token stands in that order.
    order: Tensor,
    places: Tensor,
    /// bool [W, T, T]: who sees whom in each window; none where all do.
    mask: Option<Tensor>,
}

impl Windows {
    /// Windows of size[0] × size[1] on a grid of grid[0] rows and grid[1] columns, row-major, moved by `shift` rows and
    /// columns: the first window begins at that row and column, and windows that reach over the grid's edge go on at the
    /// other, where their tokens form a region of their own (Swin Transformer, Liu et al., 2021, section 3.2 and figure
    /// 4).
    ///
    /// # Errors
    /// The user's, where windows do not divide the grid or a shift is not less than a window.
    pub fn new(grid: [i64; 2], size: [i64; 2], shift: [i64; 2], device: Device) -> Result<Self> {
        Windows::cut(grid, grid[0], size, shift, device)
    }

    /// The same on a grid of which only the first `there` rows are: nobody in them sees the others, whose tokens form
    /// regions of their own.
    ///
    /// # Errors
    /// As above.
    pub fn cut(grid: [i64; 2], there: i64, size: [i64; 2], shift: [i64; 2], device: Device) -> Result<Self> {
        for axis in 0..2 {
            let (grid, size, shift) = (grid[axis], size[axis], shift[axis]);
            if size < 1 || grid < 1 || grid % size != 0 || !(0..size).contains(&shift) {
                let axis = ["rows", "columns"][axis];
                return Err(Fault::usage(format!(
                    "windows of {size} {axis}, moved by {shift}, on a grid of {grid} {axis}: choose a size that divides \
                     the grid and a shift of 0 to {}",
                    size - 1
                )));
            }
        }
        let ([rows, columns], [height, width]) = (grid, size);
        let (mut order, mut region) = (Vec::new(), vec![0i32; (rows * columns) as usize]);
        for window in 0..(rows / height) * (columns / width) {
            for token in 0..height * width {
                let row = window / (columns / width) * height + token / width + shift[0];
                let column = window % (columns / width) * width + token % width + shift[1];
                let at = row % rows * columns + column % columns;
                let absent = i32::from(row % rows >= there) * 4;
                region[at as usize] = absent + i32::from(row >= rows) * 2 + i32::from(column >= columns);
                order.push(at);
            }
        }
        let order = Tensor::from_slice(&order);
        let region = Tensor::from_slice(&region);
        let of_window = region.index_select(0, &order).view([-1, height * width]);
        let mask = of_window.unsqueeze(2).eq_tensor(&of_window.unsqueeze(1));
        let whole = mask.all().int64_value(&[]) == 1;
        Ok(Windows {
            index: order.to_kind(Kind::Int).view([-1, height * width]).to_device(device),
            region: region.to_device(device),
            places: order.argsort(0, false).to_device(device),
            order: order.to_device(device),
            mask: (!whole).then(|| mask.to_device(device)),
        })
    }

    /// Another handle of the same.
    pub fn shallow_clone(&self) -> Windows {
        let [index, region, order, places] =
            [&self.index, &self.region, &self.order, &self.places].map(Tensor::shallow_clone);
        Windows { index, region, order, places, mask: self.mask.as_ref().map(Tensor::shallow_clone) }
    }

    /// How many.
    pub fn count(&self) -> i64 {
        self.index.size()[0]
    }

    /// Tokens of each.
    pub fn size(&self) -> i64 {
        self.index.size()[1]
    }

    /// x [B, W · T, ..] in the grid's order → [B · W, T, ..].
    pub(super) fn gather(&self, x: &Tensor) -> Tensor {
        let width = x.size()[2];
        x.index_select(1, &self.order).view([-1, self.size(), width])
    }

    /// [B · W, T, ..] → [B, W · T, ..] in the grid's order.
    pub(super) fn scatter(&self, x: &Tensor) -> Tensor {
        let width = x.size()[2];
        x.view([-1, self.count() * self.size(), width]).index_select(1, &self.places)
    }

    /// bool [B · W, 1, T, T]: who sees whom; none where all do.
    pub(super) fn mask(&self, batch: i64) -> Option<Tensor> {
        self.mask.as_ref().map(|mask| mask.repeat([batch, 1, 1]).unsqueeze(1))
    }

    /// i64 [S]: where in its window each token stands.
    pub(super) fn place(&self) -> Tensor {
        self.places.remainder(self.size())
    }

    /// bool [S, S]: which token of the grid sees which.
    pub(super) fn sight(&self) -> Tensor {
        let window = self.places.floor_divide_scalar(self.size());
        let same = |of: &Tensor| of.unsqueeze(1).eq_tensor(&of.unsqueeze(0));
        same(&window).logical_and(&same(&self.region))
    }
}
