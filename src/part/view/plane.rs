//! Pixel by pixel → plane by plane, mirrored on the way where asked.

/// [Y, X, C] of `pixels` → [C, Y, X] in `out`, for 1 or 3 channels; rows of `width` pixels, mirrored left to right or
/// not.
pub fn planes(pixels: &[u8], channels: usize, width: usize, mirror: bool, out: &mut [u8]) {
    assert_eq!(pixels.len(), out.len(), "bytes of a view");
    match channels {
        1 => out.copy_from_slice(pixels),
        3 => {
            let (red, rest) = out.split_at_mut(pixels.len() / 3);
            let (green, blue) = rest.split_at_mut(pixels.len() / 3);
            for (((pixel, red), green), blue) in pixels.as_chunks::<3>().0.iter().zip(red).zip(green).zip(blue) {
                [*red, *green, *blue] = *pixel;
            }
        }
        other => unreachable!("{other} channels"),
    }
    if mirror {
        out.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
}
