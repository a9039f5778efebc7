//! Resource limits that this process sets itself before it reads any byte of a file.

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

/// Maximum bytes of address space: several times what the largest permitted frames need in every decoder.
const MAX_MEMORY: u64 = 3 << 30;
/// Maximum bytes that the process may write to the shared memory.
const MAX_FILE_SIZE: u64 = 2 << 30;
/// Maximum number of file descriptors: standard input, output and error, and the two copies that `main` holds. No
/// further file or socket can be opened.
const MAX_DESCRIPTORS: u64 = 5;

/// Limits memory, output and file descriptors, disables core dumps, and makes the process die with the thread that
/// started it. The parent limits the time.
pub fn restrict_process() -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    for (resource, max) in [
        (Resource::As, MAX_MEMORY),
        (Resource::Fsize, MAX_FILE_SIZE),
        (Resource::Core, 0),
        (Resource::Nofile, MAX_DESCRIPTORS),
    ] {
        let max = Some(getrlimit(resource).maximum.map_or(max, |allowed| allowed.min(max)));
        setrlimit(resource, Rlimit { current: max, maximum: max })?;
    }
    Ok(())
}
