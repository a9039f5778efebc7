//! Grids of small pictures with a heading over each column, for `pictures/`, TensorBoard and the report.

use crate::fault::{Fault, Result};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage};
use std::path::Path;

/// One picture of a grid: 8-bit, row-major, channels last.
#[derive(Clone, Debug)]
pub struct Tile {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Tile {
    /// From [height, width, 3] bytes.
    ///
    /// # Panics
    /// Where the number of bytes is another.
    pub fn rgb(width: u32, height: u32, pixels: Vec<u8>) -> Tile {
        assert_eq!(pixels.len(), width as usize * height as usize * 3, "a {width} x {height} RGB tile");
        Tile { width, height, pixels }
    }

    /// From [height, width] bytes, 0 black.
    ///
    /// # Panics
    /// Where the number of bytes is another.
    pub fn grey(width: u32, height: u32, pixels: &[u8]) -> Tile {
        assert_eq!(pixels.len(), width as usize * height as usize, "a {width} x {height} grey tile");
        Tile { width, height, pixels: pixels.iter().flat_map(|&value| [value; 3]).collect() }
    }
}

const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
const INK: Rgb<u8> = Rgb([40, 44, 52]);
/// Pixels between tiles and around the grid.
const GAP: u32 = 6;
/// The longer side of the largest tile is scaled by whole factors until it has at least this many pixels.
const VISIBLE: u32 = 96;
/// A glyph's cell: 5 by 7 pixels and one column of air.
const GLYPH: (u32, u32) = (6, 7);

/// The tiles in rows and columns, each column under its heading. Every tile is scaled by the same whole factor
/// (nearest neighbour), so that a 28-pixel digit is visible and no pixel is invented. Rows may differ in length and
/// tiles in size: a column is as wide as its widest tile or its heading.
pub fn grid(headings: &[&str], rows: &[Vec<Tile>]) -> RgbImage {
    let tiles = || rows.iter().flatten();
    let longest = tiles().map(|tile| tile.width.max(tile.height)).max().unwrap_or(1).max(1);
    let factor = VISIBLE.div_ceil(longest);
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0).max(headings.len());
    let text = if longest * factor >= 192 { 2 } else { 1 };
    let widths: Vec<u32> = (0..columns)
        .map(|column| {
            let widest = rows.iter().filter_map(|row| row.get(column)).map(|tile| tile.width * factor).max();
            let heading = headings.get(column).map_or(0, |heading| text_width(heading) * text);
            widest.unwrap_or(0).max(heading).max(1)
        })
        .collect();
    let heights: Vec<u32> =
        rows.iter().map(|row| row.iter().map(|tile| tile.height * factor).max().unwrap_or(0)).collect();
    let top = if headings.iter().all(|heading| heading.is_empty()) { GAP } else { GLYPH.1 * text + 2 * GAP };
    let width = GAP + widths.iter().map(|width| width + GAP).sum::<u32>();
    let height = top + heights.iter().map(|height| height + GAP).sum::<u32>();
    let mut sheet = RgbImage::from_pixel(width, height, PAPER);
    let lefts: Vec<u32> =
        widths.iter().scan(GAP, |left, width| Some(std::mem::replace(left, *left + width + GAP))).collect();
    for (left, heading) in lefts.iter().zip(headings) {
        write_text(&mut sheet, *left, GAP, text, heading);
    }
    let mut y = top;
    for (row, height) in rows.iter().zip(heights) {
        for (left, tile) in lefts.iter().zip(row) {
            paste(&mut sheet, *left, y, factor, tile);
        }
        y += height + GAP;
    }
    sheet
}

fn paste(sheet: &mut RgbImage, left: u32, top: u32, factor: u32, tile: &Tile) {
    for y in 0..tile.height * factor {
        for x in 0..tile.width * factor {
            let at = ((y / factor * tile.width + x / factor) * 3) as usize;
            sheet.put_pixel(left + x, top + y, Rgb([tile.pixels[at], tile.pixels[at + 1], tile.pixels[at + 2]]));
        }
    }
}

/// The picture as a PNG file's bytes.
pub fn png(picture: &RgbImage) -> Vec<u8> {
    let mut out = Vec::new();
    let (width, height) = picture.dimensions();
    let written = PngEncoder::new(&mut out).write_image(picture.as_raw(), width, height, ExtendedColorType::Rgb8);
    written.expect("a whole RGB picture is encoded in memory");
    out
}

/// Writes the picture as a PNG file.
///
/// # Errors
/// [`Code::Disk`](crate::fault::Code::Disk).
pub fn save_png(picture: &RgbImage, path: &Path) -> Result<()> {
    std::fs::write(path, png(picture)).map_err(|error| Fault::disk(path.display(), error))
}

/// Width of a text in pixels at scale 1.
fn text_width(text: &str) -> u32 {
    (text.chars().count() as u32 * GLYPH.0).saturating_sub(1)
}

fn write_text(sheet: &mut RgbImage, left: u32, top: u32, scale: u32, text: &str) {
    for (number, letter) in text.chars().enumerate() {
        let at = left + number as u32 * GLYPH.0 * scale;
        for (row, bits) in glyph(letter).into_iter().enumerate() {
            for column in (0..5).filter(|column| bits >> (4 - column) & 1 == 1) {
                for (y, x) in (0..scale).flat_map(|y| (0..scale).map(move |x| (y, x))) {
                    sheet.put_pixel(at + column * scale + x, top + row as u32 * scale + y, INK);
                }
            }
        }
    }
}

/// Seven rows of five bits, the highest to the left. A letter that the face lacks is an empty box.
fn glyph(letter: char) -> [u8; 7] {
    const BOX: [u8; 7] = [31, 17, 17, 17, 17, 17, 31];
    FACE.iter().find(|(name, _)| *name == letter).map_or(BOX, |(_, rows)| *rows)
}

#[rustfmt::skip]
const FACE: [(char, [u8; 7]); 88] = [
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
