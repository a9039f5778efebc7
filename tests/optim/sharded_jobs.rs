//! Tests of jobs with sharded optimizer state: they resume from full and sharded checkpoints, on other numbers of ranks.

use crate::support::training_job::{Run, STEPS, reference_run, send_signal};
use crate::support::{Outcome, read};
use libtest_mimic::Failed;
use rustix::process::Signal;

crate::trials![
    full_and_sharded_jobs_resume_from_each_other,
    a_sharded_bf16_job_resumes_bit_for_bit,
    another_number_of_ranks_resumes_from_shards,
    dumps_of_sharded_training_are_full,
];

const SHARDED: [&str; 2] = ["--set", "world.shard_optimizer=true"];

/// Trains until after `step` and stops with a checkpoint.
fn train_until(run: &Run, ranks: usize, step: u64, more: &[&str]) {
    let mut job = run.start(ranks, more);
    job.wait_for_step(step);
    send_signal(job.pid(), Signal::TERM);
    let end = job.end(60);
    assert_eq!(end.code, 75, "{}", end.stderr);
}

/// Like `Run::assert_same_as` without the gradient norm, which shards sum in another order.
fn assert_trained_the_same(ours: &Run, reference: &Run) -> Outcome {
    let newest = ours.newest_checkpoint()?;
    let expected = reference.newest_checkpoint()?;
    assert_eq!((newest.manifest.step, newest.tensors.len()), (STEPS, expected.tensors.len()));
    for (name, tensor) in &expected.tensors {
        assert!(newest.tensors[name] == *tensor, "{name} differs");
    }
    let numbers = |run: &Run| -> Vec<_> { run.lines().iter().map(|line| (line.step, line.loss, line.lr)).collect() };
    assert!(numbers(ours) == numbers(reference), "losses differ");
    let norms = |run: &Run| -> Vec<f64> { run.lines().iter().map(|line| line.grad_norm).collect() };
    for (ours, reference) in norms(ours).iter().zip(norms(reference)) {
        assert!((ours - reference).abs() <= 1e-6 * reference, "norm {ours} for {reference}");
    }
    Ok(())
}

fn full_and_sharded_jobs_resume_from_each_other() -> Outcome {
    let run = Run::tiny();
    train_until(&run, 2, 40, &[]);
    train_until(&run, 2, 110, &SHARDED);
    train_until(&run, 2, 170, &[]);
    // Rank 0 draws images while the weights of the others are being gathered.
    run.finish(2, &[&SHARDED[..], &["--set", "log.image_interval_steps=30"]].concat());
    assert!(run.folder().join("pictures").read_dir()?.count() >= 2);
    assert_trained_the_same(&run, reference_run(2))
}

fn a_sharded_bf16_job_resumes_bit_for_bit() -> Outcome {
    let sets = ["train.dtype=bf16", "world.grad_dtype=bf16", "world.bucket_mb=0.008"];
    let full = Run::with_overrides(&sets);
    full.finish(2, &[]);
    let run = Run::with_overrides(&sets);
    let mut job = run.start(2, &SHARDED);
    job.wait_for_step(70);
    send_signal(job.rank(1), Signal::KILL);
    assert_eq!(job.end(30).code, 70);
    train_until(&run, 2, 150, &[]);
    run.finish(2, &SHARDED);
    assert_trained_the_same(&run, &full)?;
    // A dtype that rounds cannot change during a run.
    let end = run.start(0, &["--set", "world.grad_dtype=fp32"]).end(60);
    assert!(
        end.code == 2 && end.stderr.contains("world.grad_dtype was \"bf16\" and is now \"fp32\""),
        "{}",
        end.stderr
    );
    Ok(())
}

fn another_number_of_ranks_resumes_from_shards() -> Outcome {
    let run = Run::tiny();
    train_until(&run, 3, 60, &SHARDED);
    train_until(&run, 2, 130, &SHARDED);
    run.finish(0, &[]);
    for (ours, reference) in run.lines().iter().zip(reference_run(0).lines()) {
        let difference = (ours.loss - reference.loss).abs() / reference.loss;
        assert!(difference <= 1e-3, "step {}: loss {} for {}", ours.step, ours.loss, reference.loss);
    }
    assert_eq!(run.lines().len() as u64, STEPS);
    Ok(())
}

fn dumps_of_sharded_training_are_full() -> Outcome {
    let dumped = |more: &[&str]| -> Result<Vec<_>, Failed> {
        let run = Run::with_overrides(&["train.steps=3"]);
        run.finish(2, &[&["--dump-steps", "3"], more].concat());
        let file = |rank| run.folder().join(format!("dump/step-00000002-rank-{rank}.safetensors"));
        Ok(vec![read(&file(0))?, read(&file(1))?])
    };
    for (full, sharded) in dumped(&[])?.iter().zip(dumped(&SHARDED)?) {
        assert_eq!(full.len(), sharded.len());
        for (name, tensor) in full {
            assert!(tensor.equal(&sharded[name]), "{name} differs");
        }
        assert!(full.keys().any(|name| name.starts_with("grad.")));
    }
    Ok(())
}
