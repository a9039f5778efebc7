//! Converts interleaved channels to planes, with an optional horizontal flip.

/// Converts `pixels` [Y, X, C] to `out` [C, Y, X], C = 1 or 3. `width` is X; `flip` mirrors left to right.
pub fn to_planar(pixels: &[u8], channels: usize, width: usize, flip: bool, out: &mut [u8]) {
    assert_eq!(pixels.len(), out.len(), "bytes of pixels and of planes");
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
    if flip {
        out.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
}
