//! Tests of saving and loading: bit for bit, atomic, and with retention.

use crate::checkpoint::damage::flip_byte;
use crate::checkpoint::lease::edit_lease;
use crate::data::store::{FaultyStore, StoreFault, local_store};
use crate::support::{Outcome, trial_name};
use occlude::checkpoint::lease::Lease;
use occlude::checkpoint::*;
use occlude::data::store::Store;
use occlude::error::{Error, ExitCode};
use rustix::process::{Pid, Signal, kill_process};
use safetensors::Dtype;
use serde_json::json;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

crate::trials![
    a_checkpoint_loads_bit_for_bit,
    a_kill_at_any_point_of_a_save_leaves_an_intact_checkpoint,
    a_failed_save_is_reported_at_the_next_call_and_leaves_no_files,
    retention_keeps_the_last_and_every_nth,
    a_partly_removed_checkpoint_is_no_longer_valid,
    leftovers_of_failed_saves_are_removed,
    a_stale_writer_stops_and_its_checkpoint_is_ignored,
    a_frozen_writer_exits_with_73_when_it_wakes,
    a_restored_copy_of_a_run_resumes_from_its_last_checkpoint,
    checkpoints_copied_without_a_lease_stay_older,
    a_save_runs_in_the_background,
    a_wrong_shape_is_rejected_before_the_model_changes,
    a_url_may_name_a_run_or_one_checkpoint,
];

const LONG: Duration = Duration::from_secs(60);
pub const ALL: Retention = Retention { last: 100, every: None };
/// Names the task of the child when a case runs this binary again.
const CHILD: &str = "OCCLUDE_TEST_CHILD";
const FOLDER: &str = "OCCLUDE_TEST_FOLDER";

pub fn saver(run: &Store, keep: Retention) -> Result<Saver, Error> {
    Ok(Saver::new(run.clone(), keep, Arc::new(Lease::acquire(run, LONG)?))?.with_max_part_bytes(200))
}

/// Four tensors that fill two parts of 200 bytes: odd bit patterns, an empty tensor, a scalar.
pub fn snapshot(step: u64) -> Snapshot {
    let named = |name: &str, dtype, shape: &[usize], bytes| NamedTensor {
        name: name.into(),
        dtype,
        shape: shape.to_vec(),
        bytes,
    };
    let floats = [f32::NAN.to_bits(), 0x7fa0_0001, (-0.0f32).to_bits(), 1, step as u32];
    Snapshot {
        step,
        samples: step * 64,
        world: 2,
        meta: json!({ "config": "abc", "seal": "a seal of the caller's own", "lr": 0.1 }),
        tensors: vec![
            named("weight.a", Dtype::F32, &[5], floats.iter().flat_map(|bits| bits.to_le_bytes()).collect()),
            named("weight.b", Dtype::BF16, &[7, 13], (0..182u32).map(|i| (i * 31 + step as u32) as u8).collect()),
            named("empty", Dtype::F32, &[0, 3], vec![]),
            named("count", Dtype::I64, &[], step.to_le_bytes().to_vec()),
        ],
    }
}

/// Saves these steps under one lease.
pub fn save_steps(run: &Store, keep: Retention, steps: &[u64]) -> Outcome {
    let mut saver = saver(run, keep)?;
    for &step in steps {
        saver.save(snapshot(step))?;
    }
    Ok(saver.finish()?)
}

pub fn latest_step(run: &Store) -> Result<Option<u64>, Error> {
    Ok(load_from_run(run, CheckpointSelector::Latest)?.map(|loaded| {
        assert_same(&loaded, &snapshot(loaded.manifest.step));
        loaded.manifest.step
    }))
}

fn assert_same(loaded: &LoadedCheckpoint, expected: &Snapshot) {
    assert_eq!(loaded.tensors.len(), expected.tensors.len());
    for tensor in &expected.tensors {
        assert_eq!(loaded.tensors.get(&tensor.name), Some(tensor));
    }
}

pub fn part_paths(run: &Store, step: u64) -> Result<Vec<String>, Error> {
    let files = run.list(&step_folder(step))?.into_iter().map(|(path, _)| path);
    Ok(files.filter(|path| path.ends_with(".safetensors")).collect())
}

pub fn manifest_path(step: u64) -> String {
    format!("{}/manifest.json", step_folder(step))
}

/// Runs one test of this binary in its own process.
fn spawn_case(case: &str, task: &str, run: &Store) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["--exact", &trial_name(module_path!(), case), "--test-threads", "1"])
        .env(CHILD, task)
        .env(FOLDER, run.url())
        .stdout(std::process::Stdio::null())
        .spawn()
}

fn child_task() -> Option<(String, Store)> {
    let task = std::env::var(CHILD).ok()?;
    Some((task, Store::open(&std::env::var(FOLDER).expect("a folder")).expect("a store")))
}

fn a_checkpoint_loads_bit_for_bit() -> Outcome {
    let (_folder, run) = local_store();
    assert!(load_from_run(&run, CheckpointSelector::Latest)?.is_none());
    save_steps(&run, ALL, &[10, 20])?;
    assert_eq!(part_paths(&run, 20)?.len(), 2);
    let loaded = load_from_run(&run, CheckpointSelector::Latest)?.expect("a checkpoint");
    assert_same(&loaded, &snapshot(20));
    let manifest = &loaded.manifest;
    assert_eq!((manifest.step, manifest.samples, manifest.world, manifest.epoch), (20, 1280, 2, 1));
    assert_eq!(manifest.meta, snapshot(20).meta);
    let before = blake3::hash(&run.get(&manifest_path(10))?).to_hex().to_string();
    assert_eq!(manifest.previous.as_deref(), Some(before.as_str()), "the chain is broken");
    assert_same(&load_from_run(&run, CheckpointSelector::Step(10))?.expect("it is there"), &snapshot(10));
    assert!(load_from_run(&run, CheckpointSelector::Step(15))?.is_none());
    // The next writer continues the chain.
    assert_eq!(saver(&run, ALL)?.saved_step(), 20);
    Ok(())
}

/// Each child is killed by SIGKILL at its point while it writes step 20 after an intact step 10.
fn a_kill_at_any_point_of_a_save_leaves_an_intact_checkpoint() -> Outcome {
    let points = [
        SavePoint::BeforePart(0),
        SavePoint::BeforePart(1),
        SavePoint::AfterParts,
        SavePoint::AfterManifest,
        SavePoint::BeforeRemoval,
    ];
    if let Some((task, run)) = child_task() {
        let mut saver = saver(&run, Retention { last: 1, every: None })?.with_hook(move |point| {
            if format!("{point:?}") == task {
                kill_process(rustix::process::getpid(), Signal::KILL).expect("killed");
            }
            Ok(())
        });
        saver.save(snapshot(20))?;
        return Ok(saver.finish()?);
    }
    for point in points {
        let (_folder, run) = local_store();
        save_steps(&run, ALL, &[10])?;
        let status =
            spawn_case("a_kill_at_any_point_of_a_save_leaves_an_intact_checkpoint", &format!("{point:?}"), &run)?
                .wait()?;
        assert!(
            std::os::unix::process::ExitStatusExt::signal(&status) == Some(9),
            "{point:?} was not reached: {status}"
        );
        let committed = matches!(point, SavePoint::AfterManifest | SavePoint::BeforeRemoval);
        assert_eq!(latest_step(&run)?, Some(if committed { 20 } else { 10 }), "{point:?}");
        // The next job takes over at once (the holder is dead) and removes leftovers.
        save_steps(&run, Retention { last: 1, every: None }, &[20, 30])?;
        assert_eq!(latest_step(&run)?, Some(30), "{point:?}");
        assert_eq!(run.list_folders("checkpoints")?, ["step-00000030"], "{point:?}");
    }
    Ok(())
}

fn a_failed_save_is_reported_at_the_next_call_and_leaves_no_files() -> Outcome {
    for at in [SavePoint::BeforePart(0), SavePoint::BeforePart(1), SavePoint::AfterParts] {
        let (_folder, run) = local_store();
        let attempts = std::sync::atomic::AtomicUsize::new(0);
        let mut saver = saver(&run, ALL)?.with_hook(move |point| {
            let second = point == at && attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1;
            if second { Err(Error::new(ExitCode::Disk, "no space left")) } else { Ok(()) }
        });
        saver.save(snapshot(10))?;
        saver.save(snapshot(20))?;
        assert_eq!(saver.save(snapshot(30)).expect_err("step 20 failed").code, ExitCode::Disk, "{at:?}");
        assert_eq!(saver.saved_step(), 10);
        assert_eq!(latest_step(&run)?, Some(10));
        assert!(part_paths(&run, 20)?.is_empty(), "{at:?}: parts were left");
        saver.save(snapshot(30))?;
        saver.finish()?;
        assert_eq!(latest_step(&run)?, Some(30));
        assert_eq!(run.list_folders("checkpoints")?, ["step-00000010", "step-00000030"]);
    }
    Ok(())
}

fn retention_keeps_the_last_and_every_nth() -> Outcome {
    let steps: Vec<u64> = (1..=10).map(|i| i * 10).collect();
    for (keep, stay) in [
        (Retention { last: 2, every: Some(40) }, vec![40, 80, 90, 100]),
        (Retention { last: 3, every: None }, vec![80, 90, 100]),
        (Retention { last: 0, every: None }, vec![100]),
    ] {
        let (_folder, run) = local_store();
        save_steps(&run, keep, &steps)?;
        assert_eq!(run.list_folders("checkpoints")?, stay.iter().map(|s| format!("step-{s:08}")).collect::<Vec<_>>());
        for step in stay {
            assert!(load_from_run(&run, CheckpointSelector::Step(step))?.is_some());
        }
    }
    Ok(())
}

/// The manifest is deleted first, so that a half-removed checkpoint cannot be read, and the save that removes it
/// succeeds.
fn a_partly_removed_checkpoint_is_no_longer_valid() -> Outcome {
    let run = Store::from_backend(Arc::new(FaultyStore::new(StoreFault::PartsStay)), "memory://");
    save_steps(&run, Retention { last: 1, every: None }, &[10, 20])?;
    assert_eq!(part_paths(&run, 10)?.len(), 2);
    assert!(load_from_run(&run, CheckpointSelector::Step(10))?.is_none());
    assert_eq!(latest_step(&run)?, Some(20));
    Ok(())
}

fn leftovers_of_failed_saves_are_removed() -> Outcome {
    let (folder_path, run) = local_store();
    save_steps(&run, ALL, &[10])?;
    run.put("checkpoints/step-00000015/dead-00.safetensors", b"a part")?;
    std::fs::write(folder_path.path().join("checkpoints/step-00000015/dead-01.safetensors#1"), b"half a part")?;
    run.put("checkpoints/step-00000020/dead-00.safetensors", b"a part of an attempt at the same step")?;
    run.put("checkpoints/step-00000025/dead-00.safetensors", b"a part of an attempt further on")?;
    save_steps(&run, ALL, &[20])?;
    assert_eq!(run.list_folders("checkpoints")?, ["step-00000010", "step-00000020", "step-00000025"]);
    assert_eq!(part_paths(&run, 20)?.len(), 2, "a part of the dead writer was left");
    assert_eq!(latest_step(&run)?, Some(20));
    save_steps(&run, ALL, &[30])?;
    assert_eq!(run.list_folders("checkpoints")?, ["step-00000010", "step-00000020", "step-00000030"]);
    Ok(())
}

/// The stale writer loses the run between its last check of the lease and its manifest: the worst moment.
fn a_stale_writer_stops_and_its_checkpoint_is_ignored() -> Outcome {
    let (_folder, run) = local_store();
    save_steps(&run, ALL, &[100, 110])?;
    let (heirs, heir) = crossbeam_channel::bounded(1);
    let reference = run.clone();
    let mut stale = saver(&run, ALL)?.with_hook(move |point| {
        if point == SavePoint::AfterParts {
            edit_lease(&reference, &[("started", json!(1))]).expect("forged");
            heirs.send(Lease::acquire(&reference, LONG)?).expect("a new holder");
        }
        Ok(())
    });
    stale.save(snapshot(120))?;
    assert_eq!(stale.save(snapshot(130)).expect_err("it lost the run").code, ExitCode::LeaseHeld);
    assert_eq!(stale.saved_step(), 110);
    stale.save(snapshot(130))?;
    assert_eq!(stale.finish().expect_err("it lost the run").code, ExitCode::LeaseHeld);
    assert!(part_paths(&run, 130)?.is_empty(), "a stale writer continued to write");
    assert!(run.size(&manifest_path(120))?.is_some(), "the case is not the worst one");
    assert_eq!(latest_step(&run)?, Some(110), "a stale checkpoint was read");
    assert_eq!(
        load_from_run(&run, CheckpointSelector::Step(120)).map(|f| f.is_some()).expect_err("superseded").code,
        ExitCode::Checkpoint
    );
    let mut heir = Saver::new(run.clone(), ALL, Arc::new(heir.recv()?))?;
    assert_eq!(heir.saved_step(), 110);
    heir.save(snapshot(115))?;
    heir.finish()?;
    assert_eq!(latest_step(&run)?, Some(115));
    assert!(!run.list_folders("checkpoints")?.contains(&"step-00000120".to_owned()), "it was not collected");
    Ok(())
}

fn a_frozen_writer_exits_with_73_when_it_wakes() -> Outcome {
    let patience = Duration::from_millis(900);
    if let Some((_, run)) = child_task() {
        let mut saver = Saver::new(run.clone(), ALL, Arc::new(Lease::acquire(&run, patience)?))?;
        for step in 1.. {
            if let Err(error) = saver.save(snapshot(step)) {
                std::process::exit(error.code as i32);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let (_folder, run) = local_store();
    let mut child = spawn_case("a_frozen_writer_exits_with_73_when_it_wakes", "write", &run)?;
    let start = Instant::now();
    while latest_step(&run)?.is_none_or(|step| step < 3) {
        assert!(start.elapsed() < LONG, "the child writes nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP)?;
    let outcome = (|| -> Outcome {
        let lease = Arc::new(Lease::acquire(&run, patience)?);
        let resumed = latest_step(&run)?.expect("the last step of the child");
        let mut heir = Saver::new(run.clone(), ALL, lease)?;
        kill_process(pid, Signal::CONT)?;
        heir.save(snapshot(resumed + 1))?;
        assert_eq!(child.wait()?.code(), Some(73));
        heir.save(snapshot(resumed + 2))?;
        heir.finish()?;
        assert_eq!(
            load_from_run(&run, CheckpointSelector::Latest)?.map(|l| (l.manifest.step, l.manifest.epoch)),
            Some((resumed + 2, 2))
        );
        Ok(())
    })();
    let _ = child.kill();
    outcome
}

fn a_restored_copy_of_a_run_resumes_from_its_last_checkpoint() -> Outcome {
    let (_folder, run) = local_store();
    save_steps(&run, ALL, &[50, 100])?;
    // The user resumes from step 50; step 100 now belongs to an abandoned branch.
    save_steps(&run, ALL, &[75])?;
    assert_eq!(latest_step(&run)?, Some(75));
    assert_eq!(run.list_folders("checkpoints")?, ["step-00000050", "step-00000075"]);
    Ok(())
}

fn checkpoints_copied_without_a_lease_stay_older() -> Outcome {
    let (_folder, run) = local_store();
    for step in [10, 20, 30] {
        save_steps(&run, ALL, &[step])?;
    }
    run.delete_folder("lease")?;
    save_steps(&run, ALL, &[40])?;
    assert_eq!(latest_step(&run)?, Some(40), "the epoch of a new lease is below the old ones");
    Ok(())
}

fn a_save_runs_in_the_background() -> Outcome {
    let (_folder, run) = local_store();
    let (go, wait) = crossbeam_channel::bounded::<()>(0);
    let mut saver = saver(&run, ALL)?.with_hook(move |point| {
        if point == SavePoint::AfterParts {
            wait.recv().expect("a go");
        }
        Ok(())
    });
    // Returns although the save cannot finish yet.
    saver.save(snapshot(10))?;
    assert_eq!(saver.saved_step(), 0);
    let goes = std::thread::spawn(move || (0..2).for_each(|_| go.send(()).expect("a save")));
    // Waits for the first save, which is committed when this returns.
    saver.save(snapshot(20))?;
    assert!(saver.saved_step() >= 10);
    saver.finish()?;
    goes.join().expect("both are gone");
    assert_eq!(latest_step(&run)?, Some(20));
    Ok(())
}

fn a_wrong_shape_is_rejected_before_the_model_changes() -> Outcome {
    let (_folder, run) = local_store();
    let mut saver = saver(&run, ALL)?;
    for spoil in [
        (|s: &mut Snapshot| s.tensors[0].shape = vec![6]) as fn(&mut Snapshot),
        |s| s.tensors[1].name = "weight.a".into(),
        |s| s.tensors[1].name = "__metadata__".into(),
    ] {
        let mut corrupt = snapshot(10);
        spoil(&mut corrupt);
        assert_eq!(saver.save(corrupt).expect_err("it cannot be read back").code, ExitCode::Failed);
    }
    saver.finish()?;
    assert!(run.list_folders("checkpoints")?.is_empty());
    Ok(())
}

fn a_url_may_name_a_run_or_one_checkpoint() -> Outcome {
    let (_folder, run) = local_store();
    assert_eq!(load_from_url(&run.url()).map(|l| l.manifest.step).expect_err("empty").code, ExitCode::Usage);
    save_steps(&run, ALL, &[10, 20])?;
    assert_eq!(load_from_url(&run.url())?.manifest.step, 20);
    assert_eq!(load_from_url(&run.subfolder(&step_folder(10)).url())?.manifest.step, 10);
    assert_eq!(
        load_from_url(run.subfolder(&step_folder(10)).local_path().expect("a folder").to_str().expect("UTF-8"))?
            .manifest
            .step,
        10
    );
    flip_byte(&run, &part_paths(&run, 10)?[0], 0.5)?;
    assert_eq!(
        load_from_url(&run.subfolder(&step_folder(10)).url()).map(|l| l.manifest.step).expect_err("damaged").code,
        ExitCode::Checkpoint
    );
    Ok(())
}
