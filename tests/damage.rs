//! Checkpoints that are damaged, hostile or of another build: none is trusted, none is taken for an empty run.

use crate::checkpoint::{ALL, latest, manifest_path, parts, write};
use crate::store::{Liar, Lie, local};
use crate::support::Outcome;
use occlude::data::store::Store;
use occlude::fault::Code;
use occlude::run::checkpoint::*;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

crate::trials![
    a_damaged_newest_is_passed_over,
    damage_to_the_only_checkpoint_is_not_an_empty_run,
    a_newer_format_is_refused_by_name,
    a_hostile_manifest_is_refused_without_allocating,
    a_store_that_fails_is_not_an_empty_run,
    only_exact_folder_names_are_checkpoints,
];

/// Changes a manifest and seals it anew, as somebody would who knows how.
fn forge_manifest(run: &Store, step: u64, change: impl FnOnce(&mut Value)) -> Outcome {
    let mut manifest: Value = serde_json::from_slice(&run.get(&manifest_path(step))?)?;
    change(&mut manifest);
    run.put(&manifest_path(step), seal(&serde_json::to_string_pretty(&manifest)?).as_bytes())?;
    Ok(())
}

type Damage = (&'static str, fn(&Store, u64) -> Outcome);

pub fn flip(run: &Store, path: &str, share: f64) -> Outcome {
    let mut bytes = run.get(path)?;
    let at = ((bytes.len() - 1) as f64 * share) as usize;
    bytes[at] ^= 1;
    Ok(run.put(path, &bytes)?)
}

const DAMAGE: &[Damage] = &[
    ("is missing", |run, step| Ok(run.delete(&parts(run, step)?[1])?)),
    ("digest", |run, step| flip(run, &parts(run, step)?[0], 0.0)),
    ("digest", |run, step| flip(run, &parts(run, step)?[1], 1.0)),
    ("bytes, not", |run, step| {
        let path = &parts(run, step)?[0];
        let bytes = run.get(path)?;
        Ok(run.put(path, &bytes[..bytes.len() / 2])?)
    }),
    ("bytes, not", |run, step| Ok(run.put(&parts(run, step)?[0], b"")?)),
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
    ("checkpoint format", |run, step| forge_manifest(run, step, |m| m["format"] = json!(FORMAT + 1))),
];

fn a_damaged_newest_is_passed_over() -> Outcome {
    for (number, (_, damage)) in DAMAGE.iter().enumerate() {
        let (_folder, run) = local();
        write(&run, ALL, &[10, 20])?;
        damage(&run, 20)?;
        assert_eq!(latest(&run)?, Some(10), "damage {number}");
        // Training comes by the same step again.
        let again = write(&run, ALL, &[20]);
        match number == DAMAGE.len() - 1 {
            true => assert!(again.is_err(), "a newer build's checkpoint was overwritten"),
            false => assert_eq!((again.is_ok(), latest(&run)?), (true, Some(20)), "damage {number}"),
        }
    }
    Ok(())
}

fn damage_to_the_only_checkpoint_is_not_an_empty_run() -> Outcome {
    for (number, (says, damage)) in DAMAGE.iter().enumerate() {
        let (_folder, run) = local();
        write(&run, ALL, &[20])?;
        damage(&run, 20)?;
        for which in [Which::Latest, Which::Step(20)] {
            let fault = find(&run, which).map(|found| found.is_some()).expect_err("nothing is whole");
            assert_eq!(fault.code, Code::Checkpoint, "damage {number}: {fault}");
            assert!(fault.message.contains(says), "damage {number}: {fault}");
        }
    }
    Ok(())
}

fn a_newer_format_is_refused_by_name() -> Outcome {
    let (_folder, run) = local();
    run.put(&manifest_path(7), br#"{ "format": 9, "build": "occlude 7.0.0", "unheard": "of" }"#)?;
    let fault = find(&run, Which::Latest).map(|found| found.is_some()).expect_err("it is newer");
    assert_eq!(fault.code, Code::Checkpoint);
    for part in ["format 9", "occlude 7.0.0", env!("CARGO_PKG_VERSION"), "up to 1"] {
        assert!(fault.message.contains(part), "{part}: {fault}");
    }
    Ok(())
}

fn a_hostile_manifest_is_refused_without_allocating() -> Outcome {
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
            let path = run.local().expect("a folder").join(&parts(run, step)?[0]);
            std::fs::OpenOptions::new().write(true).open(path)?.set_len(HUGE)?;
            forge_manifest(run, step, |m| m["parts"][0]["bytes"] = json!(HUGE))
        }),
        ("more than any manifest", |run, step| {
            let path = run.local().expect("a folder").join(manifest_path(step));
            Ok(std::fs::OpenOptions::new().write(true).open(path)?.set_len(HUGE)?)
        }),
        ("recursion", |run, step| {
            Ok(run.put(
                &manifest_path(step),
                format!("{{\"format\":1,\"meta\":{}{}}}", "[".repeat(1 << 20), "]".repeat(1 << 20)).as_bytes(),
            )?)
        }),
        ("not a safetensors file", |run, step| {
            let path = parts(run, step)?[0].clone();
            let mut bytes = run.get(&path)?;
            bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
            run.put(&path, &bytes)?;
            let digest = blake3::hash(&bytes).to_hex().to_string();
            forge_manifest(run, step, |m| m["parts"][0]["blake3"] = json!(digest))
        }),
    ];
    for (says, attack) in attacks {
        let (_folder, run) = local();
        write(&run, ALL, &[20])?;
        attack(&run, 20)?;
        let begun = Instant::now();
        let fault = find(&run, Which::Latest).map(|found| found.is_some()).expect_err(says);
        assert_eq!(fault.code, Code::Checkpoint, "{fault}");
        assert!(fault.message.contains(says), "{says}: {fault}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{says}: {:?}", begun.elapsed());
    }
    Ok(())
}

fn a_store_that_fails_is_not_an_empty_run() -> Outcome {
    let run = Store::over(Arc::new(Liar::new(Lie::ReadsFail)), "memory://");
    assert_eq!(find(&run, Which::Latest).map(|found| found.is_some()).expect_err("no answer").code, Code::Store);
    // Nor is it a damaged checkpoint.
    let run = Store::over(Arc::new(Liar::new(Lie::PartsFail)), "memory://");
    write(&run, ALL, &[10])?;
    assert_eq!(find(&run, Which::Latest).map(|found| found.is_some()).expect_err("no answer").code, Code::Store);
    Ok(())
}

fn only_exact_folder_names_are_checkpoints() -> Outcome {
    let (_folder, run) = local();
    write(&run, ALL, &[10])?;
    let text = run.get(&manifest_path(10))?;
    for name in ["step-20", "step-000000020", "step-00000020.old", "x-step-00000020", "step-+0000020", "step-00000020 "]
    {
        run.put(&format!("checkpoints/{name}/manifest.json"), &text)?;
    }
    run.put("checkpoints/step-00000030", b"a file")?;
    assert_eq!(latest(&run)?, Some(10));
    assert_eq!(folder(123_456_789), "checkpoints/step-123456789");
    write(&run, Keep { last: 1, every: None }, &[123_456_789])?;
    assert_eq!(find(&run, Which::Latest)?.map(|loaded| loaded.manifest.step), Some(123_456_789));
    assert_eq!(run.folders("checkpoints")?.len(), 7, "what is no checkpoint was touched");
    Ok(())
}
