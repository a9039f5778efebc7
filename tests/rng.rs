//! Tests of the random number generator.

use crate::support::Outcome;
use occlude::rng::{Philox, Purpose, philox4x32_10};

crate::trials![philox_matches_the_published_vectors, an_order_is_a_permutation, each_purpose_has_its_own_stream];

/// The known-answer vectors that the authors of Philox publish with Random123 (kat_vectors, philox4x32 10).
fn philox_matches_the_published_vectors() -> Outcome {
    assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    assert_eq!(
        philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
    Ok(())
}

fn an_order_is_a_permutation() -> Outcome {
    let order = Philox::new(7, 11, 3, Purpose::Mask, 0).permutation(196);
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..196).collect::<Vec<u32>>());
    assert_ne!(order, sorted, "196 tokens left in place");
    Ok(())
}

fn each_purpose_has_its_own_stream() -> Outcome {
    let first = |seed, id, epoch, purpose, repeat| Philox::new(seed, id, epoch, purpose, repeat).next_u32();
    let base = first(1, 2, 3, Purpose::Mask, 0);
    for other in [
        first(2, 2, 3, Purpose::Mask, 0),
        first(1, 3, 3, Purpose::Mask, 0),
        first(1, 2, 4, Purpose::Mask, 0),
        first(1, 2, 3, Purpose::Crop, 0),
        first(1, 2, 3, Purpose::Mask, 1),
    ] {
        assert_ne!(base, other);
    }
    Ok(())
}
