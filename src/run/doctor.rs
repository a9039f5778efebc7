//! `occlude doctor`: what this machine has, what training on it lacks, and the remedy.
//!
//! The checks only look. Of credentials they tell names of variables and files, never contents.

use crate::bridge::cuda;
use crate::device::nccl::library::Library;
use crate::fault::{Fault, Result};
use crate::op;
use crate::op::launch::{ARCHITECTURES, compile, file_name};
use rustix::process::{Resource, getrlimit};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Ok,
    /// In the way of training on this machine, or of training on the GPU that it has.
    Missing,
    /// Not there, and not needed for training here.
    Absent,
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub struct Check {
    pub what: &'static str,
    pub state: State,
    pub detail: String,
    /// What to do about it; empty where there is nothing to do.
    pub remedy: String,
}

impl Check {
    fn new(what: &'static str, state: State, detail: impl Into<String>, remedy: &str) -> Check {
        Check { what, state, detail: detail.into(), remedy: remedy.into() }
    }
}

/// Prints the table.
///
/// # Errors
/// [`Code::Usage`](crate::fault::Code::Usage), naming what is missing, where training here is not possible.
pub fn doctor() -> Result<()> {
    let checks = checks();
    print!("{}", table(&checks));
    let missing: Vec<_> = checks.iter().filter(|check| check.state == State::Missing).map(|check| check.what).collect();
    if missing.is_empty() {
        println!("Training is possible on this machine.");
        return Ok(());
    }
    Err(Fault::usage(format!("Training here still needs: {}. The remedies stand in the table.", missing.join(", "))))
}

/// Compiles every kernel for every architecture into `folder`, where a bundle keeps them.
pub fn kernels(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| Fault::disk(folder.display(), error))?;
    let mut files = 0;
    for source in op::sources() {
        for variant in (source.variants)() {
            for architecture in ARCHITECTURES {
                let path = folder.join(file_name(source, &variant, architecture)?);
                let cubin = compile(source, &variant, architecture)?.cubin;
                fs::write(&path, cubin).map_err(|error| Fault::disk(path.display(), error))?;
                files += 1;
            }
        }
    }
    println!("{files} programs of kernels in {}", folder.display());
    Ok(())
}

/// One line a check.
pub fn table(checks: &[Check]) -> String {
    let wide = checks.iter().map(|check| check.what.len()).max().unwrap_or(0);
    let line = |check: &Check| {
        let state = match check.state {
            State::Ok => "ok",
            State::Missing => "MISSING",
            State::Absent => "absent, fine",
        };
        let remedy = if check.remedy.is_empty() { String::new() } else { format!("  ->  {}", check.remedy) };
        format!("{:<wide$}  {state:<12}  {}{remedy}\n", check.what, check.detail)
    };
    checks.iter().map(line).collect()
}

/// Looks at everything. libtorch_cuda is to be opened before, as the program does first of all: libtorch answers the
/// question for CUDA once and for good.
pub fn checks() -> Vec<Check> {
    let torch = mapped("libtorch_cpu.so");
    let driver = fs::read_to_string("/proc/driver/nvidia/version").ok();
    let site = torch.as_deref().and_then(|lib| lib.ancestors().nth(3)).map(Path::to_path_buf);
    let gpu = driver.is_some();
    vec![
        libtorch(torch.as_deref()),
        libtorch_cuda(torch.as_deref(), gpu),
        bridge_cuda(gpu),
        driver_and_devices(driver.as_deref()),
        wheel("NVRTC", site.as_deref(), "nvidia/cu13/lib", "libnvrtc.so", gpu),
        nccl(site.as_deref(), gpu),
        mpi_library(),
        mpirun(),
        ffmpeg(),
        credentials(),
        cores(),
        open_files(),
        other_limits(),
        memory(),
        room("shared memory", Path::new("/dev/shm"), 64 << 20, "give the container more shared memory (--shm-size=2g)"),
        room("disk, this folder", Path::new("."), 1 << 30, "free some space, or run in another folder"),
        room("disk, cache folder", &cache(), 1 << 30, "free some space, or point XDG_CACHE_HOME elsewhere"),
    ]
}

/// The file of a library that this process has loaded.
fn mapped(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().filter_map(|line| Some(&line[line.find('/')?..]));
    path.map(Path::new).find(|path| path.file_name().is_some_and(|file| file == name)).map(Path::to_path_buf)
}

fn libtorch(lib: Option<&Path>) -> Check {
    let Some(lib) = lib else {
        return Check::new("libtorch", State::Missing, "libtorch_cpu.so is not loaded", "run launch/setup");
    };
    let version = lib.ancestors().nth(2).and_then(|torch| fs::read_to_string(torch.join("version.py")).ok());
    let version = version.as_deref().and_then(|text| text.split("__version__ = '").nth(1)?.split('\'').next());
    let version = version.unwrap_or("of unknown version");
    let detail = format!("{version}, {} threads, {}", tch::get_num_threads(), lib.display());
    Check::new("libtorch", State::Ok, detail, "")
}

fn libtorch_cuda(lib: Option<&Path>, gpu: bool) -> Check {
    let what = "libtorch, CUDA half";
    let beside = lib.map(|lib| lib.with_file_name("libtorch_cuda.so")).filter(|path| path.exists());
    if beside.is_none() {
        let state = if gpu { State::Missing } else { State::Absent };
        let remedy = if gpu { "install the CUDA build of torch with launch/setup" } else { "" };
        return Check::new(what, state, "a CPU build: no libtorch_cuda.so beside libtorch", remedy);
    }
    if tch::Cuda::is_available() {
        let cudnn = if tch::Cuda::cudnn_is_available() { "with cuDNN" } else { "without cuDNN" };
        let detail = format!("{} devices usable, {cudnn}", tch::Cuda::device_count());
        return Check::new(what, State::Ok, detail, "");
    }
    if gpu {
        let detail = "there is a driver, but libtorch finds no usable device";
        let remedy = "check CUDA_VISIBLE_DEVICES and that the driver is new enough for CUDA 13 (580 or later)";
        return Check::new(what, State::Missing, detail, remedy);
    }
    Check::new(what, State::Ok, "installed; no device here, training uses the CPU", "")
}

/// Streams, events and graphs: the program's own CUDA half.
fn bridge_cuda(gpu: bool) -> Check {
    let what = "bridge, CUDA half";
    match cuda::opened() {
        Ok(path) => Check::new(what, State::Ok, path.display().to_string(), ""),
        Err(fault) if gpu => {
            Check::new(what, State::Missing, fault.message, "run launch/setup and build anew, or copy the file too")
        }
        Err(fault) => Check::new(what, State::Absent, format!("{fault}; only a GPU needs it"), ""),
    }
}

fn driver_and_devices(driver: Option<&str>) -> Check {
    let what = "NVIDIA driver";
    let Some(driver) = driver else {
        return Check::new(what, State::Absent, "no driver: training uses the CPU", "");
    };
    let version = driver.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let devices = ask("nvidia-smi", &["-L"]).unwrap_or_default();
    let devices: Vec<_> = devices.lines().filter_map(|line| line.split(" (UUID").next()).collect();
    let (state, remedy) = match devices.len() {
        0 => {
            (State::Missing, "nvidia-smi -L lists no device: pass the GPUs into the container, or load the driver anew")
        }
        _ => (State::Ok, ""),
    };
    Check::new(what, state, format!("{}; {}", version.unwrap_or("unknown version"), devices.join(", ")), remedy)
}

/// A library that comes with the Python packages and is only used on a GPU.
fn wheel(what: &'static str, site: Option<&Path>, folder: &str, name: &str, gpu: bool) -> Check {
    let folder = site.map(|site| site.join(folder)).unwrap_or_default();
    let found = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    match found.filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))).min() {
        Some(path) => Check::new(what, State::Ok, path.display().to_string(), ""),
        None if gpu => Check::new(what, State::Missing, format!("no {name}* beside libtorch"), "run launch/setup"),
        None => Check::new(what, State::Absent, format!("no {name}*; only a GPU needs it"), ""),
    }
}

/// The version that answers is that of the copy which libtorch has loaded.
fn nccl(site: Option<&Path>, gpu: bool) -> Check {
    let found = wheel("NCCL", site, "nvidia/nccl/lib", "libnccl.so", gpu);
    match Library::get().and_then(Library::named) {
        Ok(version) if found.state == State::Ok => Check { detail: format!("{version}, {}", found.detail), ..found },
        _ => found,
    }
}

fn mpi_library() -> Check {
    match mpi::environment::library_version() {
        Ok(version) => {
            // Open MPI pads the text with a NUL.
            let version = version.trim_matches(|c: char| c == '\0' || c.is_whitespace());
            Check::new("MPI library", State::Ok, version.split(", ident").next().unwrap_or(version), "")
        }
        Err(_) => Check::new("MPI library", State::Missing, "it tells no version", "run launch/setup"),
    }
}

fn mpirun() -> Check {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(PathBuf::from(".deps/venv/bin")).chain(env::split_paths(&path));
    match folders.map(|folder| folder.join("mpirun")).find(|file| file.exists()) {
        Some(file) => Check::new("mpirun", State::Ok, file.display().to_string(), ""),
        None => Check::new(
            "mpirun",
            State::Absent,
            "neither in .deps/venv/bin nor on PATH: one process only",
            "run launch/setup in the repository for several ranks",
        ),
    }
}

fn ffmpeg() -> Check {
    let names = ["libavcodec", "libavformat", "libavutil", "libswscale", "libswresample"];
    let found: Vec<_> = names.map(|name| (name, ask("pkg-config", &["--modversion", name]))).into();
    let lacking: Vec<_> = found.iter().filter(|(_, version)| version.is_none()).map(|(name, _)| *name).collect();
    if !lacking.is_empty() {
        let detail = format!("pkg-config does not find {}: no video, no compressed audio", lacking.join(", "));
        return Check::new(
            "FFmpeg",
            State::Absent,
            detail,
            "apt-get install libavformat-dev libswscale-dev, then build anew",
        );
    }
    let told: Vec<_> =
        found.iter().map(|(name, version)| format!("{name} {}", version.as_deref().unwrap_or(""))).collect();
    Check::new("FFmpeg", State::Ok, told.join(", "), "")
}

/// Which ways of proving who we are exist, by name.
fn credentials() -> Check {
    const VARIABLES: [&str; 16] = [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_ENDPOINT_URL",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_CLIENT_ID",
        "AZURE_CLIENT_SECRET",
        "AZURE_FEDERATED_TOKEN_FILE",
    ];
    const FILES: [&str; 3] = [".aws/credentials", ".config/gcloud/application_default_credentials.json", ".azure"];
    let home = home();
    let variables = VARIABLES.iter().filter(|name| env::var_os(name).is_some_and(|value| !value.is_empty()));
    let files = FILES.iter().filter(|file| home.join(file).exists()).map(|file| format!("~/{file}"));
    let found: Vec<_> = variables.map(|name| name.to_string()).chain(files).collect();
    if found.is_empty() {
        return Check::new("store credentials", State::Absent, "none found: local files and open buckets only", "");
    }
    Check::new("store credentials", State::Ok, format!("{} (values not shown)", found.join(", ")), "")
}

fn cores() -> Check {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let bound = rustix::thread::sched_getaffinity(None).map_or(usable, |set| set.count() as usize);
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let online = text.lines().filter(|line| line.starts_with("processor")).count().max(bound);
    let remedy = if bound < online { "start with launch/mpirun, which binds to none, or taskset" } else { "" };
    Check::new("cores", State::Ok, format!("{usable} usable; bound to {bound} of {online}"), remedy)
}

fn open_files() -> Check {
    let limit = getrlimit(Resource::Nofile).current;
    let (state, remedy) = match limit.unwrap_or(u64::MAX) {
        ..256 => (State::Missing, "ulimit -n 65536"),
        256..4096 => (State::Ok, "ulimit -n 65536, for many shards at once"),
        _ => (State::Ok, ""),
    };
    Check::new("open files", state, format!("at most {}", amount(limit)), remedy)
}

fn other_limits() -> Check {
    let (locked, core) = (getrlimit(Resource::Memlock).current, getrlimit(Resource::Core).current);
    let kib = |limit: Option<u64>| limit.map_or("unlimited".into(), |bytes| format!("{} KiB", bytes >> 10));
    let remedy = if locked.is_some() { "ulimit -l unlimited, for RDMA networks only" } else { "" };
    let detail = format!("locked memory {}, core files {}", kib(locked), kib(core));
    Check::new("other limits", State::Ok, detail, remedy)
}

fn amount(limit: Option<u64>) -> String {
    limit.map_or("unlimited".into(), |limit| limit.to_string())
}

fn memory() -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
    };
    let (Some(free), Some(total)) = (kib("MemAvailable:"), kib("MemTotal:")) else {
        return Check::new("memory", State::Absent, "/proc/meminfo tells nothing", "");
    };
    // A container's own limit, where there is one, is what the kernel kills by.
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse::<u64>().ok());
    let limit = limit.map_or(String::new(), |bytes| format!("; this container may use {}", size(bytes)));
    let (state, remedy) = match free << 10 {
        free if free < 1 << 30 => (State::Missing, "free at least 1 GiB of memory"),
        _ => (State::Ok, ""),
    };
    Check::new("memory", state, format!("{} free of {}{limit}", size(free << 10), size(total << 10)), remedy)
}

/// Free space where `path` lies, or would lie once made.
fn room(what: &'static str, path: &Path, least: u64, remedy: &str) -> Check {
    let there = path.ancestors().find_map(|folder| {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        rustix::fs::statvfs(folder).ok()
    });
    let Some(there) = there else {
        return Check::new(what, State::Absent, format!("{} tells nothing", path.display()), "");
    };
    let free = there.f_bavail.saturating_mul(there.f_frsize);
    let detail = format!("{} free of {}", size(free), size(there.f_blocks.saturating_mul(there.f_frsize)));
    if free < least {
        Check::new(what, State::Missing, detail, remedy)
    } else {
        Check::new(what, State::Ok, detail, "")
    }
}

fn home() -> PathBuf {
    env::var_os("HOME").map(PathBuf::from).unwrap_or_default()
}

fn cache() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    cache.unwrap_or_else(|| home().join(".cache")).join("occlude")
}

/// Binary units, as memory and disks are told.
fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 30 => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
        bytes => format!("{} MiB", bytes >> 20),
    }
}

/// Standard output of a program that ends well within ten seconds; a hung driver must not hang the doctor.
fn ask(program: &str, arguments: &[&str]) -> Option<String> {
    let quiet =
        Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = quiet.ok()?;
    let begun = Instant::now();
    loop {
        match child.try_wait().ok()? {
            Some(status) if status.success() => break,
            Some(_) => return None,
            None if begun.elapsed() > Duration::from_secs(10) => {
                child.kill().ok()?;
                return None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    let text = std::io::read_to_string(child.stdout.take()?).ok()?;
    Some(text.trim().to_owned())
}
