//! Tests of resuming with another number of ranks or another config: what may change, and what may not.

use crate::support::training_job::{Run, STEPS, reference_run, send_signal, shared_data};
use crate::support::{Outcome, path_text, read};
use occlude::data::set::DataSet;
use rustix::process::Signal;

crate::trials![
    another_number_of_ranks_repeats_no_sample_and_skips_none,
    a_changed_config_is_rejected_key_by_key,
    keys_that_only_affect_speed_may_change,
    resume_never_does_not_overwrite_checkpoints,
    the_model_of_another_run_is_rejected,
];

/// Returns the sample ids of the global batch of a step from the dumps of all ranks, in the order of ranks.
fn dumped_batch(run: &Run, step: u64, ranks: usize) -> Result<Vec<i64>, libtest_mimic::Failed> {
    let mut ids = Vec::new();
    for rank in 0..ranks {
        let dump = read(&run.folder().join(format!("dump/step-{step:08}-rank-{rank}.safetensors")))?;
        ids.extend(Vec::<i64>::try_from(&dump["sample_id"])?);
    }
    Ok(ids)
}

fn another_number_of_ranks_repeats_no_sample_and_skips_none() -> Outcome {
    const STEPS: u64 = 50;
    let samples = DataSet::open(&path_text(shared_data().join("train")))?.len();
    let start = Run::with_overrides(&["train.steps=50"]);
    let every = ["--dump-steps", "50"];
    let full = start.copy();
    full.finish(2, &every);

    let mut job = start.start(2, &every);
    job.wait_for_step(12);
    send_signal(job.pid(), Signal::TERM);
    assert_eq!(job.end(30).code, 75);
    let stopped_at = start.newest_checkpoint()?.manifest.step;
    assert!(
        (12..40).contains(&stopped_at) && !(10 * stopped_at).is_multiple_of(samples),
        "no stop in mid-epoch: {stopped_at}"
    );

    let reference: Vec<Vec<i64>> = (0..STEPS).map(|step| dumped_batch(&full, step, 2)).collect::<Result<_, _>>()?;
    for ranks in [1, 3] {
        let run = start.copy();
        run.finish(ranks, &every);
        for (step, expected) in reference.iter().enumerate() {
            let ranks = if (step as u64) < stopped_at { 2 } else { ranks };
            assert_eq!(&dumped_batch(&run, step as u64, ranks)?, expected, "step {step} on {ranks} ranks");
        }
        let ours = run.lines();
        let reference_lines = full.lines();
        assert_eq!(ours.len(), STEPS as usize);
        for (ours, reference_line) in ours.iter().zip(&reference_lines) {
            assert_eq!(ours.step, reference_line.step);
            let difference = (ours.loss - reference_line.loss).abs() / reference_line.loss;
            assert!(
                difference <= 1e-5,
                "step {} on {ranks} ranks: {} against {}",
                ours.step,
                ours.loss,
                reference_line.loss
            );
        }
    }
    // Every sample once in each epoch.
    for pass in reference.concat().chunks_exact(samples as usize) {
        let distinct: std::collections::BTreeSet<_> = pass.iter().collect();
        assert_eq!(distinct.len() as u64, samples);
    }
    Ok(())
}

/// Returns a copy of the finished tiny training, to be started again.
fn finished_run() -> Run {
    reference_run(0).copy()
}

fn a_changed_config_is_rejected_key_by_key() -> Outcome {
    let mut run = finished_run();
    run.sets = vec!["optim.weight_decay=0.2".into(), "method.mae.mask.ratio=0.5".into()];
    let end = run.start(0, &[]).end(60);
    assert_eq!(end.code, 2, "{}", end.stderr);
    for words in ["optim.weight_decay was 0.05 and is now 0.2", "method.mae.mask.ratio was 0.75 and is now 0.5"] {
        assert!(end.stderr.contains(words), "no `{words}` in: {}", end.stderr);
    }
    run.assert_same_as(reference_run(0))
}

fn keys_that_only_affect_speed_may_change() -> Outcome {
    let mut run = Run::tiny();
    let mut job = run.start(0, &[]);
    job.wait_for_step(30);
    send_signal(job.pid(), Signal::USR1);
    assert_eq!(job.end(30).code, 75);
    run.sets = ["checkpoint.every_steps=70", "train.micro_batch=4", "data.threads=2", "world.heartbeat_timeout_s=9"]
        .map(String::from)
        .into();
    run.finish(0, &[]);
    assert!(run.saved().contains(&210) && run.saved().contains(&STEPS), "{:?}", run.saved());
    for (ours, reference) in run.lines().iter().zip(reference_run(0).lines()) {
        let difference = (ours.loss - reference.loss).abs() / reference.loss;
        assert!(
            ours.step == reference.step && difference <= 1e-4,
            "step {}: {} against {}",
            ours.step,
            ours.loss,
            reference.loss
        );
    }
    assert_eq!(run.lines().len(), STEPS as usize);
    Ok(())
}

fn resume_never_does_not_overwrite_checkpoints() -> Outcome {
    let run = finished_run();
    let end = run.start(0, &["--resume", "never"]).end(60);
    assert_eq!(end.code, 2, "{}", end.stderr);
    for words in ["--resume never", &format!("step {STEPS}"), "--resume auto"] {
        assert!(end.stderr.contains(words), "no `{words}` in: {}", end.stderr);
    }
    run.assert_same_as(reference_run(0))
}

fn the_model_of_another_run_is_rejected() -> Outcome {
    let run = Run::with_overrides(&["method.mae.encoder.width=24"]);
    let other = reference_run(0).folder();
    let end = run.start(0, &["--resume", other.to_str().expect("UTF-8")]).end(60);
    assert_eq!(end.code, 2, "{}", end.stderr);
    assert!(end.stderr.contains("method.mae.encoder.width was 16 and is now 24"), "{}", end.stderr);
    assert!(run.saved().is_empty() && run.lines().is_empty());
    Ok(())
}
