//! The error type of the crate. An error carries one message, which says what failed, where, what was found, what was
//! expected and how to fix it, and the exit code that scripts and schedulers act on.

use std::fmt;

/// Exit code of the program and of `launch/mpirun`. Schedulers requeue a job on [`ExitCode::Stopped`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// A mistake of the user (usage, config, missing data), reported before any work begins.
    Usage = 2,
    /// The fraction of corrupt samples exceeds the configured maximum.
    Corrupt = 65,
    /// The store is unavailable.
    Store = 69,
    /// The training failed: non-finite values, a lost or hung rank, restarts without progress.
    Failed = 70,
    /// Another job holds the lease of the run.
    LeaseHeld = 73,
    /// The disk is full, or another local I/O error.
    Disk = 74,
    /// The training saved a checkpoint and stopped on request.
    Stopped = 75,
    /// Ranks have different configs, builds or data, or call different collectives.
    RankMismatch = 76,
    /// The store refused the credentials.
    Credentials = 77,
    /// This build cannot continue from the checkpoint.
    Checkpoint = 78,
}

/// An error message with an exit code. The message is one or more whole sentences for people.
#[derive(Clone, Debug)]
pub struct Error {
    pub code: ExitCode,
    pub message: String,
}

/// A result whose error is [`Error`] by default.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Creates an error with this exit code.
    pub fn new(code: ExitCode, message: impl Into<String>) -> Self {
        Error { code, message: message.into() }
    }
    /// Creates an error for a mistake of the user ([`ExitCode::Usage`]).
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Usage, message)
    }
    /// Creates an error that ends the training ([`ExitCode::Failed`]).
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Failed, message)
    }
    /// Creates an error from a local I/O error on `path` ([`ExitCode::Disk`]).
    pub fn disk(path: impl fmt::Display, error: std::io::Error) -> Self {
        Self::new(ExitCode::Disk, format!("{path}: {error}"))
    }
    /// Prefixes the message with the place where the error occurred.
    pub fn with_context(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Errors of libtorch are bugs of this program, never mistakes of the user: a config that was accepted must not make a
/// step fail.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        let text = error.to_string();
        Error::failed(format!("libtorch: {}", text.lines().next().unwrap_or("unknown error")))
    }
}
