//! Checkpoints: to the bit, whole or not at all, and never one too many.

use crate::damage::flip;
use crate::lease::forge;
use crate::store::{Liar, Lie, local};
use crate::support::Outcome;
use occlude::data::store::Store;
use occlude::fault::{Code, Fault};
use occlude::run::checkpoint::*;
use occlude::run::lease::Lease;
use rustix::process::{Pid, Signal, kill_process};
use safetensors::Dtype;
use serde_json::json;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

crate::trials![
    a_checkpoint_comes_back_to_the_bit,
    a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint,
    a_failed_save_is_told_at_the_next_call_and_leaves_nothing,
    the_last_and_every_so_many_stay,
    a_checkpoint_that_cannot_be_removed_whole_is_none_any_more,
    what_dead_attempts_left_is_collected,
    a_stale_writer_stops_and_its_checkpoint_is_ignored,
    a_frozen_writer_that_wakes_stops_with_73,
    a_run_taken_back_goes_on_from_where_it_was_taken,
    checkpoints_copied_without_their_lease_stay_older,
    a_save_runs_while_training_goes_on,
    a_wrong_shape_is_refused_before_anything_is_written,
    a_user_may_point_at_a_run_or_at_one_checkpoint,
];

const LONG: Duration = Duration::from_secs(60);
pub const ALL: Keep = Keep { last: 100, every: None };
/// Names the child's task when a case runs this binary again.
const CHILD: &str = "OCCLUDE_TEST_CHILD";
const FOLDER: &str = "OCCLUDE_TEST_FOLDER";

pub fn saver(run: &Store, keep: Keep) -> Result<Saver, Fault> {
    Ok(Saver::new(run.clone(), keep, Arc::new(Lease::acquire(run, LONG)?))?.with_part_bytes(200))
}

/// Four tensors that fill two parts of 200 bytes: odd bits, an empty one, a scalar.
pub fn snapshot(step: u64) -> Snapshot {
    let named =
        |name: &str, dtype, shape: &[usize], bytes| Named { name: name.into(), dtype, shape: shape.to_vec(), bytes };
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

/// Saves these steps, one lease for all.
pub fn write(run: &Store, keep: Keep, steps: &[u64]) -> Outcome {
    let mut saver = saver(run, keep)?;
    for &step in steps {
        saver.save(snapshot(step))?;
    }
    Ok(saver.finish()?)
}

pub fn latest(run: &Store) -> Result<Option<u64>, Fault> {
    Ok(find(run, Which::Latest)?.map(|loaded| {
        assert_same(&loaded, &snapshot(loaded.manifest.step));
        loaded.manifest.step
    }))
}

fn assert_same(loaded: &Loaded, wanted: &Snapshot) {
    assert_eq!(loaded.tensors.len(), wanted.tensors.len());
    for tensor in &wanted.tensors {
        assert_eq!(loaded.tensors.get(&tensor.name), Some(tensor));
    }
}

pub fn parts(run: &Store, step: u64) -> Result<Vec<String>, Fault> {
    let files = run.list(&folder(step))?.into_iter().map(|(path, _)| path);
    Ok(files.filter(|path| path.ends_with(".safetensors")).collect())
}

pub fn manifest_path(step: u64) -> String {
    format!("{}/manifest.json", folder(step))
}

/// Runs one case of this binary in a process of its own.
fn again(case: &str, task: &str, run: &Store) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["--exact", &format!("checkpoint::{case}"), "--test-threads", "1"])
        .env(CHILD, task)
        .env(FOLDER, run.url())
        .stdout(std::process::Stdio::null())
        .spawn()
}

fn task() -> Option<(String, Store)> {
    let task = std::env::var(CHILD).ok()?;
    Some((task, Store::open(&std::env::var(FOLDER).expect("a folder")).expect("a store")))
}

fn a_checkpoint_comes_back_to_the_bit() -> Outcome {
    let (_folder, run) = local();
    assert!(find(&run, Which::Latest)?.is_none());
    write(&run, ALL, &[10, 20])?;
    assert_eq!(parts(&run, 20)?.len(), 2);
    let loaded = find(&run, Which::Latest)?.expect("a checkpoint");
    assert_same(&loaded, &snapshot(20));
    let manifest = &loaded.manifest;
    assert_eq!((manifest.step, manifest.samples, manifest.world, manifest.epoch), (20, 1280, 2, 1));
    assert_eq!(manifest.meta, snapshot(20).meta);
    let before = blake3::hash(&run.get(&manifest_path(10))?).to_hex().to_string();
    assert_eq!(manifest.previous.as_deref(), Some(before.as_str()), "the chain is broken");
    assert_same(&find(&run, Which::Step(10))?.expect("it is there"), &snapshot(10));
    assert!(find(&run, Which::Step(15))?.is_none());
    // The next writer goes on with the chain.
    assert_eq!(saver(&run, ALL)?.saved(), 20);
    Ok(())
}

/// Each child is killed by SIGKILL at its point while it writes step 20 over a whole step 10.
fn a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint() -> Outcome {
    let points =
        [Point::BeforePart(0), Point::BeforePart(1), Point::AfterParts, Point::AfterManifest, Point::Retention];
    if let Some((task, run)) = task() {
        let mut saver = saver(&run, Keep { last: 1, every: None })?.with_faults(move |point| {
            if format!("{point:?}") == task {
                kill_process(rustix::process::getpid(), Signal::KILL).expect("killed");
            }
            Ok(())
        });
        saver.save(snapshot(20))?;
        return Ok(saver.finish()?);
    }
    for point in points {
        let (_folder, run) = local();
        write(&run, ALL, &[10])?;
        let status =
            again("a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint", &format!("{point:?}"), &run)?.wait()?;
        assert!(
            std::os::unix::process::ExitStatusExt::signal(&status) == Some(9),
            "{point:?} was not reached: {status}"
        );
        let committed = matches!(point, Point::AfterManifest | Point::Retention);
        assert_eq!(latest(&run)?, Some(if committed { 20 } else { 10 }), "{point:?}");
        // The next job takes over at once (the holder is dead) and clears up.
        write(&run, Keep { last: 1, every: None }, &[20, 30])?;
        assert_eq!(latest(&run)?, Some(30), "{point:?}");
        assert_eq!(run.folders("checkpoints")?, ["step-00000030"], "{point:?}");
    }
    Ok(())
}

fn a_failed_save_is_told_at_the_next_call_and_leaves_nothing() -> Outcome {
    for at in [Point::BeforePart(0), Point::BeforePart(1), Point::AfterParts] {
        let (_folder, run) = local();
        let attempts = std::sync::atomic::AtomicUsize::new(0);
        let mut saver = saver(&run, ALL)?.with_faults(move |point| {
            let second = point == at && attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1;
            if second { Err(Fault::new(Code::Disk, "no space left")) } else { Ok(()) }
        });
        saver.save(snapshot(10))?;
        saver.save(snapshot(20))?;
        assert_eq!(saver.save(snapshot(30)).expect_err("step 20 failed").code, Code::Disk, "{at:?}");
        assert_eq!(saver.saved(), 10);
        assert_eq!(latest(&run)?, Some(10));
        assert!(parts(&run, 20)?.is_empty(), "{at:?}: parts were left");
        saver.save(snapshot(30))?;
        saver.finish()?;
        assert_eq!(latest(&run)?, Some(30));
        assert_eq!(run.folders("checkpoints")?, ["step-00000010", "step-00000030"]);
    }
    Ok(())
}

fn the_last_and_every_so_many_stay() -> Outcome {
    let steps: Vec<u64> = (1..=10).map(|i| i * 10).collect();
    for (keep, stay) in [
        (Keep { last: 2, every: Some(40) }, vec![40, 80, 90, 100]),
        (Keep { last: 3, every: None }, vec![80, 90, 100]),
        (Keep { last: 0, every: None }, vec![100]),
    ] {
        let (_folder, run) = local();
        write(&run, keep, &steps)?;
        assert_eq!(run.folders("checkpoints")?, stay.iter().map(|s| format!("step-{s:08}")).collect::<Vec<_>>());
        for step in stay {
            assert!(find(&run, Which::Step(step))?.is_some());
        }
    }
    Ok(())
}

/// The manifest goes first, so that no half-removed checkpoint can be read; and the save that removes is no failure.
fn a_checkpoint_that_cannot_be_removed_whole_is_none_any_more() -> Outcome {
    let run = Store::over(Arc::new(Liar::new(Lie::PartsStay)), "memory://");
    write(&run, Keep { last: 1, every: None }, &[10, 20])?;
    assert_eq!(parts(&run, 10)?.len(), 2);
    assert!(find(&run, Which::Step(10))?.is_none());
    assert_eq!(latest(&run)?, Some(20));
    Ok(())
}

fn what_dead_attempts_left_is_collected() -> Outcome {
    let (folder_path, run) = local();
    write(&run, ALL, &[10])?;
    run.put("checkpoints/step-00000015/dead-00.safetensors", b"a part")?;
    std::fs::write(folder_path.path().join("checkpoints/step-00000015/dead-01.safetensors#1"), b"half a part")?;
    run.put("checkpoints/step-00000020/dead-00.safetensors", b"a part of an attempt at the same step")?;
    run.put("checkpoints/step-00000025/dead-00.safetensors", b"a part of an attempt further on")?;
    write(&run, ALL, &[20])?;
    assert_eq!(run.folders("checkpoints")?, ["step-00000010", "step-00000020", "step-00000025"]);
    assert_eq!(parts(&run, 20)?.len(), 2, "a dead part was left");
    assert_eq!(latest(&run)?, Some(20));
    write(&run, ALL, &[30])?;
    assert_eq!(run.folders("checkpoints")?, ["step-00000010", "step-00000020", "step-00000030"]);
    Ok(())
}

/// The stale writer loses the run between its last look at the lease and its manifest: the worst moment.
fn a_stale_writer_stops_and_its_checkpoint_is_ignored() -> Outcome {
    let (_folder, run) = local();
    write(&run, ALL, &[100, 110])?;
    let (heirs, heir) = crossbeam_channel::bounded(1);
    let theirs = run.clone();
    let mut stale = saver(&run, ALL)?.with_faults(move |point| {
        if point == Point::AfterParts {
            forge(&theirs, &[("started", json!(1))]).expect("forged");
            heirs.send(Lease::acquire(&theirs, LONG)?).expect("an heir");
        }
        Ok(())
    });
    stale.save(snapshot(120))?;
    assert_eq!(stale.save(snapshot(130)).expect_err("it lost the run").code, Code::Held);
    assert_eq!(stale.saved(), 110);
    stale.save(snapshot(130))?;
    assert_eq!(stale.finish().expect_err("it lost the run").code, Code::Held);
    assert!(parts(&run, 130)?.is_empty(), "a stale writer wrote on");
    assert!(run.size(&manifest_path(120))?.is_some(), "the case is not the worst one");
    assert_eq!(latest(&run)?, Some(110), "a stale checkpoint was read");
    assert_eq!(find(&run, Which::Step(120)).map(|f| f.is_some()).expect_err("superseded").code, Code::Checkpoint);
    let mut heir = Saver::new(run.clone(), ALL, Arc::new(heir.recv()?))?;
    assert_eq!(heir.saved(), 110);
    heir.save(snapshot(115))?;
    heir.finish()?;
    assert_eq!(latest(&run)?, Some(115));
    assert!(!run.folders("checkpoints")?.contains(&"step-00000120".to_owned()), "it was not collected");
    Ok(())
}

fn a_frozen_writer_that_wakes_stops_with_73() -> Outcome {
    let patience = Duration::from_millis(900);
    if let Some((_, run)) = task() {
        let mut saver = Saver::new(run.clone(), ALL, Arc::new(Lease::acquire(&run, patience)?))?;
        for step in 1.. {
            if let Err(fault) = saver.save(snapshot(step)) {
                std::process::exit(fault.code as i32);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let (_folder, run) = local();
    let mut child = again("a_frozen_writer_that_wakes_stops_with_73", "write", &run)?;
    let begun = Instant::now();
    while latest(&run)?.is_none_or(|step| step < 3) {
        assert!(begun.elapsed() < LONG, "the child writes nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP)?;
    let outcome = (|| -> Outcome {
        let lease = Arc::new(Lease::acquire(&run, patience)?);
        let resumed = latest(&run)?.expect("the child's last");
        let mut heir = Saver::new(run.clone(), ALL, lease)?;
        kill_process(pid, Signal::CONT)?;
        heir.save(snapshot(resumed + 1))?;
        assert_eq!(child.wait()?.code(), Some(73));
        heir.save(snapshot(resumed + 2))?;
        heir.finish()?;
        assert_eq!(find(&run, Which::Latest)?.map(|l| (l.manifest.step, l.manifest.epoch)), Some((resumed + 2, 2)));
        Ok(())
    })();
    let _ = child.kill();
    outcome
}

fn a_run_taken_back_goes_on_from_where_it_was_taken() -> Outcome {
    let (_folder, run) = local();
    write(&run, ALL, &[50, 100])?;
    // The user resumes from step 50; step 100 is of another future now.
    write(&run, ALL, &[75])?;
    assert_eq!(latest(&run)?, Some(75));
    assert_eq!(run.folders("checkpoints")?, ["step-00000050", "step-00000075"]);
    Ok(())
}

fn checkpoints_copied_without_their_lease_stay_older() -> Outcome {
    let (_folder, run) = local();
    for step in [10, 20, 30] {
        write(&run, ALL, &[step])?;
    }
    run.delete_folder("lease")?;
    write(&run, ALL, &[40])?;
    assert_eq!(latest(&run)?, Some(40), "a new lease began below the old ones' epochs");
    Ok(())
}

fn a_save_runs_while_training_goes_on() -> Outcome {
    let (_folder, run) = local();
    let (go, wait) = crossbeam_channel::bounded::<()>(0);
    let mut saver = saver(&run, ALL)?.with_faults(move |point| {
        if point == Point::AfterParts {
            wait.recv().expect("a go");
        }
        Ok(())
    });
    // Returns though the save cannot end yet.
    saver.save(snapshot(10))?;
    assert_eq!(saver.saved(), 0);
    let goes = std::thread::spawn(move || (0..2).for_each(|_| go.send(()).expect("a save")));
    // Waits for the first, which is committed when this returns.
    saver.save(snapshot(20))?;
    assert!(saver.saved() >= 10);
    saver.finish()?;
    goes.join().expect("both went");
    assert_eq!(latest(&run)?, Some(20));
    Ok(())
}

fn a_wrong_shape_is_refused_before_anything_is_written() -> Outcome {
    let (_folder, run) = local();
    let mut saver = saver(&run, ALL)?;
    for spoil in [
        (|s: &mut Snapshot| s.tensors[0].shape = vec![6]) as fn(&mut Snapshot),
        |s| s.tensors[1].name = "weight.a".into(),
        |s| s.tensors[1].name = "__metadata__".into(),
    ] {
        let mut spoiled = snapshot(10);
        spoil(&mut spoiled);
        assert_eq!(saver.save(spoiled).expect_err("it cannot be read back").code, Code::Failed);
    }
    saver.finish()?;
    assert!(run.folders("checkpoints")?.is_empty());
    Ok(())
}

fn a_user_may_point_at_a_run_or_at_one_checkpoint() -> Outcome {
    let (_folder, run) = local();
    assert_eq!(open(&run.url()).map(|l| l.manifest.step).expect_err("empty").code, Code::Usage);
    write(&run, ALL, &[10, 20])?;
    assert_eq!(open(&run.url())?.manifest.step, 20);
    assert_eq!(open(&run.at(&folder(10)).url())?.manifest.step, 10);
    assert_eq!(open(run.at(&folder(10)).local().expect("a folder").to_str().expect("UTF-8"))?.manifest.step, 10);
    flip(&run, &parts(&run, 10)?[0], 0.5)?;
    assert_eq!(open(&run.at(&folder(10)).url()).map(|l| l.manifest.step).expect_err("damaged").code, Code::Checkpoint);
    Ok(())
}
