//! Tests of a disk that fills up while a checkpoint is written.

use crate::checkpoint::save_load::{ALL, latest_step, save_steps, saver, snapshot};
use crate::support::Outcome;
use occlude::checkpoint::*;
use occlude::data::store::Store;
use occlude::error::ExitCode;
use safetensors::Dtype;
use std::process::Command;

crate::trials![; no_tmpfs: a_full_disk_leaves_the_last_checkpoint_intact];

/// Returns why tests that need a small disk are skipped, if they are.
pub fn no_tmpfs() -> Option<&'static str> {
    Tmpfs::mount("1m").is_none().then_some("mounting a tmpfs is not allowed here")
}

/// A small file system in memory; only root can mount it.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    pub fn mount(size: &str) -> Option<Tmpfs> {
        let folder = tempfile::tempdir().ok()?;
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Tmpfs(folder))
    }
    pub fn path(&self) -> &std::path::Path {
        self.0.path()
    }
    pub fn read_only(&self) -> Outcome {
        let mounted = Command::new("mount").args(["-o", "remount,ro"]).arg(self.path()).status()?;
        mounted.success().then_some(()).ok_or_else(|| "the tmpfs stayed writable".into())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}

fn a_full_disk_leaves_the_last_checkpoint_intact() -> Outcome {
    let disk = Tmpfs::mount("2m").ok_or("no tmpfs, though one could be mounted before")?;
    let ballast = disk.0.path().join("ballast");
    let run = Store::open(disk.0.path().to_str().expect("UTF-8"))?.subfolder("run");
    let big = |step, bytes| {
        let tensor = NamedTensor { name: "big".into(), dtype: Dtype::U8, shape: vec![bytes], bytes: vec![7; bytes] };
        let tensors = snapshot(step).tensors.into_iter().chain([tensor]).collect();
        Snapshot { tensors, ..snapshot(step) }
    };
    let fill = ballast.clone();
    let mut saver = saver(&run, ALL)?.with_hook(move |point| {
        // The disk is filled between two parts, after the check of free space.
        if point == SavePoint::BeforePart(2) && fill.with_extension("go").exists() {
            let _ = std::fs::write(&fill, vec![1; 4 << 20]);
        }
        Ok(())
    });
    saver.save(snapshot(10))?;
    saver.save(big(20, 4 << 20))?;
    let error = saver.save(snapshot(21)).expect_err("no free space");
    assert_eq!(error.code, ExitCode::Disk);
    assert!(error.message.contains("step 20") && error.message.contains("free"), "{error}");
    assert!(run.list_folders("checkpoints")? == ["step-00000010"], "a save was started without free space");
    std::fs::write(ballast.with_extension("go"), b"")?;
    saver.save(big(30, 1 << 20))?;
    let error = saver.finish().expect_err("the disk is full");
    assert_eq!(error.code, ExitCode::Disk, "{error}");
    assert!(error.message.contains("-02.safetensors") && error.message.contains("bytes"), "{error}");
    assert_eq!(latest_step(&run)?, Some(10));
    assert_eq!(
        std::fs::read_dir(disk.0.path().join("run").join(step_folder(30)))?.count(),
        0,
        "half-written parts were left"
    );
    for path in [ballast.with_extension("go"), ballast] {
        std::fs::remove_file(path)?;
    }
    save_steps(&run, ALL, &[40])?;
    assert_eq!(latest_step(&run)?, Some(40));
    Ok(())
}
