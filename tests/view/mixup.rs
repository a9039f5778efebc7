//! Tests of batch augmentation: erasing, mixup, CutMix.

use crate::support::{Outcome, normal};
use occlude::data::decode::Region;
use occlude::op::shuffle::SampleKey;
use occlude::rng::{Philox, Purpose};
use occlude::view::erase::Erase;
use occlude::view::mixup::{Mixup, MixupDraw, sample_beta};
use tch::{Kind, Tensor};

crate::trials![
    erasing_depends_only_on_the_sample,
    erasing_uses_the_same_box_in_every_frame_of_a_clip,
    erased_pixels_become_standard_normal_noise,
    beta_samples_have_the_right_mean_and_variance,
    mixing_depends_only_on_the_step,
    cutmix_keeps_the_stated_fraction,
    clips_and_single_rows_are_mixed,
    invalid_settings_are_rejected,
];

fn origin(id: u64) -> SampleKey {
    SampleKey { id, epoch: 3, repeat: 0 }
}

fn erasing_depends_only_on_the_sample() -> Outcome {
    let erase = Erase { probability: 0.5, ..Erase::default() };
    let samples = normal(1, &[40, 3, 20, 30]);
    let full = samples.copy();
    erase.apply(&full, 7, &(0..40).map(origin).collect::<Vec<_>>());
    // The same samples, in reverse order and a few at a time.
    for start in (0..40).step_by(5) {
        let ids: Vec<i64> = (start..start + 5).rev().collect();
        let part = samples.index_select(0, &Tensor::from_slice(&ids));
        erase.apply(&part, 7, &ids.iter().map(|&id| origin(id as u64)).collect::<Vec<_>>());
        assert_eq!(part, full.index_select(0, &Tensor::from_slice(&ids)));
    }
    let erased = (0..40).filter(|&row| full.get(row) != samples.get(row)).count();
    assert!((8..=32).contains(&erased), "{erased} of 40 erased, 20 expected");
    let later = samples.copy();
    erase.apply(&later, 7, &(0..40).map(|id| SampleKey { epoch: 4, ..origin(id) }).collect::<Vec<_>>());
    assert_ne!(later, full, "another epoch erased the same regions");
    Ok(())
}

fn erasing_uses_the_same_box_in_every_frame_of_a_clip() -> Outcome {
    let erase = Erase { probability: 1.0, ..Erase::default() };
    let clip = Tensor::full([1, 3, 4, 24, 24], 9.0, (Kind::Float, tch::Device::Cpu));
    erase.apply(&clip, 1, &[origin(5)]);
    let erased = clip.ne(9.0).view([12, 24 * 24]);
    let area = erased.get(0).sum(Kind::Int64).int64_value(&[]);
    assert!((576 / 60..576 / 2).contains(&area), "{area} of 576 pixels erased");
    for plane in 1..12 {
        assert_eq!(erased.get(plane), erased.get(0), "plane {plane}");
    }
    let frames = clip.view([3, 4, 24, 24]);
    assert_ne!(frames.select(1, 0), frames.select(1, 1), "two frames got the same noise");
    Ok(())
}

fn erased_pixels_become_standard_normal_noise() -> Outcome {
    let erase = Erase { probability: 1.0, ..Erase::default() };
    let batch = Tensor::full([30, 3, 32, 32], 50.0, (Kind::Float, tch::Device::Cpu));
    erase.apply(&batch, 1, &(0..30).map(origin).collect::<Vec<_>>());
    let noise = batch.masked_select(&batch.ne(50.0));
    let count = noise.numel() as f64;
    let mean = noise.mean(Kind::Double).double_value(&[]);
    let deviation = noise.std(true).double_value(&[]);
    assert!(count > 3000.0 && mean.abs() < 4.0 / count.sqrt(), "{count} values of mean {mean}");
    assert!((deviation - 1.0).abs() < 4.0 / (2.0 * count).sqrt(), "std {deviation}");
    Ok(())
}

fn beta_samples_have_the_right_mean_and_variance() -> Outcome {
    for (seed, alpha) in [(1, 0.1), (2, 0.8), (3, 1.0), (4, 7.5)] {
        let mut draw = Philox::new(seed, 0, 0, Purpose::Mixup, 0);
        let values: Vec<f64> = (0..20_000).map(|_| sample_beta(alpha, &mut draw)).collect();
        assert!(values.iter().all(|v| (0.0..=1.0).contains(v)));
        let mean = values.iter().sum::<f64>() / 20_000.0;
        let variance = values.iter().map(|v| (v - 0.5).powi(2)).sum::<f64>() / 20_000.0;
        let expected = 1.0 / (4.0 * (2.0 * alpha + 1.0));
        assert!((mean - 0.5).abs() < 4.0 * (expected / 20_000.0).sqrt(), "α {alpha}: mean {mean}");
        assert!((variance / expected - 1.0).abs() < 0.04, "α {alpha}: variance {variance}, expected {expected}");
    }
    // Beta(1, 1) is uniform.
    let mut draw = Philox::new(9, 0, 0, Purpose::Mixup, 0);
    let tenth = (0..20_000).filter(|_| sample_beta(1.0, &mut draw) < 0.1).count();
    assert!((1830..=2170).contains(&tenth), "{tenth} of 20,000 below 0.1");
    let mut draw = Philox::new(9, 0, 0, Purpose::Mixup, 0);
    assert!((0..2000).all(|_| sample_beta(1e-3, &mut draw).is_finite()), "a small α gave no number");
    Ok(())
}

fn mixing_depends_only_on_the_step() -> Outcome {
    let mix = Mixup { probability: 0.8, switch_probability: 0.25, ..Mixup::default() };
    let drawn: Vec<MixupDraw> = (0..4000).map(|step| mix.sample(1, step, 24, 16)).collect();
    assert_eq!(drawn[77], mix.sample(1, 77, 24, 16));
    assert_ne!(drawn[77], mix.sample(2, 77, 24, 16));
    let count = |kind: fn(&MixupDraw) -> bool| drawn.iter().filter(|one| kind(one)).count();
    let apart = count(|one| matches!(one, MixupDraw::Unmixed));
    let pasted = count(|one| matches!(one, MixupDraw::CutMix { .. }));
    // 800 and 800 expected, standard deviations 25.
    assert!((700..=900).contains(&apart) && (700..=900).contains(&pasted), "{apart} apart, {pasted} pasted");
    let only = |mixup, cutmix| Mixup { mixup_alpha: mixup, cutmix_alpha: cutmix, ..Mixup::default() };
    assert!((0..99).all(|step| matches!(only(0.8, 0.0).sample(1, step, 8, 8), MixupDraw::Mixup { .. })));
    assert!((0..99).all(|step| matches!(only(0.0, 1.0).sample(1, step, 8, 8), MixupDraw::CutMix { .. })));
    Ok(())
}

fn cutmix_keeps_the_stated_fraction() -> Outcome {
    // λ 0.75: half of each side; 32 × 20 around the middle gives 16 × 10, at a corner a quarter of that.
    let middle = MixupDraw::cutmix(32, 20, 0.75, [16, 10]);
    let corner = MixupDraw::cutmix(32, 20, 0.75, [0, 0]);
    assert_eq!(middle, MixupDraw::CutMix { region: Region { left: 8, top: 5, width: 16, height: 10 }, lam: 0.75 });
    assert_eq!(corner, MixupDraw::CutMix { region: Region { left: 0, top: 0, width: 8, height: 5 }, lam: 0.9375 });
    let batch = Tensor::arange(2, (Kind::Float, tch::Device::Cpu)).view([2, 1, 1, 1]).expand([2, 3, 20, 32], true);
    for mixture in [middle, corner, MixupDraw::Mixup { lam: 0.3 }, MixupDraw::Unmixed] {
        let mixed = mixture.mix_samples(&batch.contiguous());
        let local_batch = mixed.get(1).mean(Kind::Double).double_value(&[]);
        assert!((local_batch - mixture.lam()).abs() < 1e-6, "{mixture:?}: {local_batch}");
        let targets = mixture.mix_targets(&Tensor::from_slice(&[0i64, 2]), 4, 0.1);
        assert!(targets.sum_dim_intlist(1, false, Kind::Float).allclose(
            &Tensor::ones([2], (Kind::Float, tch::Device::Cpu)),
            1e-6,
            0.0,
            false
        ));
        let value = targets.double_value(&[1, 2]);
        assert!((value - (0.9 * mixture.lam() + 0.025)).abs() < 1e-6, "{mixture:?}: {value}");
    }
    Ok(())
}

fn clips_and_single_rows_are_mixed() -> Outcome {
    let clips = normal(3, &[4, 3, 2, 16, 16]);
    let MixupDraw::CutMix { region, .. } = MixupDraw::cutmix(16, 16, 0.5, [8, 8]) else { unreachable!() };
    let mixed = MixupDraw::cutmix(16, 16, 0.5, [8, 8]).mix_samples(&clips);
    let part = |full: &Tensor, row: i64| {
        let Region { left, top, width, height } = region;
        full.get(row).narrow(-2, top.into(), height.into()).narrow(-1, left.into(), width.into())
    };
    for row in 0..4 {
        assert_eq!(part(&mixed, row), part(&clips, 3 - row), "row {row}");
        assert_eq!(mixed.get(row).select(-1, 0), clips.get(row).select(-1, 0), "row {row}, outside");
    }
    // The middle sample of an odd batch is mixed with itself.
    let odd = clips.narrow(0, 0, 3);
    let blended = MixupDraw::Mixup { lam: 0.25 }.mix_samples(&odd);
    assert!(blended.get(1).allclose(&odd.get(1), 1e-6, 1e-6, false));
    Ok(())
}

fn invalid_settings_are_rejected() -> Outcome {
    Mixup::default().check()?;
    Erase::default().check()?;
    for wrong in [
        Mixup { mixup_alpha: -1.0, ..Mixup::default() },
        Mixup { cutmix_alpha: f64::NAN, ..Mixup::default() },
        Mixup { mixup_alpha: 0.0, cutmix_alpha: 0.0, ..Mixup::default() },
        Mixup { probability: 1.1, ..Mixup::default() },
        Mixup { switch_probability: -0.1, ..Mixup::default() },
        Mixup { label_smoothing: 2.0, ..Mixup::default() },
    ] {
        assert!(wrong.check().is_err(), "{wrong:?}");
    }
    for wrong in [
        Erase { probability: -0.1, ..Erase::default() },
        Erase { area: [0.0, 0.3], ..Erase::default() },
        Erase { area: [0.4, 0.3], ..Erase::default() },
        Erase { ratio: [3.0, 0.3], ..Erase::default() },
    ] {
        assert!(wrong.check().is_err(), "{wrong:?}");
    }
    Ok(())
}
