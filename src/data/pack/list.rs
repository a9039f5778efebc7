//! Reads lists of samples: CSV, TSV, JSON lines and Parquet with the columns `path` and, optionally, `label` and
//! `caption`.

use crate::error::{Error, Result};
use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Value};
use std::sync::Arc;

/// Extensions of lists.
pub const LIST_EXTENSIONS: &[&str] = &["csv", "tsv", "jsonl", "parquet"];

/// One sample of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListRow {
    /// Path of the file, relative to the list's folder.
    pub path: String,
    /// An integer or a name.
    pub label: Option<String>,
    pub caption: Option<String>,
    /// Other keys of a JSON line, as a JSON object.
    pub metadata: Option<String>,
}

/// Reads the rows of a list with an extension of [`LIST_EXTENSIONS`].
///
/// # Errors
/// ExitCode::Usage for an invalid list, with the row.
pub fn read_list(extension: &str, bytes: Vec<u8>) -> Result<Vec<ListRow>> {
    let mut rows = match extension {
        "csv" => read_separated(b',', &bytes)?,
        "tsv" => read_separated(b'\t', &bytes)?,
        "jsonl" => read_json_lines(&bytes)?,
        _ => read_parquet(bytes.into())?,
    };
    for row in &mut rows {
        // A file has one path, so that duplicates are found.
        while let Some(rest) = row.path.strip_prefix("./") {
            row.path = rest.to_owned();
        }
    }
    match rows.iter().position(|row| row.path.is_empty()) {
        Some(index) => Err(Error::usage(format!("row {} has no path; every row names a file", index + 1))),
        None => Ok(rows),
    }
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn read_separated(delimiter: u8, bytes: &[u8]) -> Result<Vec<ListRow>> {
    let invalid = |error: csv::Error| Error::usage(format!("not a list of rows and columns: {error}"));
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let headers = reader.headers().map_err(invalid)?.clone();
    let column = |name: &str| headers.iter().position(|header| header.trim() == name);
    let Some(path) = column("path") else {
        let found: Vec<&str> = headers.iter().collect();
        return Err(no_path_error(&found.join(", ")));
    };
    let label = column("label");
    let caption = column("caption");
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(invalid)?;
        let cell = |column: Option<usize>| column.and_then(|column| record.get(column)).and_then(non_empty);
        rows.push(ListRow {
            path: cell(Some(path)).unwrap_or_default(),
            label: cell(label),
            caption: cell(caption),
            metadata: None,
        });
    }
    Ok(rows)
}

fn no_path_error(found: &str) -> Error {
    Error::usage(format!(
        "there is no column `path`, the columns are {found}; the first row names the columns path, label, caption"
    ))
}

fn read_json_lines(bytes: &[u8]) -> Result<Vec<ListRow>> {
    let mut rows = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let invalid = |reason: String| Error::usage(format!("line {}: {reason}", index + 1));
        let mut object: Map<String, Value> =
            serde_json::from_slice(line).map_err(|error| invalid(format!("not a JSON object: {error}")))?;
        let mut take_text = |name: &str| match object.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(non_empty(&text)),
            Some(Value::Number(number)) if name == "label" && !number.is_f64() => Ok(Some(number.to_string())),
            Some(other) => Err(invalid(format!("{name} is {other}; expected a string or, for a label, an integer"))),
        };
        let path = take_text("path")?.unwrap_or_default();
        let label = take_text("label")?;
        let caption = take_text("caption")?;
        let metadata = (!object.is_empty()).then(|| Value::Object(object).to_string());
        rows.push(ListRow { path, label, caption, metadata });
    }
    Ok(rows)
}

fn read_parquet(bytes: Bytes) -> Result<Vec<ListRow>> {
    let invalid = |error: parquet::errors::ParquetError| Error::usage(format!("not a valid Parquet file: {error}"));
    let reader = SerializedFileReader::new(bytes).map_err(invalid)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns = schema.get_fields();
    // Other columns are not decoded.
    let is_used = |column: &&Arc<Type>| ["path", "label", "caption"].contains(&column.name());
    let used: Vec<Arc<Type>> = columns.iter().filter(is_used).cloned().collect();
    if !used.iter().any(|column| column.name() == "path") {
        let found: Vec<&str> = columns.iter().map(|column| column.name()).collect();
        return Err(no_path_error(&found.join(", ")));
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(used).build().map_err(invalid)?;
    let mut rows = Vec::new();
    for (index, record) in reader.get_row_iter(Some(projection)).map_err(invalid)?.enumerate() {
        let mut row = ListRow::default();
        for (name, field) in record.map_err(invalid)?.get_column_iter() {
            let text = field_text(field).ok_or_else(|| {
                Error::usage(format!(
                    "row {}: {name} is {field}; expected a string or, for a label, an integer",
                    index + 1
                ))
            })?;
            match &name[..] {
                "path" => row.path = text.unwrap_or_default(),
                "label" => row.label = text,
                _ => row.caption = text,
            }
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Returns a string or an integer as text; the outer None is any other type.
fn field_text(field: &Field) -> Option<Option<String>> {
    match field {
        Field::Null => Some(None),
        Field::Str(text) => Some(non_empty(text)),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok().map(non_empty),
        Field::Byte(_) | Field::Short(_) | Field::Int(_) | Field::Long(_) => Some(Some(field.to_string())),
        Field::UByte(_) | Field::UShort(_) | Field::UInt(_) | Field::ULong(_) => Some(Some(field.to_string())),
        _ => None,
    }
}
