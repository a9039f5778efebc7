//! EXIF's orientation: how the stored picture must be turned to stand upright.

use super::{Region, fit};
use image::metadata::Orientation;

/// One of the eight: first the axes may be swapped, then each stored axis may run backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    swap: bool,
    /// Whether columns (x) and rows (y) are stored from the far end.
    back: [bool; 2],
}

impl From<Option<Orientation>> for Turn {
    /// None is upright. The numbers are EXIF's (CIPA DC-008, tag 0x0112).
    fn from(orientation: Option<Orientation>) -> Self {
        let number = orientation.map_or(1, Orientation::to_exif);
        Turn { swap: number >= 5, back: [matches!(number, 2 | 3 | 7 | 8), matches!(number, 3 | 4 | 6 | 7)] }
    }
}

impl Turn {
    fn swapped<T>(self, [x, y]: [T; 2]) -> [T; 2] {
        if self.swap { [y, x] } else { [x, y] }
    }

    /// Width and height as stored → upright, and the other way.
    pub fn size(self, size: [u32; 2]) -> [u32; 2] {
        self.swapped(size)
    }

    /// An upright region, in the stored picture of that `size`.
    pub fn stored(self, region: Region, size: [u32; 2]) -> Region {
        let [width, height] = self.swapped([region.width, region.height]);
        let [x, y] = self.swapped([region.left, region.top]);
        let left = if self.back[0] { size[0] - x - width } else { x };
        let top = if self.back[1] { size[1] - y - height } else { y };
        Region { left, top, width, height }
    }

    /// A box [left, top, width, height] in stored pixels of that `size`, upright.
    pub fn place(self, [left, top, width, height]: [f64; 4], size: [u32; 2]) -> [f64; 4] {
        let x = if self.back[0] { f64::from(size[0]) - left - width } else { left };
        let y = if self.back[1] { f64::from(size[1]) - top - height } else { top };
        let ([left, top], [width, height]) = (self.swapped([x, y]), self.swapped([width, height]));
        [left, top, width, height]
    }

    /// Stored pixels [height, width, channels] of that `size` → upright; what stands upright changes places with `out`.
    pub fn pixels(self, stored: &mut Vec<u8>, size: [u32; 2], channels: usize, out: &mut Vec<u8>) {
        if self == Turn::from(None) {
            std::mem::swap(stored, out);
            return;
        }
        fit(out, stored.len());
        match channels {
            1 => self.copy::<1>(stored, size, out),
            _ => self.copy::<3>(stored, size, out),
        }
    }

    fn copy<const C: usize>(self, stored: &[u8], size: [u32; 2], out: &mut [u8]) {
        let [width, height] = size.map(|side| side as usize);
        // Where the first upright pixel is stored, and how far the next one is along each stored axis.
        let start = if self.back[0] { width - 1 } else { 0 } + if self.back[1] { (height - 1) * width } else { 0 };
        let along = |axis: usize, far: isize| if self.back[axis] { -far } else { far };
        let [right, down] = self.swapped([along(0, 1), along(1, width as isize)]);
        let columns = self.swapped([width, height])[0];
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
