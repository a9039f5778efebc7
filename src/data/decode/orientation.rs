//! EXIF orientation: the rotation and reflection that makes a stored image upright.

use super::{Region, resize_buffer};
use image::metadata::Orientation;

/// One of the eight EXIF orientations: the axes may be swapped, then each stored axis may be reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExifOrientation {
    swap_axes: bool,
    /// True if columns (x) are stored in reverse.
    reverse_x: bool,
    /// True if rows (y) are stored in reverse.
    reverse_y: bool,
}

impl From<Option<Orientation>> for ExifOrientation {
    /// Converts from EXIF's numbers (CIPA DC-008, tag 0x0112); none is upright.
    fn from(orientation: Option<Orientation>) -> Self {
        let number = orientation.map_or(1, Orientation::to_exif);
        ExifOrientation {
            swap_axes: number >= 5,
            reverse_x: matches!(number, 2 | 3 | 7 | 8),
            reverse_y: matches!(number, 3 | 4 | 6 | 7),
        }
    }
}

impl ExifOrientation {
    fn swap<T>(self, [x, y]: [T; 2]) -> [T; 2] {
        if self.swap_axes { [y, x] } else { [x, y] }
    }

    /// Converts width and height from stored to upright, or back.
    pub fn orient_size(self, size: [u32; 2]) -> [u32; 2] {
        self.swap(size)
    }

    /// Converts an upright region to coordinates of the stored image of that `size`.
    pub fn to_stored(self, region: Region, size: [u32; 2]) -> Region {
        let [width, height] = self.swap([region.width, region.height]);
        let [x, y] = self.swap([region.left, region.top]);
        let left = if self.reverse_x { size[0] - x - width } else { x };
        let top = if self.reverse_y { size[1] - y - height } else { y };
        Region { left, top, width, height }
    }

    /// Converts a box [left, top, width, height] of the stored image of that `size` to upright coordinates.
    pub fn to_upright(self, [left, top, width, height]: [f64; 4], size: [u32; 2]) -> [f64; 4] {
        let x = if self.reverse_x { f64::from(size[0]) - left - width } else { left };
        let y = if self.reverse_y { f64::from(size[1]) - top - height } else { top };
        let [left, top] = self.swap([x, y]);
        let [width, height] = self.swap([width, height]);
        [left, top, width, height]
    }

    /// Converts stored pixels [height, width, channels] of that `size` to upright ones in `out`. Pixels that are
    /// upright already are swapped with `out` instead of copied.
    pub fn orient_pixels(self, stored: &mut Vec<u8>, size: [u32; 2], channels: usize, out: &mut Vec<u8>) {
        if self == ExifOrientation::from(None) {
            std::mem::swap(stored, out);
            return;
        }
        resize_buffer(out, stored.len());
        match channels {
            1 => self.copy::<1>(stored, size, out),
            _ => self.copy::<3>(stored, size, out),
        }
    }

    fn copy<const C: usize>(self, stored: &[u8], size: [u32; 2], out: &mut [u8]) {
        let [width, height] = size.map(|side| side as usize);
        // Index of the first upright pixel in the stored image, and the strides to its right and lower neighbors.
        let first_x = if self.reverse_x { width - 1 } else { 0 };
        let first_y = if self.reverse_y { height - 1 } else { 0 };
        let start = first_y * width + first_x;
        let x_stride = if self.reverse_x { -1 } else { 1 };
        let y_stride = if self.reverse_y { -(width as isize) } else { width as isize };
        let [right, down] = self.swap([x_stride, y_stride]);
        let columns = self.swap([width, height])[0];
        let (stored, _) = stored.as_chunks::<C>();
        let (out, _) = out.as_chunks_mut::<C>();
        for (y, row) in out.chunks_exact_mut(columns).enumerate() {
            let first = start as isize + y as isize * down;
            for (x, pixel) in row.iter_mut().enumerate() {
                *pixel = stored[(first + x as isize * right) as usize];
            }
        }
    }
}
