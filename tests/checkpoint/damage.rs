//! Tests of damaged, hostile and incompatible checkpoints: none is trusted, and none is mistaken for an empty run.

use crate::checkpoint::save_load::{ALL, latest_step, manifest_path, part_paths, save_steps};
use crate::data::store::{FaultyStore, StoreFault, local_store};
use crate::support::Outcome;
use occlude::checkpoint::*;
use occlude::data::store::Store;
use occlude::error::ExitCode;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

crate::trials![
    a_damaged_newest_checkpoint_is_skipped,
    damage_to_the_only_checkpoint_is_not_an_empty_run,
    a_newer_format_version_is_rejected,
    a_hostile_manifest_is_rejected_without_allocating,
    a_failing_store_is_not_an_empty_run,
    only_exact_folder_names_count_as_checkpoints,
];

/// Changes a manifest and recomputes its digest, as an attacker could.
fn forge_manifest(run: &Store, step: u64, change: impl FnOnce(&mut Value)) -> Outcome {
    let mut manifest: Value = serde_json::from_slice(&run.get(&manifest_path(step))?)?;
    change(&mut manifest);
    run.put(&manifest_path(step), seal(&serde_json::to_string_pretty(&manifest)?).as_bytes())?;
    Ok(())
}

type Damage = (&'static str, fn(&Store, u64) -> Outcome);

pub fn flip_byte(run: &Store, path: &str, fraction: f64) -> Outcome {
    let mut bytes = run.get(path)?;
    let at = ((bytes.len() - 1) as f64 * fraction) as usize;
    bytes[at] ^= 1;
    Ok(run.put(path, &bytes)?)
}

const DAMAGE: &[Damage] = &[
    ("is missing", |run, step| Ok(run.delete(&part_paths(run, step)?[1])?)),
    ("digest", |run, step| flip_byte(run, &part_paths(run, step)?[0], 0.0)),
    ("digest", |run, step| flip_byte(run, &part_paths(run, step)?[1], 1.0)),
    ("bytes, not", |run, step| {
        let path = &part_paths(run, step)?[0];
        let bytes = run.get(path)?;
        Ok(run.put(path, &bytes[..bytes.len() / 2])?)
    }),
    ("bytes, not", |run, step| Ok(run.put(&part_paths(run, step)?[0], b"")?)),
    ("manifest is damaged", |run, step| Ok(run.put(&manifest_path(step), b"\0\xff not JSON")?)),
    ("manifest is damaged", |run, step| Ok(run.put(&manifest_path(step), b"")?)),
    ("manifest is damaged", |run, step| {
        let bytes = run.get(&manifest_path(step))?;
        Ok(run.put(&manifest_path(step), &bytes[..bytes.len() - 10])?)
    }),
    ("seal does not match", |run, step| {
        let text = String::from_utf8(run.get(&manifest_path(step))?)?;
        Ok(run.put(&manifest_path(step), text.replace("\"world\": 2", "\"world\": 3").as_bytes())?)
    }),
    ("digest", |run, step| forge_manifest(run, step, |m| m["parts"][0]["blake3"] = json!("0".repeat(64)))),
    ("tensors, not", |run, step| forge_manifest(run, step, |m| m["tensors"] = json!(5))),
    ("is for step", |run, step| forge_manifest(run, step, |m| m["step"] = json!(9))),
    ("unknown field", |run, step| forge_manifest(run, step, |m| m["parts"][0]["other"] = json!(1))),
    ("checkpoint format", |run, step| forge_manifest(run, step, |m| m["format"] = json!(FORMAT_VERSION + 1))),
];

fn a_damaged_newest_checkpoint_is_skipped() -> Outcome {
    for (number, (_, damage)) in DAMAGE.iter().enumerate() {
        let (_folder, run) = local_store();
        save_steps(&run, ALL, &[10, 20])?;
        damage(&run, 20)?;
        assert_eq!(latest_step(&run)?, Some(10), "damage {number}");
        // Training reaches the same step again.
        let second = save_steps(&run, ALL, &[20]);
        if number == DAMAGE.len() - 1 {
            assert!(second.is_err(), "a newer build's checkpoint was overwritten")
        } else {
            assert_eq!((second.is_ok(), latest_step(&run)?), (true, Some(20)), "damage {number}")
        }
    }
    Ok(())
}

fn damage_to_the_only_checkpoint_is_not_an_empty_run() -> Outcome {
    for (number, (says, damage)) in DAMAGE.iter().enumerate() {
        let (_folder, run) = local_store();
        save_steps(&run, ALL, &[20])?;
        damage(&run, 20)?;
        for which in [CheckpointSelector::Latest, CheckpointSelector::Step(20)] {
            let error = load_from_run(&run, which).map(|found| found.is_some()).expect_err("no checkpoint is intact");
            assert_eq!(error.code, ExitCode::Checkpoint, "damage {number}: {error}");
            assert!(error.message.contains(says), "damage {number}: {error}");
        }
    }
    Ok(())
}

fn a_newer_format_version_is_rejected() -> Outcome {
    let (_folder, run) = local_store();
    run.put(&manifest_path(7), br#"{ "format": 9, "build": "occlude 7.0.0", "unheard": "of" }"#)?;
    let error = load_from_run(&run, CheckpointSelector::Latest).map(|found| found.is_some()).expect_err("it is newer");
    assert_eq!(error.code, ExitCode::Checkpoint);
    for part in ["format 9", "occlude 7.0.0", env!("CARGO_PKG_VERSION"), "up to 1"] {
        assert!(error.message.contains(part), "{part}: {error}");
    }
    Ok(())
}

fn a_hostile_manifest_is_rejected_without_allocating() -> Outcome {
    const HUGE: u64 = 1 << 43;
    let attacks: &[Damage] = &[
        ("is not the name", |run, step| {
            forge_manifest(run, step, |m| m["parts"][0]["name"] = json!("../../../secret"))
        }),
        ("is not the name", |run, step| forge_manifest(run, step, |m| m["parts"][0]["name"] = json!("/etc/passwd"))),
        ("nonce", |run, step| {
            forge_manifest(run, step, |m| {
                m["nonce"] = json!("../../secret");
                m["parts"] = json!([{ "name": "../../secret-00.safetensors", "bytes": 1, "blake3": "" }]);
            })
        }),
        ("bytes, not", |run, step| forge_manifest(run, step, |m| m["parts"][0]["bytes"] = json!(u64::MAX))),
        ("tensors, not", |run, step| forge_manifest(run, step, |m| m["tensors"] = json!(u64::MAX))),
        ("of memory", |run, step| {
            let path = run.local_path().expect("a folder").join(&part_paths(run, step)?[0]);
            std::fs::OpenOptions::new().write(true).open(path)?.set_len(HUGE)?;
            forge_manifest(run, step, |m| m["parts"][0]["bytes"] = json!(HUGE))
        }),
        ("more than any manifest", |run, step| {
            let path = run.local_path().expect("a folder").join(manifest_path(step));
            Ok(std::fs::OpenOptions::new().write(true).open(path)?.set_len(HUGE)?)
        }),
        ("recursion", |run, step| {
            Ok(run.put(
                &manifest_path(step),
                format!("{{\"format\":1,\"meta\":{}{}}}", "[".repeat(1 << 20), "]".repeat(1 << 20)).as_bytes(),
            )?)
        }),
        ("not a safetensors file", |run, step| {
            let path = part_paths(run, step)?[0].clone();
            let mut bytes = run.get(&path)?;
            bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
            run.put(&path, &bytes)?;
            let digest = blake3::hash(&bytes).to_hex().to_string();
            forge_manifest(run, step, |m| m["parts"][0]["blake3"] = json!(digest))
        }),
    ];
    for (says, attack) in attacks {
        let (_folder, run) = local_store();
        save_steps(&run, ALL, &[20])?;
        attack(&run, 20)?;
        let start = Instant::now();
        let error = load_from_run(&run, CheckpointSelector::Latest).map(|found| found.is_some()).expect_err(says);
        assert_eq!(error.code, ExitCode::Checkpoint, "{error}");
        assert!(error.message.contains(says), "{says}: {error}");
        assert!(start.elapsed() < Duration::from_secs(2), "{says}: {:?}", start.elapsed());
    }
    Ok(())
}

fn a_failing_store_is_not_an_empty_run() -> Outcome {
    let run = Store::from_backend(Arc::new(FaultyStore::new(StoreFault::ReadsFail)), "memory://");
    assert_eq!(
        load_from_run(&run, CheckpointSelector::Latest).map(|found| found.is_some()).expect_err("no answer").code,
        ExitCode::Store
    );
    // A failing read of parts is not a damaged checkpoint either.
    let run = Store::from_backend(Arc::new(FaultyStore::new(StoreFault::PartsFail)), "memory://");
    save_steps(&run, ALL, &[10])?;
    assert_eq!(
        load_from_run(&run, CheckpointSelector::Latest).map(|found| found.is_some()).expect_err("no answer").code,
        ExitCode::Store
    );
    Ok(())
}

fn only_exact_folder_names_count_as_checkpoints() -> Outcome {
    let (_folder, run) = local_store();
    save_steps(&run, ALL, &[10])?;
    let text = run.get(&manifest_path(10))?;
    for name in ["step-20", "step-000000020", "step-00000020.old", "x-step-00000020", "step-+0000020", "step-00000020 "]
    {
        run.put(&format!("checkpoints/{name}/manifest.json"), &text)?;
    }
    run.put("checkpoints/step-00000030", b"a file")?;
    assert_eq!(latest_step(&run)?, Some(10));
    assert_eq!(step_folder(123_456_789), "checkpoints/step-123456789");
    save_steps(&run, Retention { last: 1, every: None }, &[123_456_789])?;
    assert_eq!(load_from_run(&run, CheckpointSelector::Latest)?.map(|loaded| loaded.manifest.step), Some(123_456_789));
    assert_eq!(run.list_folders("checkpoints")?.len(), 7, "a folder that is not a checkpoint was changed");
    Ok(())
}
