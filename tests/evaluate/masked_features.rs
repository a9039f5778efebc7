//! Tests of the comparison of whole and masked samples.

use crate::support::training_job::{reference_run, shared_data};
use crate::support::{Outcome, normal, path_text};
use occlude::dist::solo::run_on_threads;
use occlude::evaluate::Feature;
use occlude::evaluate::cka::{CkaOptions, CkaReport, evaluate, linear_cka};
use occlude::evaluate::model_source::ModelSource;
use tch::{Device, Kind, Tensor};

crate::trials![
    cka_is_invariant_to_rotation_scale_and_shift,
    cka_matches_its_definition_by_kernels,
    whole_and_masked_samples_are_compared_on_any_number_of_ranks,
];

fn cka_is_invariant_to_rotation_scale_and_shift() -> Outcome {
    let x = normal(1, &[40, 7]).to_kind(Kind::Double);
    let (rotation, _) = Tensor::linalg_qr(&normal(2, &[7, 7]).to_kind(Kind::Double), "reduced");
    assert!((linear_cka(&x, &x) - 1.0).abs() < 1e-12);
    let moved = x.matmul(&rotation) * -3.5 + 11.0;
    assert!((linear_cka(&x, &moved) - 1.0).abs() < 1e-12, "{}", linear_cka(&x, &moved));
    let other = normal(3, &[40, 5]);
    let unlike = linear_cka(&x, &other);
    assert!(unlike > 0.0 && unlike < 0.6, "{unlike}");
    assert!((unlike - linear_cka(&other, &x)).abs() < 1e-12, "it is symmetric");
    Ok(())
}

/// The Hilbert-Schmidt independence criterion of the two Gram matrices, by its definition.
fn cka_matches_its_definition_by_kernels() -> Outcome {
    let x = normal(1, &[23, 7]).to_kind(Kind::Double);
    let y = x.narrow(1, 0, 3) + normal(2, &[23, 3]).to_kind(Kind::Double) * 0.7;
    let n = 23;
    let centering = Tensor::eye(n, (Kind::Double, Device::Cpu)) - 1.0 / n as f64;
    let gram = |x: &Tensor| centering.matmul(&x.matmul(&x.transpose(0, 1))).matmul(&centering);
    let hsic = |a: &Tensor, b: &Tensor| (gram(a) * gram(b)).sum(Kind::Double).double_value(&[]);
    let expected = hsic(&x, &y) / (hsic(&x, &x) * hsic(&y, &y)).sqrt();
    assert!((linear_cka(&x, &y) - expected).abs() < 1e-12);
    Ok(())
}

fn whole_and_masked_samples_are_compared_on_any_number_of_ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    let plot = folder.path().join("cka.svg");
    let options = |feature: Option<Feature>| CkaOptions {
        model: ModelSource { checkpoint: path_text(reference_run(0).folder()), random_init: false, seed: None },
        test: path_text(shared_data().join("test")),
        feature,
        layer: None,
        plot: Some(plot.clone()),
    };
    let on = |ranks: usize, feature: Option<Feature>| {
        run_on_threads(ranks, |world| evaluate(&options(feature), &world).expect("a comparison"))
    };
    let alone = on(1, None).remove(0);
    assert_eq!((alone.ratios.len(), alone.cka.len(), alone.n_skipped), (9, 9, 0));
    assert!(alone.cka.iter().all(|value| (0.0..=1.0).contains(value)), "{:?}", alone.cka);
    assert!(alone.cka[0] > alone.cka[8], "nine tenths hide more than one: {:?}", alone.cka);
    let svg = std::fs::read_to_string(&plot)?;
    assert!(svg.starts_with("<svg") && svg.contains("<circle"), "nine dots");
    for ranks in [2, 3] {
        for together in on(ranks, None) {
            assert_eq!(CkaReport { ranks: 1, ..together }, alone, "{ranks} ranks");
        }
    }
    assert_ne!(on(1, Some(Feature::Mean)).remove(0).cka, alone.cka, "another feature");
    Ok(())
}
