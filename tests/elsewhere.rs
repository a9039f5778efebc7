//! Another number of ranks, another config: what may change between two starts of a run, and what may not.

use crate::job::{Run, STEPS, data, signal, undisturbed};
use crate::refuse::text;
use crate::support::{Outcome, read};
use occlude::data::set::DataSet;
use rustix::process::Signal;

crate::trials![
    another_number_of_ranks_repeats_no_sample_and_skips_none,
    a_changed_config_is_refused_key_by_key,
    what_only_changes_speed_may_change,
    never_does_not_begin_over_checkpoints,
    another_run_s_model_is_refused,
];

/// The global batch of a step as the ranks' dumps hold it, in the order of ranks.
fn batch(run: &Run, step: u64, ranks: usize) -> Result<Vec<i64>, libtest_mimic::Failed> {
    let mut ids = Vec::new();
    for rank in 0..ranks {
        let dump = read(&run.folder().join(format!("dump/step-{step:08}-rank-{rank}.safetensors")))?;
        ids.extend(Vec::<i64>::try_from(&dump["sample_id"])?);
    }
    Ok(ids)
}

fn another_number_of_ranks_repeats_no_sample_and_skips_none() -> Outcome {
    const STEPS: u64 = 50;
    let samples = DataSet::open(&text(data().join("train")))?.len();
    let begun = Run::with(&["train.steps=50"]);
    let every = ["--dump-steps", "50"];
    let whole = begun.copy();
    whole.finish(2, &every);

    let mut job = begun.start(2, &every);
    job.reach(12);
    signal(job.pid(), Signal::TERM);
    assert_eq!(job.end(30).code, 75);
    let at = begun.newest()?.manifest.step;
    assert!((12..40).contains(&at) && !(10 * at).is_multiple_of(samples), "no stop in mid-epoch: {at}");

    let reference: Vec<Vec<i64>> = (0..STEPS).map(|step| batch(&whole, step, 2)).collect::<Result<_, _>>()?;
    for ranks in [1, 3] {
        let run = begun.copy();
        run.finish(ranks, &every);
        for (step, wanted) in reference.iter().enumerate() {
            let ranks = if (step as u64) < at { 2 } else { ranks };
            assert_eq!(&batch(&run, step as u64, ranks)?, wanted, "step {step} on {ranks} ranks");
        }
        let (ours, theirs) = (run.lines(), whole.lines());
        assert_eq!(ours.len(), STEPS as usize);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours.step, theirs.step);
            let off = (ours.loss - theirs.loss).abs() / theirs.loss;
            assert!(off <= 1e-5, "step {} on {ranks} ranks: {} against {}", ours.step, ours.loss, theirs.loss);
        }
    }
    // Every sample once in each pass.
    for pass in reference.concat().chunks_exact(samples as usize) {
        let distinct: std::collections::BTreeSet<_> = pass.iter().collect();
        assert_eq!(distinct.len() as u64, samples);
    }
    Ok(())
}

/// The finished tiny training, to be started again.
fn finished() -> Run {
    undisturbed(0).copy()
}

fn a_changed_config_is_refused_key_by_key() -> Outcome {
    let mut run = finished();
    run.sets = vec!["optim.weight_decay=0.2".into(), "method.mae.mask.ratio=0.5".into()];
    let end = run.start(0, &[]).end(60);
    assert_eq!(end.code, 2, "{}", end.told);
    for words in ["optim.weight_decay was 0.05 and is now 0.2", "method.mae.mask.ratio was 0.75 and is now 0.5"] {
        assert!(end.told.contains(words), "no `{words}` in: {}", end.told);
    }
    run.same_as(undisturbed(0))
}

fn what_only_changes_speed_may_change() -> Outcome {
    let mut run = Run::tiny();
    let mut job = run.start(0, &[]);
    job.reach(30);
    signal(job.pid(), Signal::USR1);
    assert_eq!(job.end(30).code, 75);
    run.sets = ["checkpoint.every_steps=70", "train.micro_batch=4", "data.threads=2", "world.frozen_s=9"]
        .map(String::from)
        .into();
    run.finish(0, &[]);
    assert!(run.saved().contains(&210) && run.saved().contains(&STEPS), "{:?}", run.saved());
    for (ours, theirs) in run.lines().iter().zip(undisturbed(0).lines()) {
        let off = (ours.loss - theirs.loss).abs() / theirs.loss;
        assert!(ours.step == theirs.step && off <= 1e-4, "step {}: {} against {}", ours.step, ours.loss, theirs.loss);
    }
    assert_eq!(run.lines().len(), STEPS as usize);
    Ok(())
}

fn never_does_not_begin_over_checkpoints() -> Outcome {
    let run = finished();
    let end = run.start(0, &["--resume", "never"]).end(60);
    assert_eq!(end.code, 2, "{}", end.told);
    for words in ["--resume never", &format!("step {STEPS}"), "--resume auto"] {
        assert!(end.told.contains(words), "no `{words}` in: {}", end.told);
    }
    run.same_as(undisturbed(0))
}

fn another_run_s_model_is_refused() -> Outcome {
    let run = Run::with(&["method.mae.encoder.width=24"]);
    let other = undisturbed(0).folder();
    let end = run.start(0, &["--resume", other.to_str().expect("UTF-8")]).end(60);
    assert_eq!(end.code, 2, "{}", end.told);
    assert!(end.told.contains("method.mae.encoder.width was 16 and is now 24"), "{}", end.told);
    assert!(run.saved().is_empty() && run.lines().is_empty());
    Ok(())
}
