//! Lists of pictures: CSV, TSV, JSON lines and Parquet with the columns `path`, and if they like `label` and `caption`.

use crate::fault::{Fault, Result};
use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Value};
use std::sync::Arc;

/// The extensions of lists.
pub const LISTS: &[&str] = &["csv", "tsv", "jsonl", "parquet"];

/// One picture of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Where it lies, seen from the list's own folder.
    pub path: String,
    /// A whole number or a name.
    pub label: Option<String>,
    pub caption: Option<String>,
    /// What else a JSON line says, as a JSON object.
    pub more: Option<String>,
}

/// The rows of a list, `extension` of [`LISTS`]. Faults: Code::Usage on a list that cannot be read, with the row.
pub fn rows(extension: &str, bytes: Vec<u8>) -> Result<Vec<Row>> {
    let mut rows = match extension {
        "csv" => separated(b',', &bytes)?,
        "tsv" => separated(b'\t', &bytes)?,
        "jsonl" => lines(&bytes)?,
        _ => columns(bytes.into())?,
    };
    for row in &mut rows {
        // One picture has one name.
        while let Some(rest) = row.path.strip_prefix("./") {
            row.path = rest.to_owned();
        }
    }
    match rows.iter().position(|row| row.path.is_empty()) {
        Some(at) => Err(Fault::usage(format!("row {} has no path; every row names a picture", at + 1))),
        None => Ok(rows),
    }
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn separated(delimiter: u8, bytes: &[u8]) -> Result<Vec<Row>> {
    let wrong = |error: csv::Error| Fault::usage(format!("not a list of rows and columns: {error}"));
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let heads = reader.headers().map_err(wrong)?.clone();
    let place = |name: &str| heads.iter().position(|head| head.trim() == name);
    let Some(path) = place("path") else {
        let found: Vec<&str> = heads.iter().collect();
        return Err(no_path(&found.join(", ")));
    };
    let (label, caption) = (place("label"), place("caption"));
    let row = |record: csv::Result<csv::StringRecord>| {
        let record = record.map_err(wrong)?;
        let cell = |at: Option<usize>| at.and_then(|at| record.get(at)).and_then(some);
        Ok(Row { path: cell(Some(path)).unwrap_or_default(), label: cell(label), caption: cell(caption), more: None })
    };
    reader.records().map(row).collect()
}

fn no_path(found: &str) -> Fault {
    Fault::usage(format!(
        "there is no column `path`, the columns are {found}; the first row names the columns path, label, caption"
    ))
}

fn lines(bytes: &[u8]) -> Result<Vec<Row>> {
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    let lines = lines.filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace));
    let row = |(at, line): (usize, &[u8])| {
        let wrong = |why: String| Fault::usage(format!("line {}: {why}", at + 1));
        let mut object: Map<String, Value> =
            serde_json::from_slice(line).map_err(|error| wrong(format!("not a JSON object: {error}")))?;
        let mut text = |name: &str| match object.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(some(&text)),
            Some(Value::Number(number)) if name == "label" && !number.is_f64() => Ok(Some(number.to_string())),
            Some(other) => Err(wrong(format!("{name} is {other}; a text is wanted, or for a label a whole number"))),
        };
        let (path, label, caption) = (text("path")?.unwrap_or_default(), text("label")?, text("caption")?);
        let more = (!object.is_empty()).then(|| Value::Object(object).to_string());
        Ok(Row { path, label, caption, more })
    };
    lines.map(row).collect()
}

fn columns(bytes: Bytes) -> Result<Vec<Row>> {
    let wrong = |error: parquet::errors::ParquetError| Fault::usage(format!("not Parquet that can be read: {error}"));
    let reader = SerializedFileReader::new(bytes).map_err(wrong)?;
    let schema = reader.metadata().file_metadata().schema();
    let all = schema.get_fields();
    let wanted: Vec<Arc<Type>> =
        all.iter().filter(|field| ["path", "label", "caption"].contains(&field.name())).cloned().collect();
    if !wanted.iter().any(|field| field.name() == "path") {
        return Err(no_path(&all.iter().map(|field| field.name()).collect::<Vec<_>>().join(", ")));
    }
    // Columns that nobody asked for are not unpacked.
    let wanted = Type::group_type_builder(schema.name()).with_fields(wanted).build().map_err(wrong)?;
    let row = |(at, row): (usize, parquet::errors::Result<parquet::record::Row>)| {
        let row = row.map_err(wrong)?;
        let mut found = Row::default();
        for (name, field) in row.get_column_iter() {
            let text = cell(field).ok_or_else(|| {
                Fault::usage(format!(
                    "row {}: {name} is {field}; a text is wanted, or for a label a whole number",
                    at + 1
                ))
            })?;
            match &name[..] {
                "path" => found.path = text.unwrap_or_default(),
                "label" => found.label = text,
                _ => found.caption = text,
            }
        }
        Ok(found)
    };
    reader.get_row_iter(Some(wanted)).map_err(wrong)?.enumerate().map(row).collect()
}

/// A text or a whole number as text; the outer None for anything else.
fn cell(field: &Field) -> Option<Option<String>> {
    match field {
        Field::Null => Some(None),
        Field::Str(text) => Some(some(text)),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok().map(some),
        Field::Byte(_) | Field::Short(_) | Field::Int(_) | Field::Long(_) => Some(Some(field.to_string())),
        Field::UByte(_) | Field::UShort(_) | Field::UInt(_) | Field::ULong(_) => Some(Some(field.to_string())),
        _ => None,
    }
}
