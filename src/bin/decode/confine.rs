//! The limits that this process sets itself before it sees the first byte of a file.

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

/// Bytes of address space: what the largest frames that are allowed take in every decoder, several times over.
const MEMORY: u64 = 3 << 30;
/// Bytes that it may write into the shared memory.
const WRITTEN: u64 = 2 << 30;
/// Standard input, output and error, and the two copies that `main` holds. No file and no socket can be opened.
const DESCRIPTORS: u64 = 5;

/// Bounds memory, output and descriptors, leaves no core files, and dies with the thread that started this process.
/// Time is bounded by the parent, who waits so long and no longer.
pub fn confine() -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    for (resource, most) in
        [(Resource::As, MEMORY), (Resource::Fsize, WRITTEN), (Resource::Core, 0), (Resource::Nofile, DESCRIPTORS)]
    {
        let most = Some(getrlimit(resource).maximum.map_or(most, |allowed| allowed.min(most)));
        setrlimit(resource, Rlimit { current: most, maximum: most })?;
    }
    Ok(())
}
