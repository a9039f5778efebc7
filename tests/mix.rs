//! What happens to finished batches: erasing, mixup, CutMix.

use crate::support::{Outcome, normal};
use occlude::data::decode::Region;
use occlude::op::shuffle::Origin;
use occlude::part::view::erase::Erase;
use occlude::part::view::mix::{Mix, Mixture, beta};
use occlude::rng::{Draw, Purpose};
use tch::{Kind, Tensor};

crate::trials![
    a_sample_is_erased_alike_in_any_batch,
    a_clip_loses_the_same_box_in_every_frame,
    what_is_erased_becomes_standard_normal_noise,
    beta_has_its_mean_and_its_variance,
    a_mixture_belongs_to_the_step,
    a_pasted_box_leaves_the_share_that_it_says,
    a_clip_and_a_lone_row_are_mixed,
    settings_that_cannot_be_are_refused,
];

fn origin(id: u64) -> Origin {
    Origin { id, epoch: 3, repeat: 0 }
}

fn a_sample_is_erased_alike_in_any_batch() -> Outcome {
    let erase = Erase { probability: 0.5, ..Erase::default() };
    let samples = normal(1, &[40, 3, 20, 30]);
    let whole = samples.copy();
    erase.apply(&whole, 7, &(0..40).map(origin).collect::<Vec<_>>());
    // The same samples, in reverse order and a few at a time.
    for start in (0..40).step_by(5) {
        let ids: Vec<i64> = (start..start + 5).rev().collect();
        let part = samples.index_select(0, &Tensor::from_slice(&ids));
        erase.apply(&part, 7, &ids.iter().map(|&id| origin(id as u64)).collect::<Vec<_>>());
        assert_eq!(part, whole.index_select(0, &Tensor::from_slice(&ids)));
    }
    let erased = (0..40).filter(|&row| whole.get(row) != samples.get(row)).count();
    assert!((8..=32).contains(&erased), "{erased} of 40 erased, 20 expected");
    let later = samples.copy();
    erase.apply(&later, 7, &(0..40).map(|id| Origin { epoch: 4, ..origin(id) }).collect::<Vec<_>>());
    assert_ne!(later, whole, "another epoch erased the same");
    Ok(())
}

fn a_clip_loses_the_same_box_in_every_frame() -> Outcome {
    let erase = Erase { probability: 1.0, ..Erase::default() };
    let clip = Tensor::full([1, 3, 4, 24, 24], 9.0, (Kind::Float, tch::Device::Cpu));
    erase.apply(&clip, 1, &[origin(5)]);
    let gone = clip.ne(9.0).view([12, 24 * 24]);
    let area = gone.get(0).sum(Kind::Int64).int64_value(&[]);
    assert!((576 / 60..576 / 2).contains(&area), "{area} of 576 pixels erased");
    for plane in 1..12 {
        assert_eq!(gone.get(plane), gone.get(0), "plane {plane}");
    }
    let frames = clip.view([3, 4, 24, 24]);
    assert_ne!(frames.select(1, 0), frames.select(1, 1), "two frames got the same noise");
    Ok(())
}

fn what_is_erased_becomes_standard_normal_noise() -> Outcome {
    let erase = Erase { probability: 1.0, ..Erase::default() };
    let batch = Tensor::full([30, 3, 32, 32], 50.0, (Kind::Float, tch::Device::Cpu));
    erase.apply(&batch, 1, &(0..30).map(origin).collect::<Vec<_>>());
    let noise = batch.masked_select(&batch.ne(50.0));
    let count = noise.numel() as f64;
    let (mean, deviation) = (noise.mean(Kind::Double).double_value(&[]), noise.std(true).double_value(&[]));
    assert!(count > 3000.0 && mean.abs() < 4.0 / count.sqrt(), "{count} values of mean {mean}");
    assert!((deviation - 1.0).abs() < 4.0 / (2.0 * count).sqrt(), "deviation {deviation}");
    Ok(())
}

fn beta_has_its_mean_and_its_variance() -> Outcome {
    for (seed, alpha) in [(1, 0.1), (2, 0.8), (3, 1.0), (4, 7.5)] {
        let mut draw = Draw::new(seed, 0, 0, Purpose::Mix, 0);
        let values: Vec<f64> = (0..20_000).map(|_| beta(alpha, &mut draw)).collect();
        assert!(values.iter().all(|v| (0.0..=1.0).contains(v)));
        let mean = values.iter().sum::<f64>() / 20_000.0;
        let variance = values.iter().map(|v| (v - 0.5).powi(2)).sum::<f64>() / 20_000.0;
        let expected = 1.0 / (4.0 * (2.0 * alpha + 1.0));
        assert!((mean - 0.5).abs() < 4.0 * (expected / 20_000.0).sqrt(), "α {alpha}: mean {mean}");
        assert!((variance / expected - 1.0).abs() < 0.04, "α {alpha}: variance {variance}, expected {expected}");
    }
    // Beta(1, 1) is uniform.
    let mut draw = Draw::new(9, 0, 0, Purpose::Mix, 0);
    let tenth = (0..20_000).filter(|_| beta(1.0, &mut draw) < 0.1).count();
    assert!((1830..=2170).contains(&tenth), "{tenth} of 20,000 below 0.1");
    let mut draw = Draw::new(9, 0, 0, Purpose::Mix, 0);
    assert!((0..2000).all(|_| beta(1e-3, &mut draw).is_finite()), "a small α gave no number");
    Ok(())
}

fn a_mixture_belongs_to_the_step() -> Outcome {
    let mix = Mix { probability: 0.8, switch: 0.25, ..Mix::default() };
    let drawn: Vec<Mixture> = (0..4000).map(|step| mix.draw(1, step, 24, 16)).collect();
    assert_eq!(drawn[77], mix.draw(1, 77, 24, 16));
    assert_ne!(drawn[77], mix.draw(2, 77, 24, 16));
    let count = |kind: fn(&Mixture) -> bool| drawn.iter().filter(|one| kind(one)).count();
    let apart = count(|one| matches!(one, Mixture::Apart));
    let pasted = count(|one| matches!(one, Mixture::Pasted { .. }));
    // 800 and 800 expected, deviations 25.
    assert!((700..=900).contains(&apart) && (700..=900).contains(&pasted), "{apart} apart, {pasted} pasted");
    let only = |mixup, cutmix| Mix { mixup, cutmix, ..Mix::default() };
    assert!((0..99).all(|step| matches!(only(0.8, 0.0).draw(1, step, 8, 8), Mixture::Blended { .. })));
    assert!((0..99).all(|step| matches!(only(0.0, 1.0).draw(1, step, 8, 8), Mixture::Pasted { .. })));
    Ok(())
}

fn a_pasted_box_leaves_the_share_that_it_says() -> Outcome {
    // λ 0.75: half of each side; 32 × 20 about the middle gives 16 × 10, at a corner a quarter of that.
    let middle = Mixture::pasted(32, 20, 0.75, [16, 10]);
    let corner = Mixture::pasted(32, 20, 0.75, [0, 0]);
    assert_eq!(middle, Mixture::Pasted { region: Region { left: 8, top: 5, width: 16, height: 10 }, lam: 0.75 });
    assert_eq!(corner, Mixture::Pasted { region: Region { left: 0, top: 0, width: 8, height: 5 }, lam: 0.9375 });
    let batch = Tensor::arange(2, (Kind::Float, tch::Device::Cpu)).view([2, 1, 1, 1]).expand([2, 3, 20, 32], true);
    for mixture in [middle, corner, Mixture::Blended { lam: 0.3 }, Mixture::Apart] {
        let mixed = mixture.samples(&batch.contiguous());
        let share = mixed.get(1).mean(Kind::Double).double_value(&[]);
        assert!((share - mixture.lam()).abs() < 1e-6, "{mixture:?}: {share}");
        let targets = mixture.targets(&Tensor::from_slice(&[0i64, 2]), 4, 0.1);
        assert!(targets.sum_dim_intlist(1, false, Kind::Float).allclose(
            &Tensor::ones([2], (Kind::Float, tch::Device::Cpu)),
            1e-6,
            0.0,
            false
        ));
        let own = targets.double_value(&[1, 2]);
        assert!((own - (0.9 * mixture.lam() + 0.025)).abs() < 1e-6, "{mixture:?}: {own}");
    }
    Ok(())
}

fn a_clip_and_a_lone_row_are_mixed() -> Outcome {
    let clips = normal(3, &[4, 3, 2, 16, 16]);
    let Mixture::Pasted { region, .. } = Mixture::pasted(16, 16, 0.5, [8, 8]) else { unreachable!() };
    let mixed = Mixture::pasted(16, 16, 0.5, [8, 8]).samples(&clips);
    let part = |whole: &Tensor, row: i64| {
        let Region { left, top, width, height } = region;
        whole.get(row).narrow(-2, top.into(), height.into()).narrow(-1, left.into(), width.into())
    };
    for row in 0..4 {
        assert_eq!(part(&mixed, row), part(&clips, 3 - row), "row {row}");
        assert_eq!(mixed.get(row).select(-1, 0), clips.get(row).select(-1, 0), "row {row}, outside");
    }
    // The middle of an odd batch meets itself.
    let odd = clips.narrow(0, 0, 3);
    let blended = Mixture::Blended { lam: 0.25 }.samples(&odd);
    assert!(blended.get(1).allclose(&odd.get(1), 1e-6, 1e-6, false));
    Ok(())
}

fn settings_that_cannot_be_are_refused() -> Outcome {
    Mix::default().check()?;
    Erase::default().check()?;
    for wrong in [
        Mix { mixup: -1.0, ..Mix::default() },
        Mix { cutmix: f64::NAN, ..Mix::default() },
        Mix { mixup: 0.0, cutmix: 0.0, ..Mix::default() },
        Mix { probability: 1.1, ..Mix::default() },
        Mix { switch: -0.1, ..Mix::default() },
        Mix { smoothing: 2.0, ..Mix::default() },
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
