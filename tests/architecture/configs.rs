//! Checks of configs/: every config is a row of configs/README.md.

use super::source::{files, relative_path};
use crate::support::{Outcome, root};
use occlude::config::Config;
use std::path::Path;

crate::trials![the_table_of_configs_is_current];

const INTRODUCTION: &str = "# Configs

Each file holds the numbers of a paper's table, or a small training that runs on two CPU cores (`tiny/`, one for each
method). `occlude train --config <file>` runs one; `--set path.to.key=value` changes a value.

This table is made from the `about` of the files: `OCCLUDE_WRITE_DOCS=1 launch/test the_table_of_configs` writes it.

| config | method | what | source | measured |
|---|---|---|---|---|
";

/// Returns the text of a cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// Returns the row of a config.
fn row(path: &Path) -> Result<String, occlude::error::Error> {
    let config = Config::read(path, &[])?;
    let name = relative_path(path).replacen("configs/", "", 1);
    let about = &config.about;
    let cells = [&about.title, &about.source, &about.measured].map(|text| cell(text)).join(" | ");
    Ok(format!("| [{name}]({name}) | {} | {cells} |\n", config.method.name()))
}

fn the_table_of_configs_is_current() -> Outcome {
    let mut table = INTRODUCTION.to_string();
    for path in files("configs", "json") {
        table += &row(&path)?;
    }
    let path = root().join("configs/README.md");
    if std::env::var_os("OCCLUDE_WRITE_DOCS").is_some() {
        std::fs::write(&path, &table)?;
    }
    let found = std::fs::read_to_string(&path)?;
    assert_eq!(found, table, "configs/README.md is not what the configs say: run with OCCLUDE_WRITE_DOCS=1");
    Ok(())
}
