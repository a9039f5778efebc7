//! Tests of the lease: one writer per run.

use crate::data::store::local_store;
use crate::support::Outcome;
use occlude::checkpoint::lease::Lease;
use occlude::data::store::Store;
use occlude::error::ExitCode;
use serde_json::{Value, json};
use std::sync::Barrier;
use std::time::{Duration, Instant};

crate::trials![
    exactly_one_of_two_jobs_acquires_the_lease,
    a_dead_local_holder_is_replaced_at_once,
    a_holder_with_a_reused_pid_is_dead,
    a_silent_holder_is_replaced_after_one_ttl,
    a_live_holder_is_named_in_the_error,
    a_process_in_another_pid_namespace_is_not_considered_dead,
    a_released_lease_is_free_at_once_and_the_epoch_increases,
    a_holder_that_lost_the_lease_detects_it_and_does_not_write,
    a_deleted_lease_is_lost,
    a_damaged_lease_expires,
];

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(600);

/// Changes fields of the newest lease file.
pub fn edit_lease(run: &Store, fields: &[(&str, Value)]) -> Outcome {
    let (path, _) = run.list("lease")?.into_iter().rfind(|(path, _)| path.ends_with(".json")).expect("a lease");
    let mut record: Value = serde_json::from_slice(&run.get(&path)?)?;
    for (name, value) in fields {
        assert!(record.get(name).is_some(), "no field {name}");
        record[name] = value.clone();
    }
    run.put(&path, &serde_json::to_vec(&record)?)?;
    Ok(())
}

/// Returns a process id that was in use a moment ago.
fn dead_pid() -> Result<u32, std::io::Error> {
    let mut child = std::process::Command::new("true").spawn()?;
    child.wait()?;
    Ok(child.id())
}

fn exactly_one_of_two_jobs_acquires_the_lease() -> Outcome {
    let (_folder, run) = local_store();
    for round in 0..50 {
        let run = run.subfolder(&format!("run-{round}"));
        let start = Barrier::new(2);
        let end = Barrier::new(2);
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let job = || {
                start.wait();
                let outcome = Lease::acquire(&run, LONG);
                end.wait();
                outcome.map(|lease| lease.epoch())
            };
            let jobs = [scope.spawn(job), scope.spawn(job)];
            jobs.into_iter().map(|job| job.join().expect("a job")).collect()
        });
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "round {round}: {outcomes:?}");
        let error = outcomes.into_iter().find_map(Result::err).expect("a loser");
        assert_eq!(error.code, ExitCode::LeaseHeld);
        assert!(error.message.contains(&format!("process {} on", std::process::id())), "{error}");
    }
    Ok(())
}

fn a_dead_local_holder_is_replaced_at_once() -> Outcome {
    let (_folder, run) = local_store();
    let _first = Lease::acquire(&run, LONG)?;
    edit_lease(&run, &[("pid", json!(dead_pid()?))])?;
    let start = Instant::now();
    assert_eq!(Lease::acquire(&run, LONG)?.epoch(), 2);
    assert!(start.elapsed() < LONG / 10);
    Ok(())
}

fn a_holder_with_a_reused_pid_is_dead() -> Outcome {
    let (_folder, run) = local_store();
    let _first = Lease::acquire(&run, LONG)?;
    edit_lease(&run, &[("started", json!(1))])?;
    let start = Instant::now();
    assert_eq!(Lease::acquire(&run, LONG)?.epoch(), 2);
    assert!(start.elapsed() < LONG / 10);
    Ok(())
}

fn a_silent_holder_is_replaced_after_one_ttl() -> Outcome {
    let (_folder, run) = local_store();
    // The first holder refreshes every 20 s, which is far too seldom for the second.
    let _first = Lease::acquire(&run, LONG)?;
    edit_lease(&run, &[("host", json!("elsewhere"))])?;
    let start = Instant::now();
    assert_eq!(Lease::acquire(&run, SHORT)?.epoch(), 2);
    assert!(start.elapsed() >= SHORT, "taken over after {:?}", start.elapsed());
    Ok(())
}

fn a_live_holder_is_named_in_the_error() -> Outcome {
    let (_folder, run) = local_store();
    let first = Lease::acquire(&run, SHORT)?;
    edit_lease(
        &run,
        &[("host", json!("elsewhere")), ("pid", json!(4711)), ("since", json!("2026-01-31 23:59:59 UTC"))],
    )?;
    // Longer than the period of the first holder, so that a slow disk cannot make it look silent.
    let error = Lease::acquire(&run, 5 * SHORT).expect_err("it is held");
    assert_eq!(error.code, ExitCode::LeaseHeld);
    assert!(error.message.contains("process 4711 on elsewhere since 2026-01-31 23:59:59 UTC"), "{error}");
    assert!(first.is_held());
    Ok(())
}

fn a_process_in_another_pid_namespace_is_not_considered_dead() -> Outcome {
    let (_folder, run) = local_store();
    let _first = Lease::acquire(&run, SHORT)?;
    edit_lease(&run, &[("pid", json!(dead_pid()?)), ("namespace", json!("pid:[1]"))])?;
    assert_eq!(Lease::acquire(&run, 5 * SHORT).expect_err("it is held").code, ExitCode::LeaseHeld);
    Ok(())
}

fn a_released_lease_is_free_at_once_and_the_epoch_increases() -> Outcome {
    let (_folder, run) = local_store();
    for epoch in 1..=3 {
        let start = Instant::now();
        let lease = Lease::acquire(&run, LONG)?;
        assert_eq!(lease.epoch(), epoch);
        assert!(lease.is_held());
        assert!(start.elapsed() < LONG / 10);
        let names: Vec<_> = run.list("lease")?.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [format!("lease/{epoch:06}.beat"), format!("lease/{epoch:06}.json")], "old files are left");
    }
    let record: Value = serde_json::from_slice(&run.get("lease/000003.json")?)?;
    let since = record["since"].as_str().expect("a date").to_owned();
    let now = std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]).output()?.stdout;
    assert!(since.starts_with(String::from_utf8_lossy(&now).trim()) && since.ends_with(" UTC"), "{since}");
    Ok(())
}

fn a_holder_that_lost_the_lease_detects_it_and_does_not_write() -> Outcome {
    let (_folder, run) = local_store();
    let first = Lease::acquire(&run, LONG)?;
    first.check()?;
    edit_lease(&run, &[("started", json!(1))])?;
    let second = Lease::acquire(&run, LONG)?;
    let error = first.check().expect_err("it was replaced");
    assert_eq!(error.code, ExitCode::LeaseHeld);
    assert!(error.message.contains("epoch 2"), "{error}");
    assert!(!first.is_held());
    drop(first);
    second.check()?;
    assert_eq!(Lease::acquire(&run, SHORT / 10).map(|lease| lease.epoch()).ok(), Some(3), "a silent holder stays");
    Ok(())
}

fn a_deleted_lease_is_lost() -> Outcome {
    let (_folder, run) = local_store();
    let lease = Lease::acquire(&run, LONG)?;
    run.delete_folder("lease")?;
    assert_eq!(lease.check().expect_err("it is gone").code, ExitCode::LeaseHeld);
    let other = Lease::acquire(&run, LONG)?;
    assert_eq!(other.epoch(), lease.epoch(), "the folder was empty");
    assert_eq!(lease.check().expect_err("the lease of another holder under the same number").code, ExitCode::LeaseHeld);
    other.check()?;
    Ok(())
}

fn a_damaged_lease_expires() -> Outcome {
    let (_folder, run) = local_store();
    run.put("lease/000007.json", b"{ half a rec")?;
    run.put("lease/7.json", b"not a lease's name")?;
    let start = Instant::now();
    assert_eq!(Lease::acquire(&run, SHORT)?.epoch(), 8);
    assert!(start.elapsed() >= SHORT);
    Ok(())
}
