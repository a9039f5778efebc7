//! A disk that fills up while a checkpoint is written.

use crate::checkpoint::{ALL, latest, saver, snapshot, write};
use crate::support::{Outcome, skipped, trial};
use libtest_mimic::Trial;
use occlude::data::store::Store;
use occlude::fault::Code;
use occlude::run::checkpoint::*;
use safetensors::Dtype;
use std::process::Command;

pub fn trials() -> Vec<Trial> {
    let name = "full_disk::a_full_disk_leaves_the_last_checkpoint_whole";
    match Tmpfs::mount("2m") {
        Some(_) => vec![trial(name, a_full_disk_leaves_the_last_checkpoint_whole)],
        None => vec![skipped(name, "mounting a tmpfs is not allowed here")],
    }
}

/// A small file system in memory, which only root can make.
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

fn a_full_disk_leaves_the_last_checkpoint_whole() -> Outcome {
    let disk = Tmpfs::mount("2m").ok_or("no tmpfs, though one could be mounted before")?;
    let ballast = disk.0.path().join("ballast");
    let run = Store::open(disk.0.path().to_str().expect("UTF-8"))?.at("run");
    let big = |step, bytes| {
        let tensor = Named { name: "big".into(), dtype: Dtype::U8, shape: vec![bytes], bytes: vec![7; bytes] };
        let tensors = snapshot(step).tensors.into_iter().chain([tensor]).collect();
        Snapshot { tensors, ..snapshot(step) }
    };
    let fill = ballast.clone();
    let mut saver = saver(&run, ALL)?.with_faults(move |point| {
        // After the look at the free space, somebody else fills the disk between two parts.
        if point == Point::BeforePart(2) && fill.with_extension("go").exists() {
            let _ = std::fs::write(&fill, vec![1; 4 << 20]);
        }
        Ok(())
    });
    saver.save(snapshot(10))?;
    saver.save(big(20, 4 << 20))?;
    let fault = saver.save(snapshot(21)).expect_err("no room");
    assert_eq!(fault.code, Code::Disk);
    assert!(fault.message.contains("step 20") && fault.message.contains("free"), "{fault}");
    assert!(run.folders("checkpoints")? == ["step-00000010"], "a save without room was begun");
    std::fs::write(ballast.with_extension("go"), b"")?;
    saver.save(big(30, 1 << 20))?;
    let fault = saver.finish().expect_err("the disk is full");
    assert_eq!(fault.code, Code::Disk, "{fault}");
    assert!(fault.message.contains("-02.safetensors") && fault.message.contains("bytes"), "{fault}");
    assert_eq!(latest(&run)?, Some(10));
    assert_eq!(std::fs::read_dir(disk.0.path().join("run").join(folder(30)))?.count(), 0, "half-written parts stayed");
    for path in [ballast.with_extension("go"), ballast] {
        std::fs::remove_file(path)?;
    }
    write(&run, ALL, &[40])?;
    assert_eq!(latest(&run)?, Some(40));
    Ok(())
}
