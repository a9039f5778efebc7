//! One writer per run.

use crate::store::local;
use crate::support::Outcome;
use occlude::data::store::Store;
use occlude::fault::Code;
use occlude::run::lease::Lease;
use serde_json::{Value, json};
use std::sync::Barrier;
use std::time::{Duration, Instant};

crate::trials![
    of_two_jobs_exactly_one_takes_the_run,
    a_dead_holder_on_this_host_is_succeeded_at_once,
    a_holder_whose_process_id_was_used_again_is_dead,
    a_silent_holder_is_succeeded_after_one_time_to_live,
    a_holder_that_lives_is_named,
    a_process_of_another_namespace_is_not_taken_for_dead,
    a_released_lease_is_free_at_once_and_epochs_rise,
    a_holder_that_lost_the_run_finds_out_and_does_no_harm,
    a_removed_lease_is_lost,
    a_damaged_lease_is_waited_out,
];

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(600);

/// Changes what the newest lease file says.
pub fn forge(run: &Store, fields: &[(&str, Value)]) -> Outcome {
    let (path, _) = run.list("lease")?.into_iter().rfind(|(path, _)| path.ends_with(".json")).expect("a lease");
    let mut record: Value = serde_json::from_slice(&run.get(&path)?)?;
    for (name, value) in fields {
        assert!(record.get(name).is_some(), "no field {name}");
        record[name] = value.clone();
    }
    run.put(&path, &serde_json::to_vec(&record)?)?;
    Ok(())
}

/// A process id that was in use a moment ago.
fn dead() -> Result<u32, std::io::Error> {
    let mut child = std::process::Command::new("true").spawn()?;
    child.wait()?;
    Ok(child.id())
}

fn of_two_jobs_exactly_one_takes_the_run() -> Outcome {
    let (_folder, run) = local();
    for round in 0..50 {
        let run = run.at(&format!("run-{round}"));
        let (start, end) = (Barrier::new(2), Barrier::new(2));
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
        let fault = outcomes.into_iter().find_map(Result::err).expect("a loser");
        assert_eq!(fault.code, Code::Held);
        assert!(fault.message.contains(&format!("process {} on", std::process::id())), "{fault}");
    }
    Ok(())
}

fn a_dead_holder_on_this_host_is_succeeded_at_once() -> Outcome {
    let (_folder, run) = local();
    let _first = Lease::acquire(&run, LONG)?;
    forge(&run, &[("pid", json!(dead()?))])?;
    let begun = Instant::now();
    assert_eq!(Lease::acquire(&run, LONG)?.epoch(), 2);
    assert!(begun.elapsed() < LONG / 10);
    Ok(())
}

fn a_holder_whose_process_id_was_used_again_is_dead() -> Outcome {
    let (_folder, run) = local();
    let _first = Lease::acquire(&run, LONG)?;
    forge(&run, &[("started", json!(1))])?;
    let begun = Instant::now();
    assert_eq!(Lease::acquire(&run, LONG)?.epoch(), 2);
    assert!(begun.elapsed() < LONG / 10);
    Ok(())
}

fn a_silent_holder_is_succeeded_after_one_time_to_live() -> Outcome {
    let (_folder, run) = local();
    // The first holder beats every 20 s, far too seldom for the second.
    let _first = Lease::acquire(&run, LONG)?;
    forge(&run, &[("host", json!("elsewhere"))])?;
    let begun = Instant::now();
    assert_eq!(Lease::acquire(&run, SHORT)?.epoch(), 2);
    assert!(begun.elapsed() >= SHORT, "taken over after {:?}", begun.elapsed());
    Ok(())
}

fn a_holder_that_lives_is_named() -> Outcome {
    let (_folder, run) = local();
    let first = Lease::acquire(&run, SHORT)?;
    forge(&run, &[("host", json!("elsewhere")), ("pid", json!(4711)), ("since", json!("2026-01-31 23:59:59 UTC"))])?;
    // Longer than the first's own, so that a slow disk here cannot make it look silent.
    let fault = Lease::acquire(&run, 5 * SHORT).expect_err("it is held");
    assert_eq!(fault.code, Code::Held);
    assert!(fault.message.contains("process 4711 on elsewhere since 2026-01-31 23:59:59 UTC"), "{fault}");
    assert!(first.still_mine());
    Ok(())
}

fn a_process_of_another_namespace_is_not_taken_for_dead() -> Outcome {
    let (_folder, run) = local();
    let _first = Lease::acquire(&run, SHORT)?;
    forge(&run, &[("pid", json!(dead()?)), ("namespace", json!("pid:[1]"))])?;
    assert_eq!(Lease::acquire(&run, 5 * SHORT).expect_err("it is held").code, Code::Held);
    Ok(())
}

fn a_released_lease_is_free_at_once_and_epochs_rise() -> Outcome {
    let (_folder, run) = local();
    for epoch in 1..=3 {
        let begun = Instant::now();
        let lease = Lease::acquire(&run, LONG)?;
        assert_eq!(lease.epoch(), epoch);
        assert!(lease.still_mine());
        assert!(begun.elapsed() < LONG / 10);
        let names: Vec<_> = run.list("lease")?.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [format!("lease/{epoch:06}.beat"), format!("lease/{epoch:06}.json")], "old files are left");
    }
    let record: Value = serde_json::from_slice(&run.get("lease/000003.json")?)?;
    let since = record["since"].as_str().expect("a date").to_owned();
    let now = std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]).output()?.stdout;
    assert!(since.starts_with(String::from_utf8_lossy(&now).trim()) && since.ends_with(" UTC"), "{since}");
    Ok(())
}

fn a_holder_that_lost_the_run_finds_out_and_does_no_harm() -> Outcome {
    let (_folder, run) = local();
    let first = Lease::acquire(&run, LONG)?;
    first.check()?;
    forge(&run, &[("started", json!(1))])?;
    let second = Lease::acquire(&run, LONG)?;
    let fault = first.check().expect_err("it was succeeded");
    assert_eq!(fault.code, Code::Held);
    assert!(fault.message.contains("epoch 2"), "{fault}");
    assert!(!first.still_mine());
    drop(first);
    second.check()?;
    assert_eq!(Lease::acquire(&run, SHORT / 10).map(|lease| lease.epoch()).ok(), Some(3), "a silent holder stays");
    Ok(())
}

fn a_removed_lease_is_lost() -> Outcome {
    let (_folder, run) = local();
    let lease = Lease::acquire(&run, LONG)?;
    run.delete_folder("lease")?;
    assert_eq!(lease.check().expect_err("it is gone").code, Code::Held);
    let other = Lease::acquire(&run, LONG)?;
    assert_eq!(other.epoch(), lease.epoch(), "the folder was empty");
    assert_eq!(lease.check().expect_err("another's under the same number").code, Code::Held);
    other.check()?;
    Ok(())
}

fn a_damaged_lease_is_waited_out() -> Outcome {
    let (_folder, run) = local();
    run.put("lease/000007.json", b"{ half a rec")?;
    run.put("lease/7.json", b"not a lease's name")?;
    let begun = Instant::now();
    assert_eq!(Lease::acquire(&run, SHORT)?.epoch(), 8);
    assert!(begun.elapsed() >= SHORT);
    Ok(())
}
