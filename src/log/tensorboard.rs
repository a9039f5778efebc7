//! TensorBoard event files, written without TensorBoard.
//!
//! A file is a sequence of TFRecord frames: length (u64), its masked CRC-32C, payload, its masked CRC-32C, all
//! little-endian. Each payload is an `Event` of TensorBoard's `event.proto`. The few messages needed are encoded by
//! hand instead of with a protobuf library.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes one event file. Events reach the file with [`EventWriter::flush`] or on drop.
pub struct EventWriter {
    path: PathBuf,
    out: BufWriter<File>,
}

impl EventWriter {
    /// Creates a new event file in `dir`, and `dir` if it is missing.
    ///
    /// # Errors
    /// [`ExitCode::Disk`](crate::error::ExitCode::Disk), as from every method here.
    pub fn create(dir: &Path) -> Result<EventWriter> {
        fs::create_dir_all(dir).map_err(|error| Error::disk(dir.display(), error))?;
        let path = dir.join(new_file_name(dir)?);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|error| Error::disk(path.display(), error))?;
        let mut writer = EventWriter { path, out: BufWriter::new(file) };
        let mut body = ProtoMessage::default();
        body.text(3, "brain.Event:2");
        writer.append(0, body)?;
        writer.flush()?;
        Ok(writer)
    }

    /// Creates a new event file for a run that continues with step `first_step`: a `SessionLog` START makes TensorBoard
    /// discard the points of older files from that step on.
    pub fn resume(dir: &Path, first_step: u64) -> Result<EventWriter> {
        let mut writer = EventWriter::create(dir)?;
        let mut session = ProtoMessage::default();
        session.integer(1, 1); // status: START
        let mut body = ProtoMessage::default();
        body.message(7, session);
        writer.append(first_step, body)?;
        writer.flush()?;
        Ok(writer)
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one point of the curve `tag`; a `/` in the tag makes groups.
    pub fn write_scalar(&mut self, step: u64, tag: &str, value: f32) -> Result<()> {
        let mut entry = ProtoMessage::default();
        entry.text(1, tag);
        entry.float(2, value);
        self.write_summary(step, entry)
    }

    /// Writes one image under `tag`: the bytes of a PNG file, its size in pixels and its channels (1 grayscale, 3 RGB,
    /// 4 RGBA).
    pub fn write_image(
        &mut self,
        step: u64,
        tag: &str,
        png: &[u8],
        width: u32,
        height: u32,
        channels: u32,
    ) -> Result<()> {
        let mut image = ProtoMessage::default();
        image.integer(1, height.into());
        image.integer(2, width.into());
        image.integer(3, channels.into());
        image.bytes(4, png);
        let mut entry = ProtoMessage::default();
        entry.text(1, tag);
        entry.message(4, image);
        self.write_summary(step, entry)
    }

    /// Passes everything written so far to the operating system.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(|error| Error::disk(self.path.display(), error))
    }

    fn write_summary(&mut self, step: u64, entry: ProtoMessage) -> Result<()> {
        let mut summary = ProtoMessage::default();
        summary.message(1, entry);
        let mut body = ProtoMessage::default();
        body.message(5, summary);
        self.append(step, body)
    }

    /// Appends a frame with the wall time and the step that every event has, and the fields of `body`.
    fn append(&mut self, step: u64, body: ProtoMessage) -> Result<()> {
        let mut event = ProtoMessage::default();
        event.double(1, unix_time());
        event.integer(2, step);
        event.0.extend(body.0);
        let payload = event.0;
        let length = (payload.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(payload.len() + 16);
        frame.extend(length);
        frame.extend(masked_crc(&length));
        frame.extend(&payload);
        frame.extend(masked_crc(&payload));
        self.out.write_all(&frame).map_err(|error| Error::disk(self.path.display(), error))
    }
}

/// A protobuf message under construction; fields are encoded in the order in which they are added.
#[derive(Default)]
struct ProtoMessage(Vec<u8>);

impl ProtoMessage {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn integer(&mut self, field: u64, value: u64) {
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

    fn message(&mut self, field: u64, value: ProtoMessage) {
        self.bytes(field, &value.0);
    }
}

/// Computes TFRecord's masked CRC-32C. The rotation and the constant keep a checksum of data that itself contains
/// checksums effective.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Returns the seconds since 1970.
fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// Returns a new name `events.out.tfevents.<unix time>.<host>.<pid>.<count>`. TensorBoard reads files in the order of
/// their names, so the time is made later than that of every existing file: a quick restart or a clock that was set
/// back must not sort first.
fn new_file_name(dir: &Path) -> Result<String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut time = unix_time() as u64;
    for entry in fs::read_dir(dir).map_err(|error| Error::disk(dir.display(), error))? {
        let entry = entry.map_err(|error| Error::disk(dir.display(), error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let stamp = name.strip_prefix("events.out.tfevents.").and_then(|rest| rest.split('.').next()?.parse().ok());
        time = time.max(stamp.map_or(0, |stamp: u64| stamp.saturating_add(1)));
    }
    let host = rustix::system::uname().nodename().to_string_lossy().replace(['/', '.'], "-");
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(format!("events.out.tfevents.{time:010}.{host}.{}.{count}", std::process::id()))
}
