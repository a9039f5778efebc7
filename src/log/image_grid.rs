//! Grids of small images with a heading over each column, for `pictures/`, TensorBoard and the report.

use crate::error::{Error, Result};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage};
use std::path::Path;

/// One image of a grid: 8-bit RGB, [height, width, 3].
#[derive(Clone, Debug)]
pub struct Tile {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Tile {
    /// Creates a tile from [height, width, 3] bytes.
    ///
    /// # Panics
    /// If the number of bytes does not match.
    pub fn from_rgb(width: u32, height: u32, pixels: Vec<u8>) -> Tile {
        assert_eq!(pixels.len(), width as usize * height as usize * 3, "a {width} x {height} RGB tile");
        Tile { width, height, pixels }
    }

    /// Creates a tile from [height, width] bytes, where 0 is black.
    ///
    /// # Panics
    /// If the number of bytes does not match.
    pub fn from_gray(width: u32, height: u32, pixels: &[u8]) -> Tile {
        assert_eq!(pixels.len(), width as usize * height as usize, "a {width} x {height} grayscale tile");
        Tile { width, height, pixels: pixels.iter().flat_map(|&value| [value; 3]).collect() }
    }
}

const BACKGROUND: Rgb<u8> = Rgb([255, 255, 255]);
const TEXT_COLOR: Rgb<u8> = Rgb([40, 44, 52]);
/// Pixels between tiles and around the grid.
const GAP: u32 = 6;
/// Minimum length in pixels of the longer side of the largest tile; tiles are scaled up by an integer to reach it.
const MIN_TILE_SIDE: u32 = 96;
/// Size in pixels of a glyph's cell: 5 by 7 pixels and one empty column.
const GLYPH: (u32, u32) = (6, 7);

/// Arranges tiles in rows and columns, each column under its heading.
///
/// Every tile is scaled by the same integer factor with nearest-neighbor interpolation, so that a 28-pixel digit is
/// visible and no pixel is interpolated. Rows may differ in length and tiles in size: a column is as wide as its widest
/// tile or its heading.
pub fn compose(headings: &[&str], rows: &[Vec<Tile>]) -> RgbImage {
    let max_side = rows.iter().flatten().map(|tile| tile.width.max(tile.height)).max().unwrap_or(1).max(1);
    let factor = MIN_TILE_SIDE.div_ceil(max_side);
    let text_scale = if max_side * factor >= 192 { 2 } else { 1 };
    let widths = column_widths(headings, rows, factor, text_scale);
    let heights: Vec<u32> =
        rows.iter().map(|row| row.iter().map(|tile| tile.height * factor).max().unwrap_or(0)).collect();
    let has_headings = headings.iter().any(|heading| !heading.is_empty());
    let top = if has_headings { GLYPH.1 * text_scale + 2 * GAP } else { GAP };
    let width = GAP + widths.iter().map(|width| width + GAP).sum::<u32>();
    let height = top + heights.iter().map(|height| height + GAP).sum::<u32>();
    let mut canvas = RgbImage::from_pixel(width, height, BACKGROUND);
    let lefts: Vec<u32> =
        widths.iter().scan(GAP, |left, width| Some(std::mem::replace(left, *left + width + GAP))).collect();
    for (left, heading) in lefts.iter().zip(headings) {
        draw_text(&mut canvas, *left, GAP, text_scale, heading);
    }
    let mut y = top;
    for (row, height) in rows.iter().zip(heights) {
        for (left, tile) in lefts.iter().zip(row) {
            paste(&mut canvas, *left, y, factor, tile);
        }
        y += height + GAP;
    }
    canvas
}

/// Returns the width of each column in pixels.
fn column_widths(headings: &[&str], rows: &[Vec<Tile>], factor: u32, text_scale: u32) -> Vec<u32> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0).max(headings.len());
    (0..columns)
        .map(|column| {
            let tile = rows.iter().filter_map(|row| row.get(column)).map(|tile| tile.width * factor).max();
            let heading = headings.get(column).map_or(0, |heading| text_width(heading) * text_scale);
            tile.unwrap_or(0).max(heading).max(1)
        })
        .collect()
}

fn paste(canvas: &mut RgbImage, left: u32, top: u32, factor: u32, tile: &Tile) {
    for y in 0..tile.height * factor {
        for x in 0..tile.width * factor {
            let offset = ((y / factor * tile.width + x / factor) * 3) as usize;
            let [red, green, blue] = [0, 1, 2].map(|channel| tile.pixels[offset + channel]);
            canvas.put_pixel(left + x, top + y, Rgb([red, green, blue]));
        }
    }
}

/// Encodes an image as a PNG file.
pub fn encode_png(image: &RgbImage) -> Vec<u8> {
    let mut out = Vec::new();
    let (width, height) = image.dimensions();
    let result = PngEncoder::new(&mut out).write_image(image.as_raw(), width, height, ExtendedColorType::Rgb8);
    result.expect("an RGB image is encoded in memory");
    out
}

/// Writes an image as a PNG file.
///
/// # Errors
/// [`ExitCode::Disk`](crate::error::ExitCode::Disk).
pub fn save_png(image: &RgbImage, path: &Path) -> Result<()> {
    std::fs::write(path, encode_png(image)).map_err(|error| Error::disk(path.display(), error))
}

/// Returns the width of a text in pixels at scale 1.
fn text_width(text: &str) -> u32 {
    (text.chars().count() as u32 * GLYPH.0).saturating_sub(1)
}

fn draw_text(canvas: &mut RgbImage, left: u32, top: u32, scale: u32, text: &str) {
    for (index, letter) in text.chars().enumerate() {
        let glyph_left = left + index as u32 * GLYPH.0 * scale;
        for (row, bits) in glyph(letter).into_iter().enumerate() {
            for column in (0..5).filter(|column| bits >> (4 - column) & 1 == 1) {
                for (y, x) in (0..scale).flat_map(|y| (0..scale).map(move |x| (y, x))) {
                    canvas.put_pixel(glyph_left + column * scale + x, top + row as u32 * scale + y, TEXT_COLOR);
                }
            }
        }
    }
}

/// Returns a glyph as seven rows of five bits, the highest bit on the left. A letter that the font lacks is an empty
/// box.
fn glyph(letter: char) -> [u8; 7] {
    const BOX: [u8; 7] = [31, 17, 17, 17, 17, 17, 31];
    FONT.iter().find(|(name, _)| *name == letter).map_or(BOX, |(_, rows)| *rows)
}

/// A bitmap font of printable ASCII.
#[rustfmt::skip]
const FONT: [(char, [u8; 7]); 88] = [
    (' ', [0, 0, 0, 0, 0, 0, 0]),
    ('A', [14, 17, 17, 31, 17, 17, 17]), ('B', [30, 17, 17, 30, 17, 17, 30]), ('C', [14, 17, 16, 16, 16, 17, 14]),
    ('D', [30, 17, 17, 17, 17, 17, 30]), ('E', [31, 16, 16, 30, 16, 16, 31]), ('F', [31, 16, 16, 30, 16, 16, 16]),
    ('G', [14, 17, 16, 23, 17, 17, 15]), ('H', [17, 17, 17, 31, 17, 17, 17]), ('I', [14, 4, 4, 4, 4, 4, 14]),
    ('J', [7, 2, 2, 2, 2, 18, 12]), ('K', [17, 18, 20, 24, 20, 18, 17]), ('L', [16, 16, 16, 16, 16, 16, 31]),
    ('M', [17, 27, 21, 21, 17, 17, 17]), ('N', [17, 25, 21, 19, 17, 17, 17]), ('O', [14, 17, 17, 17, 17, 17, 14]),
    ('P', [30, 17, 17, 30, 16, 16, 16]), ('Q', [14, 17, 17, 17, 21, 18, 13]), ('R', [30, 17, 17, 30, 20, 18, 17]),
    ('S', [15, 16, 16, 14, 1, 1, 30]), ('T', [31, 4, 4, 4, 4, 4, 4]), ('U', [17, 17, 17, 17, 17, 17, 14]),
    ('V', [17, 17, 17, 17, 17, 10, 4]), ('W', [17, 17, 17, 21, 21, 21, 10]), ('X', [17, 17, 10, 4, 10, 17, 17]),
    ('Y', [17, 17, 10, 4, 4, 4, 4]), ('Z', [31, 1, 2, 4, 8, 16, 31]),
    ('a', [0, 0, 14, 1, 15, 17, 15]), ('b', [16, 16, 30, 17, 17, 17, 30]), ('c', [0, 0, 14, 16, 16, 17, 14]),
    ('d', [1, 1, 15, 17, 17, 17, 15]), ('e', [0, 0, 14, 17, 31, 16, 14]), ('f', [6, 9, 8, 28, 8, 8, 8]),
    ('g', [0, 15, 17, 17, 15, 1, 14]), ('h', [16, 16, 22, 25, 17, 17, 17]), ('i', [4, 0, 12, 4, 4, 4, 14]),
    ('j', [2, 0, 6, 2, 2, 18, 12]), ('k', [16, 16, 18, 20, 24, 20, 18]), ('l', [12, 4, 4, 4, 4, 4, 14]),
    ('m', [0, 0, 26, 21, 21, 17, 17]), ('n', [0, 0, 22, 25, 17, 17, 17]), ('o', [0, 0, 14, 17, 17, 17, 14]),
    ('p', [0, 0, 30, 17, 30, 16, 16]), ('q', [0, 0, 13, 19, 15, 1, 1]), ('r', [0, 0, 22, 25, 16, 16, 16]),
    ('s', [0, 0, 15, 16, 14, 1, 30]), ('t', [8, 8, 28, 8, 8, 9, 6]), ('u', [0, 0, 17, 17, 17, 19, 13]),
    ('v', [0, 0, 17, 17, 17, 10, 4]), ('w', [0, 0, 17, 17, 21, 21, 10]), ('x', [0, 0, 17, 10, 4, 10, 17]),
    ('y', [0, 0, 17, 17, 15, 1, 14]), ('z', [0, 0, 31, 2, 4, 8, 31]),
    ('0', [14, 17, 19, 21, 25, 17, 14]), ('1', [4, 12, 4, 4, 4, 4, 14]), ('2', [14, 17, 1, 2, 4, 8, 31]),
    ('3', [31, 2, 4, 2, 1, 17, 14]), ('4', [2, 6, 10, 18, 31, 2, 2]), ('5', [31, 16, 30, 1, 1, 17, 14]),
    ('6', [6, 8, 16, 30, 17, 17, 14]), ('7', [31, 1, 2, 4, 8, 8, 8]), ('8', [14, 17, 17, 14, 17, 17, 14]),
    ('9', [14, 17, 17, 15, 1, 2, 12]),
    ('.', [0, 0, 0, 0, 0, 12, 12]), (',', [0, 0, 0, 0, 12, 4, 8]), (':', [0, 12, 12, 0, 12, 12, 0]),
    (';', [0, 12, 12, 0, 12, 4, 8]), ('-', [0, 0, 0, 31, 0, 0, 0]), ('_', [0, 0, 0, 0, 0, 0, 31]),
    ('/', [0, 1, 2, 4, 8, 16, 0]), ('%', [24, 25, 2, 4, 8, 19, 3]), ('(', [2, 4, 8, 8, 8, 4, 2]),
    (')', [8, 4, 2, 2, 2, 4, 8]), ('+', [0, 4, 4, 31, 4, 4, 0]), ('=', [0, 0, 31, 0, 31, 0, 0]),
    ('|', [4, 4, 4, 4, 4, 4, 4]), ('\'', [4, 4, 8, 0, 0, 0, 0]), ('"', [10, 10, 10, 0, 0, 0, 0]),
    ('#', [10, 10, 31, 10, 31, 10, 10]), ('<', [2, 4, 8, 16, 8, 4, 2]), ('>', [8, 4, 2, 1, 2, 4, 8]),
    ('[', [14, 8, 8, 8, 8, 8, 14]), (']', [14, 2, 2, 2, 2, 2, 14]), ('!', [4, 4, 4, 4, 0, 0, 4]),
    ('?', [14, 17, 1, 2, 4, 0, 4]), ('&', [12, 18, 20, 8, 21, 18, 13]), ('*', [0, 4, 21, 14, 21, 4, 0]),
    ('@', [14, 17, 1, 13, 21, 21, 14]),
];
