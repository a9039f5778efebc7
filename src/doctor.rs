//! `occlude doctor`: checks what training needs on this machine, and prints a remedy for what is missing.
//!
//! The checks change nothing. Of credentials they print names of variables and files, never values.

use crate::bridge::cuda;
use crate::dist;
use crate::dist::nccl::library::NcclLibrary;
use crate::error::{Error, Result};
use crate::op;
use crate::op::launch::{ARCHITECTURES, compile, cubin_file_name};
use rustix::process::{Resource, getrlimit};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckStatus {
    Ok,
    /// Missing, and needed for training on this machine or on its GPU.
    Missing,
    /// Missing, and not needed for training here.
    NotNeeded,
}

/// One row of the doctor's table.
#[derive(Clone, Debug)]
pub struct Check {
    pub name: &'static str,
    pub status: CheckStatus,
    pub detail: String,
    /// A command or an instruction that solves the problem; empty if there is none to solve.
    pub remedy: String,
}

impl Check {
    fn new(name: &'static str, status: CheckStatus, detail: impl Into<String>, remedy: &str) -> Check {
        Check { name, status, detail: detail.into(), remedy: remedy.into() }
    }
}

/// Runs all checks and prints the table.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if training is not possible here; the message names what is
/// missing.
pub fn run_doctor() -> Result<()> {
    let checks = run_checks();
    print!("{}", format_table(&checks));
    let missing: Vec<_> =
        checks.iter().filter(|check| check.status == CheckStatus::Missing).map(|check| check.name).collect();
    if missing.is_empty() {
        println!("Training is possible on this machine.");
        return Ok(());
    }
    Err(Error::usage(format!("Training here still needs: {}. The remedies are in the table.", missing.join(", "))))
}

/// Compiles every kernel for every architecture into `folder`, from which a bundle loads them.
pub fn compile_kernels(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| Error::disk(folder.display(), error))?;
    let mut files = 0;
    for source in op::kernel_sources() {
        for variant in (source.variants)() {
            for architecture in ARCHITECTURES {
                let path = folder.join(cubin_file_name(source, &variant, architecture)?);
                let cubin = compile(source, &variant, architecture)?.cubin;
                fs::write(&path, cubin).map_err(|error| Error::disk(path.display(), error))?;
                files += 1;
            }
        }
    }
    println!("{files} programs of kernels in {}", folder.display());
    Ok(())
}

/// Formats the checks as a table, one line each.
pub fn format_table(checks: &[Check]) -> String {
    let name_width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let line = |check: &Check| {
        let status = match check.status {
            CheckStatus::Ok => "ok",
            CheckStatus::Missing => "MISSING",
            CheckStatus::NotNeeded => "absent, fine",
        };
        let remedy = if check.remedy.is_empty() { String::new() } else { format!("  ->  {}", check.remedy) };
        format!("{:<name_width$}  {status:<12}  {}{remedy}\n", check.name, check.detail)
    };
    checks.iter().map(line).collect()
}

/// Runs all checks. `libtorch_cuda.so` must be loaded before, as `main` does first: libtorch caches its first answer to
/// the question whether CUDA is available.
pub fn run_checks() -> Vec<Check> {
    let torch = loaded_library("libtorch_cpu.so");
    let driver = fs::read_to_string("/proc/driver/nvidia/version").ok();
    let site_packages = torch.as_deref().and_then(|lib| lib.ancestors().nth(3)).map(Path::to_path_buf);
    let has_gpu = driver.is_some();
    let shm_remedy = "give the container more shared memory (--shm-size=2g)";
    let folder_remedy = "free some space, or run in another folder";
    let cache_remedy = "free some space, or point XDG_CACHE_HOME elsewhere";
    vec![
        check_libtorch(torch.as_deref()),
        check_libtorch_cuda(torch.as_deref(), has_gpu),
        check_bridge_cuda(has_gpu),
        check_driver(driver.as_deref()),
        check_wheel_library("NVRTC", site_packages.as_deref(), "nvidia/cu13/lib", "libnvrtc.so", has_gpu),
        check_nccl(site_packages.as_deref(), has_gpu),
        check_mpi_library(),
        check_mpirun(),
        check_ffmpeg(),
        check_credentials(),
        check_cores(),
        check_waiting_threads(),
        check_open_files(),
        check_other_limits(),
        check_memory(),
        check_free_space("shared memory", Path::new("/dev/shm"), 64 << 20, shm_remedy),
        check_free_space("disk, this folder", Path::new("."), 1 << 30, folder_remedy),
        check_free_space("disk, cache folder", &cache_folder(), 1 << 30, cache_remedy),
    ]
}

/// Returns the path of a library that this process has loaded.
fn loaded_library(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().filter_map(|line| Some(&line[line.find('/')?..]));
    path.map(Path::new).find(|path| path.file_name().is_some_and(|file| file == name)).map(Path::to_path_buf)
}

fn check_libtorch(lib: Option<&Path>) -> Check {
    let Some(lib) = lib else {
        return Check::new("libtorch", CheckStatus::Missing, "libtorch_cpu.so is not loaded", "run launch/setup");
    };
    let version = lib.ancestors().nth(2).and_then(|torch| fs::read_to_string(torch.join("version.py")).ok());
    let version = version.as_deref().and_then(|text| text.split("__version__ = '").nth(1)?.split('\'').next());
    let version = version.unwrap_or("of unknown version");
    let detail = format!("{version}, {} threads, {}", tch::get_num_threads(), lib.display());
    Check::new("libtorch", CheckStatus::Ok, detail, "")
}

fn check_libtorch_cuda(lib: Option<&Path>, has_gpu: bool) -> Check {
    let name = "libtorch, CUDA half";
    let library = lib.map(|lib| lib.with_file_name("libtorch_cuda.so")).filter(|path| path.exists());
    if library.is_none() {
        let detail = "a CPU build: no libtorch_cuda.so beside libtorch";
        if has_gpu {
            let remedy = "install the CUDA build of torch with launch/setup";
            return Check::new(name, CheckStatus::Missing, detail, remedy);
        }
        return Check::new(name, CheckStatus::NotNeeded, detail, "");
    }
    if tch::Cuda::is_available() {
        let cudnn = if tch::Cuda::cudnn_is_available() { "with cuDNN" } else { "without cuDNN" };
        let detail = format!("{} devices usable, {cudnn}", tch::Cuda::device_count());
        return Check::new(name, CheckStatus::Ok, detail, "");
    }
    if has_gpu {
        let detail = "there is a driver, but libtorch finds no usable device";
        let remedy = "check CUDA_VISIBLE_DEVICES and that the driver is new enough for CUDA 13 (580 or later)";
        return Check::new(name, CheckStatus::Missing, detail, remedy);
    }
    Check::new(name, CheckStatus::Ok, "installed; no device here, training uses the CPU", "")
}

/// Checks the program's own CUDA library: streams, events and graphs.
fn check_bridge_cuda(has_gpu: bool) -> Check {
    let name = "bridge, CUDA half";
    match cuda::library_path() {
        Ok(path) => Check::new(name, CheckStatus::Ok, path.display().to_string(), ""),
        Err(error) if has_gpu => {
            let remedy = "run launch/setup and build anew, or copy the file too";
            Check::new(name, CheckStatus::Missing, error.message, remedy)
        }
        Err(error) => Check::new(name, CheckStatus::NotNeeded, format!("{error}; only a GPU needs it"), ""),
    }
}

fn check_driver(driver: Option<&str>) -> Check {
    let name = "NVIDIA driver";
    let Some(driver) = driver else {
        return Check::new(name, CheckStatus::NotNeeded, "no driver: training uses the CPU", "");
    };
    let version = driver.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let listing = command_output("nvidia-smi", &["-L"]).unwrap_or_default();
    let devices: Vec<_> = listing.lines().filter_map(|line| line.split(" (UUID").next()).collect();
    let detail = format!("{}; {}", version.unwrap_or("unknown version"), devices.join(", "));
    if devices.is_empty() {
        let remedy = "nvidia-smi -L lists no device: pass the GPUs into the container, or load the driver anew";
        return Check::new(name, CheckStatus::Missing, detail, remedy);
    }
    Check::new(name, CheckStatus::Ok, detail, "")
}

/// Checks for a library that the Python packages bring and only a GPU needs.
fn check_wheel_library(
    name: &'static str,
    site_packages: Option<&Path>,
    folder: &str,
    prefix: &str,
    has_gpu: bool,
) -> Check {
    let folder = site_packages.map(|site_packages| site_packages.join(folder)).unwrap_or_default();
    let files = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_library = |path: &PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(prefix));
    match files.filter(is_library).min() {
        Some(path) => Check::new(name, CheckStatus::Ok, path.display().to_string(), ""),
        None if has_gpu => {
            Check::new(name, CheckStatus::Missing, format!("no {prefix}* beside libtorch"), "run launch/setup")
        }
        None => Check::new(name, CheckStatus::NotNeeded, format!("no {prefix}*; only a GPU needs it"), ""),
    }
}

/// Checks NCCL; the version is that of the copy that libtorch has loaded.
fn check_nccl(site_packages: Option<&Path>, has_gpu: bool) -> Check {
    let check = check_wheel_library("NCCL", site_packages, "nvidia/nccl/lib", "libnccl.so", has_gpu);
    match NcclLibrary::get().and_then(NcclLibrary::version_string) {
        Ok(version) if check.status == CheckStatus::Ok => {
            Check { detail: format!("{version}, {}", check.detail), ..check }
        }
        _ => check,
    }
}

fn check_mpi_library() -> Check {
    match mpi::environment::library_version() {
        Ok(version) => {
            // Open MPI pads the text with a NUL.
            let version = version.trim_matches(|c: char| c == '\0' || c.is_whitespace());
            Check::new("MPI library", CheckStatus::Ok, version.split(", ident").next().unwrap_or(version), "")
        }
        Err(_) => Check::new("MPI library", CheckStatus::Missing, "it reports no version", "run launch/setup"),
    }
}

fn check_mpirun() -> Check {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(PathBuf::from(".deps/venv/bin")).chain(env::split_paths(&path));
    match folders.map(|folder| folder.join("mpirun")).find(|file| file.exists()) {
        Some(file) => Check::new("mpirun", CheckStatus::Ok, file.display().to_string(), ""),
        None => Check::new(
            "mpirun",
            CheckStatus::NotNeeded,
            "neither in .deps/venv/bin nor on PATH: one process only",
            "run launch/setup in the repository for several ranks",
        ),
    }
}

fn check_ffmpeg() -> Check {
    let names = ["libavcodec", "libavformat", "libavutil", "libswscale", "libswresample"];
    let versions = names.map(|name| (name, command_output("pkg-config", &["--modversion", name])));
    let missing: Vec<_> = versions.iter().filter(|(_, version)| version.is_none()).map(|(name, _)| *name).collect();
    if !missing.is_empty() {
        let detail = format!("pkg-config does not find {}: no video, no compressed audio", missing.join(", "));
        let remedy = "apt-get install libavformat-dev libswscale-dev, then build anew";
        return Check::new("FFmpeg", CheckStatus::NotNeeded, detail, remedy);
    }
    let detail = versions.map(|(name, version)| format!("{name} {}", version.unwrap_or_default())).join(", ");
    Check::new("FFmpeg", CheckStatus::Ok, detail, "")
}

/// Lists the names of the credentials that exist.
fn check_credentials() -> Check {
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
        return Check::new(
            "store credentials",
            CheckStatus::NotNeeded,
            "none found: local files and open buckets only",
            "",
        );
    }
    Check::new("store credentials", CheckStatus::Ok, format!("{} (values not shown)", found.join(", ")), "")
}

fn check_cores() -> Check {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let bound = rustix::thread::sched_getaffinity(None).map_or(usable, |set| set.count() as usize);
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let total = text.lines().filter(|line| line.starts_with("processor")).count().max(bound);
    let remedy = if bound < total { "start with launch/mpirun, which binds to none, or taskset" } else { "" };
    Check::new("cores", CheckStatus::Ok, format!("{usable} usable; bound to {bound} of {total}"), remedy)
}

fn check_waiting_threads() -> Check {
    let detail = match dist::wait_policy() {
        Some((name, value)) => format!("{name}={}", value.display()),
        None => "left to OpenMP's library".into(),
    };
    Check::new("waiting threads", CheckStatus::Ok, detail, "")
}

fn check_open_files() -> Check {
    let limit = getrlimit(Resource::Nofile).current;
    let (status, remedy) = match limit.unwrap_or(u64::MAX) {
        ..256 => (CheckStatus::Missing, "ulimit -n 65536"),
        256..4096 => (CheckStatus::Ok, "ulimit -n 65536, for many shards at once"),
        _ => (CheckStatus::Ok, ""),
    };
    let limit = limit.map_or("unlimited".into(), |limit| limit.to_string());
    Check::new("open files", status, format!("at most {limit}"), remedy)
}

fn check_other_limits() -> Check {
    let locked_memory = getrlimit(Resource::Memlock).current;
    let core_files = getrlimit(Resource::Core).current;
    let kib = |limit: Option<u64>| limit.map_or("unlimited".into(), |bytes| format!("{} KiB", bytes >> 10));
    let remedy = if locked_memory.is_some() { "ulimit -l unlimited, for RDMA networks only" } else { "" };
    let detail = format!("locked memory {}, core files {}", kib(locked_memory), kib(core_files));
    Check::new("other limits", CheckStatus::Ok, detail, remedy)
}

fn check_memory() -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
    };
    let (Some(free), Some(total)) = (kib("MemAvailable:"), kib("MemTotal:")) else {
        return Check::new("memory", CheckStatus::NotNeeded, "/proc/meminfo cannot be read", "");
    };
    // In a container the kernel enforces the container's limit, not the host's memory.
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse::<u64>().ok());
    let limit = limit.map_or(String::new(), |bytes| format!("; this container may use {}", format_bytes(bytes)));
    let detail = format!("{} free of {}{limit}", format_bytes(free << 10), format_bytes(total << 10));
    if (free << 10) < (1 << 30) {
        return Check::new("memory", CheckStatus::Missing, detail, "free at least 1 GiB of memory");
    }
    Check::new("memory", CheckStatus::Ok, detail, "")
}

/// Checks the free space of the file system of `path`, or of its nearest existing parent.
fn check_free_space(name: &'static str, path: &Path, min_bytes: u64, remedy: &str) -> Check {
    let stats = path.ancestors().find_map(|folder| {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        rustix::fs::statvfs(folder).ok()
    });
    let Some(stats) = stats else {
        return Check::new(name, CheckStatus::NotNeeded, format!("{} cannot be read", path.display()), "");
    };
    let free = stats.f_bavail.saturating_mul(stats.f_frsize);
    let total = stats.f_blocks.saturating_mul(stats.f_frsize);
    let detail = format!("{} free of {}", format_bytes(free), format_bytes(total));
    if free < min_bytes {
        Check::new(name, CheckStatus::Missing, detail, remedy)
    } else {
        Check::new(name, CheckStatus::Ok, detail, "")
    }
}

fn home() -> PathBuf {
    env::var_os("HOME").map(PathBuf::from).unwrap_or_default()
}

fn cache_folder() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    cache.unwrap_or_else(|| home().join(".cache")).join("occlude")
}

/// Formats bytes in binary units.
fn format_bytes(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 30 => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
        bytes => format!("{} MiB", bytes >> 20),
    }
}

/// Returns the standard output of a program that succeeds within ten seconds. The limit keeps a hung driver from
/// hanging the doctor.
fn command_output(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let start = Instant::now();
    loop {
        match child.try_wait().ok()? {
            Some(status) if status.success() => break,
            Some(_) => return None,
            None if start.elapsed() > Duration::from_secs(10) => {
                child.kill().ok()?;
                return None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    let text = std::io::read_to_string(child.stdout.take()?).ok()?;
    Some(text.trim().to_owned())
}
