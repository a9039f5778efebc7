//! Tests of the other launchers: the batch file of SLURM on a simulated cluster, the manifests of Kubernetes, and the
//! bundle on a host that has only torch.

use crate::support::training_job::{Run, program, send_signal, shared_data};
use crate::support::{Outcome, oracle, root};
use occlude::bridge::cuda::LIBRARY_FILE;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

crate::trials![
    shellcheck_reports_nothing,
    a_dry_run_prints_the_command_and_starts_nothing,
    slurm_renders_ranks_threads_and_hosts,
    slurm_saves_requeues_and_resumes,
    slurm_starts_ranks_on_every_host_and_does_not_requeue_failures,
    the_mpi_operator_reaches_its_hosts_through_ssh,
    the_manifests_match_the_dockerfile,
    an_invalid_manifest_is_rejected,
    a_bundle_is_reproducible_and_trains_with_an_installed_torch,
];

fn stdout_text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn script(path: &Path, lines: &str) {
    std::fs::write(path, lines).expect("a script");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("to be run");
}

fn shellcheck_reports_nothing() -> Outcome {
    let shell = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().next().is_some_and(|line| line.starts_with("#!") && line.ends_with("sh"))
    };
    let files = |folder: &str| std::fs::read_dir(root().join(folder)).expect("a folder").flatten().map(|at| at.path());
    let scripts: Vec<PathBuf> =
        ["launch", "launch/bench", "launch/cluster", ".ci"].into_iter().flat_map(files).filter(shell).collect();
    assert!(scripts.len() > 5, "{scripts:?}");
    let output = Command::new(root().join(".deps/venv/bin/shellcheck")).args(scripts).output()?;
    assert!(output.status.success(), "{}", stdout_text(&output));
    Ok(())
}

fn a_dry_run_prints_the_command_and_starts_nothing() -> Outcome {
    let folder = tempfile::tempdir()?;
    let witness = folder.path().join("started");
    let touch = format!("touch {}", witness.display());
    for (option, variable) in [(Some("--dry-run"), "0"), (None, "1")] {
        let output = Command::new(root().join("launch/mpirun"))
            .args(option)
            .args(["-n", "3", "-x", "AWS_REGION", "--", "bash", "-c", &touch])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").expect("a PATH"))
            .envs([("OCCLUDE_DRY_RUN", variable), ("OMP_NUM_THREADS", "2")])
            .envs([("AWS_REGION", "r"), ("AWS_SECRET_ACCESS_KEY", "hush")])
            .output()?;
        assert!(output.status.success(), "{}", stdout_text(&output));
        let line = stdout_text(&output);
        let passed_on = "-x AWS_SECRET_ACCESS_KEY -x OMP_NUM_THREADS -x OMP_WAIT_POLICY";
        let options = format!("--bind-to none --oversubscribe {passed_on} -n 3 -x AWS_REGION");
        assert!(line.contains(&format!("/mpirun {options} bash -c 'touch ")), "{line}");
        assert!(!line.contains("hush") && !witness.exists(), "{line}");
    }
    Ok(())
}

/// Two simulated SLURM hosts on this machine. mpirun finds them in the allocation and asks srun for a daemon on each;
/// the stand-in for srun starts them, keeps their folders apart and sets the host name by which MPI distinguishes
/// hosts. The stand-in for scontrol records its arguments.
struct Cluster {
    place: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Cluster {
        let folder = tempfile::tempdir().expect("a folder");
        let at = folder.path().display();
        let srun = "#!/bin/bash
            if [ \"$1\" = --version ]; then echo slurm 23.11.4; exit; fi
            echo \"$SRUN_CPUS_PER_TASK $*\" >> HERE/srun.log
            while [[ \"$1\" == --* ]]; do shift; done
            for id in 0 1; do
              mkdir -p HERE/host-$id
              TMPDIR=HERE/host-$id SLURM_NODEID=$id SLURM_PROCID=$id SLURMD_NODENAME=node$((id + 1)) \"$@\" &
            done
            wait";
        script(&folder.path().join("srun"), &srun.replace("HERE", &at.to_string()));
        script(&folder.path().join("scontrol"), &format!("#!/bin/sh\necho \"$*\" >> {at}/scontrol.log\n"));
        Cluster { place: folder }
    }
    /// Returns the batch file as SLURM starts it, in an allocation of two hosts with two tasks each.
    fn batch(&self, program: &Path) -> Command {
        let path = std::env::var("PATH").expect("a PATH");
        let mut command = Command::new("bash");
        command
            .arg(root().join("launch/cluster/slurm.sbatch"))
            .env("PATH", format!("{}:{path}", self.place.path().display()))
            .env("OCCLUDE_PROGRAM", program)
            .env("SLURM_SUBMIT_DIR", root())
            .envs([("SLURM_JOB_ID", "7"), ("SLURM_JOBID", "7")])
            .envs([("SLURM_NNODES", "2"), ("SLURM_JOB_NUM_NODES", "2")])
            .envs(["SLURM_NODELIST", "SLURM_JOB_NODELIST"].map(|name| (name, "node[1-2]")))
            .envs(["SLURM_TASKS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE"].map(|name| (name, "2(x2)")))
            .envs([("SLURM_NTASKS_PER_NODE", "2"), ("SLURM_CPUS_PER_TASK", "1")])
            .env_remove("OMP_NUM_THREADS")
            .env_remove("OMP_WAIT_POLICY")
            .env_remove("GOMP_SPINCOUNT");
        command
    }
    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.place.path().join(name)).unwrap_or_default()
    }
}

fn slurm_renders_ranks_threads_and_hosts() -> Outcome {
    let cluster = Cluster::new();
    let mut batch = cluster.batch(Path::new(program()));
    let output = batch.args(["--dry-run", "--config", "a b.json"]).env("SLURM_CPUS_PER_TASK", "16").output()?;
    assert!(output.status.success(), "{}", stdout_text(&output));
    let line = stdout_text(&output);
    assert!(line.contains("OMP_NUM_THREADS=16 SRUN_CPUS_PER_TASK=32"), "{line}");
    assert!(line.contains("-x OMP_NUM_THREADS -x OMP_WAIT_POLICY --map-by ppr:2:node /"), "{line}");
    assert!(line.trim_end().ends_with("/occlude train --resume auto --config 'a b.json'"), "{line}");
    assert_eq!(cluster.read("srun.log"), "");
    Ok(())
}

fn slurm_saves_requeues_and_resumes() -> Outcome {
    let cluster = Cluster::new();
    let run = Run::tiny();
    let words = run.words(&[]);
    let batch = || {
        let mut batch = cluster.batch(Path::new(program()));
        batch.args(&words[1..]);
        run.spawn(&mut batch)
    };
    let mut job = batch();
    job.wait_for_step(30);
    send_signal(job.pid(), Signal::USR1);
    let end = job.end(60);
    assert_eq!(end.code, 75, "{}", end.stderr);
    assert_eq!(cluster.read("scontrol.log"), "requeue 7\n");
    let request = cluster.read("srun.log");
    assert!(request.starts_with("2 ") && request.contains("--ntasks=2 prted"), "{request}");
    let end = batch().end(60);
    assert_eq!(end.code, 0, "{}", end.stderr);
    let steps: Vec<u64> = run.lines().iter().map(|line| line.step).collect();
    assert_eq!(steps, (1..=crate::support::training_job::STEPS).collect::<Vec<_>>());
    assert_eq!(cluster.read("scontrol.log"), "requeue 7\n", "a finished job is not requeued");
    Ok(())
}

fn slurm_starts_ranks_on_every_host_and_does_not_requeue_failures() -> Outcome {
    let cluster = Cluster::new();
    let rank = cluster.place.path().join("rank");
    let line = "echo $SLURM_NODEID $OMPI_COMM_WORLD_LOCAL_RANK $OMPI_COMM_WORLD_SIZE $OMP_NUM_THREADS";
    script(&rank, &format!("#!/bin/sh\n{line} >> {}/ranks\nsleep 1\nexit 65\n", cluster.place.path().display()));
    let output = cluster.batch(&rank).args(["--config", "none"]).output()?;
    assert_eq!(output.status.code(), Some(65), "{}", stdout_text(&output));
    let ranks = cluster.read("ranks");
    let ranks: BTreeSet<&str> = ranks.lines().collect();
    assert_eq!(ranks, BTreeSet::from(["0 0 4 1", "0 1 4 1", "1 0 4 1", "1 1 4 1"]), "host, rank, size, threads");
    assert_eq!(cluster.read("scontrol.log"), "");
    Ok(())
}

/// mpirun reaches the workers of the operator through ssh, whose sessions start with a clean environment.
fn the_mpi_operator_reaches_its_hosts_through_ssh() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    std::fs::write(at("hostfile"), "run-worker-0.run.space.svc slots=2\nrun-worker-1.run.space.svc slots=2\n")?;
    let ssh = "#!/bin/bash
        while [[ \"$1\" == -* ]]; do shift; done
        host=$1; shift; mkdir -p HERE/$host
        exec env -i HOME=/ PATH=/usr/bin:/bin TMPDIR=HERE/$host HOST=$host sh -c \"$*\"";
    script(&folder.path().join("ssh"), &ssh.replace("HERE", &at("")));
    // Occasionally a start of two daemons on one host hangs, with all processes of Open MPI waiting. Nothing else is
    // retried.
    let start = || {
        Command::new("timeout")
            .args(["--signal", "KILL", "60"])
            .arg(root().join("launch/mpirun"))
            .args(["--prtemca", "plm_ssh_agent", &at("ssh"), "--hostfile", &at("hostfile"), "--map-by", "ppr:2:node"])
            .args(["--", "sh", "-c", "echo $HOST $OMPI_COMM_WORLD_LOCAL_RANK $OMP_NUM_THREADS $AWS_REGION"])
            .envs([("OMP_NUM_THREADS", "16"), ("AWS_REGION", "mars")])
            .output()
    };
    let mut output = start()?;
    for _ in 0..3 {
        if !matches!(output.status.code(), Some(137) | None) {
            break;
        }
        output = start()?;
    }
    assert!(output.status.success(), "{}", stdout_text(&output));
    let text = String::from_utf8(output.stdout)?;
    let mut ranks: Vec<&str> = text.lines().collect();
    ranks.sort_unstable();
    let want = |worker: u32, rank: u32| format!("run-worker-{worker}.run.space.svc {rank} 16 mars");
    assert_eq!(ranks, [want(0, 0), want(0, 1), want(1, 0), want(1, 1)]);
    Ok(())
}

fn the_manifests_match_the_dockerfile() -> Outcome {
    let files = ["launch/cluster/kubernetes.yaml", "launch/cluster/mpijob.yaml", "launch/cluster/Dockerfile"];
    let files = files.map(|file| root().join(file).to_str().expect("UTF-8").to_owned());
    oracle("manifests.py", &files.each_ref().map(String::as_str))?;
    Ok(())
}

fn an_invalid_manifest_is_rejected() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (name, from, to) in [
        ("mpijob.yaml", "slotsPerWorker: 2", "slotPerWorker: 2"),
        ("mpijob.yaml", "slotsPerWorker: 2", "slotsPerWorker: 3"),
        ("mpijob.yaml", "restartPolicy: OnFailure", "restartPolicy: Always"),
        ("mpijob.yaml", "--grace, \"90\"", "--grace, \"110\""),
        ("mpijob.yaml", "readinessProbe:", "readinesProbe:"),
        ("mpijob.yaml", "tcpSocket: { port: 2222 }", "tcpSocket: { host: a }"),
        ("kubernetes.yaml", "podFailurePolicy:", "podFailPolicy:"),
        ("Dockerfile", "COPY src/ src/", "COPY source/ src/"),
        ("Dockerfile", "--from=builder", "--from=maker"),
        ("Dockerfile", "USER occlude", "USER root"),
    ] {
        let text = std::fs::read_to_string(root().join("launch/cluster").join(name))?;
        assert!(text.contains(from), "{name} has no {from}");
        let path = folder.path().join(name);
        std::fs::write(&path, text.replace(from, to))?;
        assert!(oracle("manifests.py", &[path.to_str().expect("UTF-8")]).is_err(), "{name} with {to} passes");
    }
    Ok(())
}

/// Unpacks a bundle of the program under test and returns the folder.
fn unpack_bundle(folder: &Path) -> PathBuf {
    let archive = |name: &str| {
        let path = folder.join(name);
        let output =
            Command::new(root().join("launch/cluster/bundle")).arg(&path).env("OCCLUDE_PROGRAM", program()).output();
        let output = output.expect("launch/cluster/bundle starts");
        assert!(output.status.success() && stdout_text(&output).contains("archive "), "{}", stdout_text(&output));
        std::fs::read(path).expect("an archive")
    };
    assert!(archive("once.tar.gz") == archive("twice.tar.gz"), "two archives of the same program differ");
    let status = Command::new("tar").arg("-xzf").arg(folder.join("once.tar.gz")).arg("-C").arg(folder).status();
    assert!(status.expect("tar").success());
    let mut folders = std::fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path());
    folders.find(|path| path.is_dir()).expect("the bundle")
}

fn a_bundle_is_reproducible_and_trains_with_an_installed_torch() -> Outcome {
    let folder = tempfile::tempdir()?;
    let bundle = unpack_bundle(folder.path());
    // A host with a Python without torch, and with nothing of this repository on its PATH.
    let tools = tempfile::tempdir()?;
    script(&tools.path().join("python3"), "#!/bin/sh\n[ \"$1\" = -c ] && exit 1\nexec /usr/bin/python3 \"$@\"\n");
    let host = |program: &str, torch: Option<&Path>| {
        let mut command = Command::new(bundle.join(program));
        command.current_dir(&bundle).env_clear().env("PATH", format!("{}:/usr/bin:/bin", tools.path().display()));
        command.env("OMP_NUM_THREADS", "1").envs(torch.map(|torch| ("OCCLUDE_TORCH", torch)));
        command
    };
    let refused = |torch: Option<&Path>, words: &str| {
        let output = host("occlude", torch).arg("--version").output().expect("it starts");
        assert!(output.status.code() == Some(2) && stdout_text(&output).contains(words), "{}", stdout_text(&output));
    };
    refused(None, "no torch on this host");
    refused(Some(folder.path()), "no lib/libtorch_cpu.so is there");
    let old = folder.path().join("old/torch");
    std::fs::create_dir_all(old.join("lib"))?;
    std::fs::write(old.join("lib/libtorch_cpu.so"), "")?;
    std::fs::write(old.join("version.py"), "__version__ = '2.10.0+cpu'\n")?;
    refused(Some(&old), "is torch 2.10.0+cpu; this program is built for 2.11.0");

    let site = root().join(".deps/site").canonicalize()?;
    let output = host("occlude", Some(&site)).arg("doctor").output()?;
    let table = stdout_text(&output);
    let ours = bundle.join("mpi/bin/mpirun");
    assert!(output.status.success() && table.contains(ours.to_str().expect("UTF-8")), "{table}");
    let half = bundle.join("bin").join(LIBRARY_FILE);
    assert_eq!(
        half.exists(),
        Path::new(program()).with_file_name(LIBRARY_FILE).exists(),
        "it is packed with the program"
    );
    assert_eq!(table.contains(half.to_str().expect("UTF-8")), half.exists(), "{table}");

    let run = folder.path().join("run");
    let set = format!("data.train={}", shared_data().join("train").display());
    let output = host("launch/mpirun", Some(&site))
        .args(["-n", "2", "--", "./occlude", "train", "--config", "configs/tiny/mae.json", "--set", &set])
        .args(["--set", "train.epochs=1", "--set", "optim.warmup.epochs=1", "--set", "train.global_batch=100"])
        .args(["--set", "log.image_interval_steps=0", "--run", run.to_str().expect("UTF-8")])
        .output()?;
    assert!(output.status.success(), "{}", stdout_text(&output));
    assert!(run.join("checkpoints/step-00000002/manifest.json").exists(), "{}", stdout_text(&output));
    Ok(())
}
