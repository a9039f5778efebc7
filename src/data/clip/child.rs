//! The process `occlude-decode`: started, asked, ended. It is spoken to over its standard input, which is a socket; its
//! standard output is a file in memory that both read and write.

use super::wire::{Answer, Ask, VERSION};
use crate::fault::{Fault, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a child may take to start; a loaded machine reads a hundred libraries first.
const START: Duration = Duration::from_secs(60);
/// Bytes of memory that a child keeps from one video to the next.
const KEPT: u64 = 64 << 20;
/// The longest answer, which a refusal in words is.
const ANSWER: usize = 1 << 20;

/// Why there is no answer.
pub enum Lost {
    /// The deadline passed.
    Late,
    /// The process ended, or said what is no answer.
    Gone,
}

pub struct Child {
    process: std::process::Child,
    socket: UnixStream,
    memory: File,
    /// Bytes that were read and do not make a line yet.
    begun: Vec<u8>,
}

/// Where `occlude-decode` is: where `OCCLUDE_DECODE` says, or beside this program.
pub fn program() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("OCCLUDE_DECODE") {
        return Ok(named.into());
    }
    let here = std::env::current_exe().map_err(|error| Fault::disk("this program", error))?;
    Ok(here.with_file_name("occlude-decode"))
}

impl Child {
    /// Starts one and waits until it is ready.
    pub fn start() -> Result<Child> {
        let program = program()?;
        let remedy = "videos are decoded by occlude-decode, which is built with occlude and wants FFmpeg's libraries; \
                      launch/setup installs them";
        let failed = |what: String| Fault::usage(format!("{}: {what}; {remedy}", program.display()));
        let io = |error: std::io::Error| failed(error.to_string());
        let memory: OwnedFd = memfd_create("occlude-decode", MemfdFlags::CLOEXEC).map_err(|error| io(error.into()))?;
        let memory = File::from(memory);
        let (socket, theirs) = UnixStream::pair().map_err(io)?;
        let mut command = Command::new(&program);
        command.stdin(OwnedFd::from(theirs)).stdout(memory.try_clone().map_err(io)?);
        // What the loader says of a missing library is for people to read.
        let process = command.stderr(Stdio::inherit()).env_clear().envs(kept()).spawn().map_err(io)?;
        // The command holds the child's end of the socket; with it open, the child's death would not be heard.
        drop(command);
        let mut child = Child { process, socket, memory, begun: Vec::new() };
        match child.answer(Instant::now() + START) {
            Ok(Answer::Ready { version: VERSION }) => Ok(child),
            Ok(answer) => Err(failed(format!("it says {answer:?}, and is not of this build"))),
            Err(Lost::Late) => Err(failed(format!("it was not ready after {START:?}"))),
            Err(Lost::Gone) => Err(failed(format!("it does not start ({})", child.end()))),
        }
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Lays bytes at the beginning of the memory. What an earlier video needed beyond some MiB is given back.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let memory = |error| Fault::disk("memory shared with occlude-decode", error);
        if self.memory.metadata().map_err(memory)?.len() > KEPT {
            self.memory.set_len(0).map_err(memory)?;
        }
        self.memory.write_all_at(bytes, 0).map_err(memory)
    }

    /// Bytes of the memory.
    pub fn length(&self) -> Result<u64> {
        let meta = self.memory.metadata();
        Ok(meta.map_err(|error| Fault::disk("memory shared with occlude-decode", error))?.len())
    }

    /// Reads bytes of the memory.
    pub fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.memory.read_exact_at(bytes, at).map_err(|error| Fault::disk("memory shared with occlude-decode", error))
    }

    /// Asks, and waits so long.
    pub fn ask(&mut self, ask: &Ask, patience: Duration) -> Result<Answer, Lost> {
        let line = serde_json::to_string(ask).expect("a question is JSON") + "\n";
        self.socket.set_write_timeout(Some(patience)).map_err(|_| Lost::Gone)?;
        self.socket.write_all(line.as_bytes()).map_err(|error| lost(&error))?;
        self.answer(Instant::now() + patience)
    }

    /// The next line.
    fn answer(&mut self, deadline: Instant) -> Result<Answer, Lost> {
        let mut piece = [0; 4096];
        loop {
            if let Some(end) = self.begun.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.begun.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|_| Lost::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Lost::Late);
            }
            self.socket.set_read_timeout(Some(left)).map_err(|_| Lost::Gone)?;
            match self.socket.read(&mut piece) {
                Ok(0) => return Err(Lost::Gone),
                Ok(count) => self.begun.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(&error)),
            }
            if self.begun.len() > ANSWER {
                return Err(Lost::Gone);
            }
        }
    }

    /// Ends the process; how it ended.
    pub fn end(mut self) -> String {
        // One that has ended by itself keeps its own end: it gets a moment to be seen.
        for _ in 0..20 {
            match self.process.try_wait() {
                Ok(Some(status)) => return status.to_string(),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        // It may have ended meanwhile.
        let _ = self.process.kill();
        self.process.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // A child that has been waited for is neither there to be killed nor to be waited for again.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn lost(error: &std::io::Error) -> Lost {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Lost::Late,
        _ => Lost::Gone,
    }
}

/// Of the environment: where libraries are, and nothing that a credential could stand in.
fn kept() -> impl Iterator<Item = (String, String)> {
    ["LD_LIBRARY_PATH", "PATH"].into_iter().filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
}
