//! Checks of sizes: functions, parameter lists, files.

use super::source::{assert_none, files, read_text, relative_path, sources};
use crate::support::Outcome;

crate::trials![
    no_function_is_longer_than_60_lines,
    no_function_has_more_than_6_parameters,
    no_file_is_longer_than_500_lines,
    no_method_is_longer_than_120_lines,
];

const MAX_FUNCTION_LINES: usize = 60;
const MAX_PARAMETERS: usize = 6;
const MAX_FILE_LINES: usize = 500;
const MAX_METHOD_LINES: usize = 120;

fn no_function_is_longer_than_60_lines() -> Outcome {
    let mut violations = Vec::new();
    let mut found = 0;
    for source in sources(&["src", "tests"]) {
        for function in source.functions() {
            found += 1;
            if function.lines > MAX_FUNCTION_LINES {
                violations.push(format!("{}:{} {} has {}", source.path, function.line, function.name, function.lines));
            }
        }
    }
    assert!(found > 2000, "{found} functions are found");
    assert_none(&format!("functions are longer than {MAX_FUNCTION_LINES} lines"), &violations);
    Ok(())
}

fn no_function_has_more_than_6_parameters() -> Outcome {
    let mut violations = Vec::new();
    for source in sources(&["src", "tests"]) {
        for function in source.functions() {
            let count = function.parameters.len();
            if count > MAX_PARAMETERS {
                violations.push(format!("{}:{} {} has {count}", source.path, function.line, function.name));
            }
        }
    }
    assert_none(&format!("functions have more than {MAX_PARAMETERS} parameters beside self"), &violations);
    Ok(())
}

fn no_file_is_longer_than_500_lines() -> Outcome {
    let mut violations = Vec::new();
    for path in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let lines = read_text(&path).lines().count();
        if lines > MAX_FILE_LINES {
            violations.push(format!("{} has {lines}", relative_path(&path)));
        }
    }
    assert_none(&format!("files are longer than {MAX_FILE_LINES} lines: they do more than one thing"), &violations);
    Ok(())
}

/// Shared code belongs in a part; a method file holds only what is particular to its paper.
fn no_method_is_longer_than_120_lines() -> Outcome {
    let mut violations = Vec::new();
    for path in files("src/method", "rs") {
        let name = relative_path(&path);
        let lines = read_text(&path).lines().count();
        // mod.rs holds the traits, catalog.rs the list.
        if lines > MAX_METHOD_LINES && !name.ends_with("/mod.rs") && !name.ends_with("/catalog.rs") {
            violations.push(format!("{name} has {lines}"));
        }
    }
    assert_none(
        &format!("methods are longer than {MAX_METHOD_LINES} lines: move shared code into a part"),
        &violations,
    );
    Ok(())
}
