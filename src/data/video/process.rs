//! The process `occlude-decode`. Requests and responses travel over its standard input, which is a socket; its standard
//! output is a shared file in memory.

use super::protocol::{DecodeRequest, DecodeResponse, PROTOCOL_VERSION};
use crate::error::{Error, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Maximum time of a start; a loaded machine first reads a hundred libraries.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of shared memory that are kept from one video to the next.
const MAX_KEPT_BYTES: u64 = 64 << 20;
/// Maximum length of a response line; an error message is the longest.
const MAX_RESPONSE_BYTES: usize = 1 << 20;
/// Time in which a process that exits by itself is expected to be gone, as attempts of 5 ms.
const EXIT_POLLS: usize = 20;

/// The reason why there is no response.
pub enum ProcessFailure {
    /// The deadline passed.
    TimedOut,
    /// The process ended, or sent something that is not a response.
    Exited,
}

/// A running decoder process.
pub struct DecoderProcess {
    process: std::process::Child,
    socket: UnixStream,
    memory: File,
    /// Received bytes that are not a complete line yet.
    received: Vec<u8>,
}

/// Returns the path of `occlude-decode`: the variable `OCCLUDE_DECODE`, or the folder of this program.
pub fn decoder_path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("OCCLUDE_DECODE") {
        return Ok(path.into());
    }
    let program = std::env::current_exe().map_err(|error| Error::disk("this program", error))?;
    Ok(program.with_file_name("occlude-decode"))
}

impl DecoderProcess {
    /// Starts a process and waits until it is ready.
    pub fn start() -> Result<DecoderProcess> {
        let program = decoder_path()?;
        let remedy = "videos are decoded by occlude-decode, which is built with occlude and needs FFmpeg's libraries; \
                      launch/setup installs them";
        let failed = |what: String| Error::usage(format!("{}: {what}; {remedy}", program.display()));
        let io_failed = |error: std::io::Error| failed(error.to_string());
        let memory = memfd_create("occlude-decode", MemfdFlags::CLOEXEC).map_err(|error| io_failed(error.into()))?;
        let memory = File::from(memory);
        let (socket, child_socket) = UnixStream::pair().map_err(io_failed)?;
        let mut command = Command::new(&program);
        command.stdin(OwnedFd::from(child_socket)).stdout(memory.try_clone().map_err(io_failed)?);
        // Standard error is inherited: the dynamic loader names a missing library there.
        let process = command.stderr(Stdio::inherit()).env_clear().envs(passed_environment()).spawn();
        let process = process.map_err(io_failed)?;
        // The command holds the child's end of the socket, which must close for the child's death to be noticed.
        drop(command);
        let mut child = DecoderProcess { process, socket, memory, received: Vec::new() };
        match child.read_response(Instant::now() + START_TIMEOUT) {
            Ok(DecodeResponse::Ready { version: PROTOCOL_VERSION }) => Ok(child),
            Ok(response) => Err(failed(format!("it sent {response:?}: it is of another build"))),
            Err(ProcessFailure::TimedOut) => Err(failed(format!("it was not ready after {START_TIMEOUT:?}"))),
            Err(ProcessFailure::Exited) => Err(failed(format!("it does not start ({})", child.end()))),
        }
    }

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Writes bytes at the start of the shared memory; a large memory is freed first.
    pub fn write_memory(&mut self, bytes: &[u8]) -> Result<()> {
        if self.memory_length()? > MAX_KEPT_BYTES {
            self.memory.set_len(0).map_err(memory_error)?;
        }
        self.memory.write_all_at(bytes, 0).map_err(memory_error)
    }

    /// Returns the bytes of the shared memory.
    pub fn memory_length(&self) -> Result<u64> {
        Ok(self.memory.metadata().map_err(memory_error)?.len())
    }

    /// Reads bytes of the shared memory from `offset` on.
    pub fn read_memory(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.memory.read_exact_at(bytes, offset).map_err(memory_error)
    }

    /// Sends a request and waits at most `timeout` for the response.
    pub fn request(&mut self, request: &DecodeRequest, timeout: Duration) -> Result<DecodeResponse, ProcessFailure> {
        let line = serde_json::to_string(request).expect("a request is JSON") + "\n";
        self.socket.set_write_timeout(Some(timeout)).map_err(|_| ProcessFailure::Exited)?;
        self.socket.write_all(line.as_bytes()).map_err(|error| socket_failure(&error))?;
        self.read_response(Instant::now() + timeout)
    }

    fn read_response(&mut self, deadline: Instant) -> Result<DecodeResponse, ProcessFailure> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|_| ProcessFailure::Exited);
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Err(ProcessFailure::TimedOut);
            }
            self.socket.set_read_timeout(Some(remaining)).map_err(|_| ProcessFailure::Exited)?;
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(ProcessFailure::Exited),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(socket_failure(&error)),
            }
            if self.received.len() > MAX_RESPONSE_BYTES {
                return Err(ProcessFailure::Exited);
            }
        }
    }

    /// Ends the process and returns its exit status.
    pub fn end(mut self) -> String {
        // A process that exits by itself gets a moment to do so, because its own status tells more.
        for _ in 0..EXIT_POLLS {
            match self.process.try_wait() {
                Ok(Some(status)) => return status.to_string(),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        // Fails where the process has ended meanwhile.
        let _ = self.process.kill();
        self.process.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Drop for DecoderProcess {
    fn drop(&mut self) {
        // Both fail for a process that `end` has waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn socket_failure(error: &std::io::Error) -> ProcessFailure {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ProcessFailure::TimedOut,
        _ => ProcessFailure::Exited,
    }
}

fn memory_error(error: std::io::Error) -> Error {
    Error::disk("memory shared with occlude-decode", error)
}

/// Returns the environment of the process: the paths of libraries, and nothing that may contain a credential.
fn passed_environment() -> impl Iterator<Item = (String, String)> {
    ["LD_LIBRARY_PATH", "PATH"].into_iter().filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
}
