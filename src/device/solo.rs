//! One rank, or N as threads.
