//! A teacher: a second set of weights for parts of the model, which no gradient reaches.

/// When a teacher moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    Step,
    /// In the last step of each pass over the data set, counted in samples seen.
    Epoch,
}

/// Exponential moving average of the parameters whose names begin with `prefix`: teacher ← m · teacher + (1 − m) ·
/// student. It begins as a copy, is kept in fp32 beside the master weights (in bf16 an average with m = 0.996 does not
/// move), is shared out with them, and moves only after an update that all ranks accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Teacher {
    pub prefix: &'static str,
    /// Index of m among the method's scheduled values.
    pub momentum: usize,
    pub every: Every,
}
