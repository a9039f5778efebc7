//! What can go wrong. A fault carries one message that says what, where, got, wanted and the remedy, and the exit
//! code that scripts and schedulers act on.

use std::fmt;

/// The exit codes of the program and of `launch/mpirun`. Schedulers requeue on [`Code::Stopped`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// The user's mistake (usage, config, missing data), told before any work begins.
    Usage = 2,
    /// More samples are corrupt than the configured share.
    Corrupt = 65,
    /// The store is unavailable.
    Store = 69,
    /// Training failed: non-finite, a lost or hung rank, restarts without progress.
    Failed = 70,
    /// Another job holds the run.
    Held = 73,
    /// The disk is full, or another local I/O error.
    Disk = 74,
    /// Saved and stopped on request.
    Stopped = 75,
    /// Ranks disagree about config, build or data.
    Disagree = 76,
    /// The store refused the credentials.
    Credentials = 77,
    /// A checkpoint that this build cannot continue from.
    Checkpoint = 78,
}

/// An error with its exit code. The message is for people: one or more whole sentences, remedy included.
#[derive(Clone, Debug)]
pub struct Fault {
    pub code: Code,
    pub message: String,
}

pub type Result<T, E = Fault> = std::result::Result<T, E>;

impl Fault {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Fault { code, message: message.into() }
    }
    /// The user's mistake: exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Code::Usage, message)
    }
    /// Training cannot go on: exit code 70.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message)
    }
    /// A local I/O error on `path`: exit code 74.
    pub fn disk(path: impl fmt::Display, error: std::io::Error) -> Self {
        Self::new(Code::Disk, format!("{path}: {error}"))
    }
    /// The same fault with the place where it happened in front.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// libtorch's errors are ours, not the user's: after the config is resolved no step may fail for a wrong setting.
impl From<tch::TchError> for Fault {
    fn from(error: tch::TchError) -> Self {
        let text = error.to_string();
        Fault::failed(format!("libtorch: {}", text.lines().next().unwrap_or("unknown error")))
    }
}
