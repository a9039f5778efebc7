//! TensorBoard event files, written without TensorBoard.
//!
//! A file is a row of TFRecord frames (length u64, its masked CRC-32C, payload, its masked CRC-32C, all little-endian);
//! each payload is an `Event` of TensorBoard's `event.proto`, coded here by hand because four messages are needed.

use crate::fault::{Fault, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// One event file, open for appending. What was written is on disk after [`Events::flush`] or on drop.
pub struct Events {
    path: PathBuf,
    out: BufWriter<File>,
}

impl Events {
    /// Opens a new event file in `dir`, which is made where it is missing.
    ///
    /// # Errors
    /// [`Code::Disk`](crate::fault::Code::Disk), as from every call here.
    pub fn create(dir: &Path) -> Result<Events> {
        fs::create_dir_all(dir).map_err(|error| Fault::disk(dir.display(), error))?;
        let path = dir.join(fresh_name(dir)?);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|error| Fault::disk(path.display(), error))?;
        let mut events = Events { path, out: BufWriter::new(file) };
        let mut body = Message::default();
        body.text(3, "brain.Event:2");
        events.append(0, body)?;
        events.flush()?;
        Ok(events)
    }

    /// As [`Events::create`], for a run that goes on with step `first`: a `SessionLog` START makes TensorBoard forget
    /// the points of older files at that step and later.
    pub fn resume(dir: &Path, first: u64) -> Result<Events> {
        let mut events = Events::create(dir)?;
        let mut session = Message::default();
        session.number(1, 1); // status: START
        let mut body = Message::default();
        body.message(7, session);
        events.append(first, body)?;
        events.flush()?;
        Ok(events)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One point of the curve `tag`; a `/` in the tag makes groups.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f32) -> Result<()> {
        let mut entry = Message::default();
        entry.text(1, tag);
        entry.float(2, value);
        self.summary(step, entry)
    }

    /// One picture under `tag`: a whole PNG file, its size in pixels and its channels (1 grey, 3 RGB, 4 RGBA).
    pub fn image(&mut self, step: u64, tag: &str, png: &[u8], width: u32, height: u32, channels: u32) -> Result<()> {
        let mut image = Message::default();
        image.number(1, height.into());
        image.number(2, width.into());
        image.number(3, channels.into());
        image.bytes(4, png);
        let mut entry = Message::default();
        entry.text(1, tag);
        entry.message(4, image);
        self.summary(step, entry)
    }

    /// Hands everything written so far to the operating system.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(|error| Fault::disk(self.path.display(), error))
    }

    fn summary(&mut self, step: u64, entry: Message) -> Result<()> {
        let mut summary = Message::default();
        summary.message(1, entry);
        let mut body = Message::default();
        body.message(5, summary);
        self.append(step, body)
    }

    /// Adds the wall time and the step that every event has, and the frame.
    fn append(&mut self, step: u64, body: Message) -> Result<()> {
        let mut event = Message::default();
        event.double(1, now());
        event.number(2, step);
        event.0.extend(body.0);
        let payload = event.0;
        let length = (payload.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(payload.len() + 16);
        frame.extend(length);
        frame.extend(masked(&length));
        frame.extend(&payload);
        frame.extend(masked(&payload));
        self.out.write_all(&frame).map_err(|error| Fault::disk(self.path.display(), error))
    }
}

/// A protobuf message under construction: fields in the order in which they are added.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
    fn number(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }
    fn double(&mut self, field: u64, value: f64) {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }
    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }
    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }
    fn text(&mut self, field: u64, value: &str) {
        self.bytes(field, value.as_bytes());
    }
    fn message(&mut self, field: u64, value: Message) {
        self.bytes(field, &value.0);
    }
}

/// CRC-32C, rotated and shifted as TFRecord asks, so that a checksum of checksums stays a good checksum.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// `events.out.tfevents.<unix>.<host>.<pid>.<n>`. TensorBoard reads files in the order of their names, so the time is
/// pushed past that of any file already there: a quick restart or a clock set back must not come first.
fn fresh_name(dir: &Path) -> Result<String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut time = now() as u64;
    for entry in fs::read_dir(dir).map_err(|error| Fault::disk(dir.display(), error))? {
        let entry = entry.map_err(|error| Fault::disk(dir.display(), error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let stamp = name.strip_prefix("events.out.tfevents.").and_then(|rest| rest.split('.').next()?.parse().ok());
        time = time.max(stamp.map_or(0, |old: u64| old.saturating_add(1)));
    }
    let host = rustix::system::uname().nodename().to_string_lossy().replace(['/', '.'], "-");
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(format!("events.out.tfevents.{time:010}.{host}.{}.{number}", std::process::id()))
}
