//! Checks of statements: bindings, matches, parameters, type names.

use super::source::{Source, assert_none, sources};
use crate::support::Outcome;
use std::collections::BTreeMap;

crate::trials![
    no_let_binds_a_tuple_of_values,
    no_match_has_a_boolean_arm,
    no_parameter_is_a_tuple,
    type_names_are_defined_once,
    named_closures_are_counted,
];

/// Type names that several modules define.
const SHARED_TYPE_NAMES: &[&str] = &[
    // The values of a module in the JSON; always written with the module, `text::Config`.
    "Config",
];

/// Returns the index of the `(` of a pattern behind the `let` at `at`, if it is a tuple.
fn tuple_pattern(source: &Source, at: usize) -> Option<usize> {
    let open = at + 1 + usize::from(source.token(at + 1) == "mut");
    (source.token(at) == "let" && source.token(open) == "(").then_some(open)
}

/// Says whether `let (a, b) = (x, y);` starts at this token. A `let` with an `else` matches two values at once and may stand.
fn binds_tuple_of_values(source: &Source, at: usize) -> bool {
    let Some(open) = tuple_pattern(source, at) else { return false };
    let mut equals = source.closing(open) + 1;
    if source.token(equals) == ":" {
        while !matches!(source.token(equals), "=" | ";" | "") {
            equals += 1;
        }
    }
    if source.token(equals) != "=" || source.token(equals + 1) != "(" {
        return false;
    }
    let close = source.closing(equals + 1);
    source.token(close + 1) == ";" && source.split_at_commas(equals + 2, close).len() > 1
}

fn no_let_binds_a_tuple_of_values() -> Outcome {
    let mut violations = Vec::new();
    for source in sources(&["src", "tests"]) {
        let positions = (0..source.tokens.len()).filter(|at| binds_tuple_of_values(&source, *at));
        violations.extend(positions.map(|at| source.place(at)));
    }
    assert_none("a let binds a tuple of values: write a line for each", &violations);
    Ok(())
}

fn no_match_has_a_boolean_arm() -> Outcome {
    let mut violations = Vec::new();
    for source in sources(&["src", "tests"]) {
        for at in 1..source.tokens.len() {
            let boolean = matches!(source.token(at), "true" | "false") && source.token(at + 1) == "=>";
            if boolean && matches!(source.token(at - 1), "{" | "," | "}") {
                violations.push(source.place(at));
            }
        }
    }
    assert_none("a match on a boolean: write an if", &violations);
    Ok(())
}

/// Says whether the type of a parameter is a tuple of two or more, or a reference to one.
fn is_tuple_parameter(parameter: &str) -> bool {
    let Some((_, kind)) = parameter.split_once(" : ") else { return false };
    let mut words = kind.split(' ').skip_while(|word| *word == "&" || *word == "mut" || word.starts_with('\''));
    words.next() == Some("(") && words.any(|word| word == ",")
}

fn no_parameter_is_a_tuple() -> Outcome {
    let mut violations = Vec::new();
    for source in sources(&["src", "tests"]) {
        for function in source.functions() {
            for parameter in function.parameters.iter().filter(|parameter| is_tuple_parameter(parameter)) {
                violations.push(format!("{}:{} {}({parameter})", source.path, function.line, function.name));
            }
        }
    }
    assert_none("a parameter is a tuple: name its fields in a struct", &violations);
    Ok(())
}

fn type_names_are_defined_once() -> Outcome {
    let mut positions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources(&["src"]) {
        let mut depth = 0;
        for at in 0..source.tokens.len() {
            match source.token(at) {
                "{" => depth += 1,
                "}" => depth -= 1,
                "struct" | "enum" | "trait" | "type" if depth == 0 => {
                    positions.entry(source.token(at + 1).to_string()).or_default().push(source.place(at));
                }
                _ => {}
            }
        }
    }
    assert!(positions.len() > 200, "type names are found");
    assert!(SHARED_TYPE_NAMES.len() <= 6, "names are shared only with a reason");
    positions.retain(|name, positions| positions.len() > 1 && !SHARED_TYPE_NAMES.contains(&name.as_str()));
    let violations: Vec<String> =
        positions.iter().map(|(name, positions)| format!("{name}: {}", positions.join(", "))).collect();
    assert_none("a type name is defined twice", &violations);
    Ok(())
}

/// A closure with a name that captures nothing is a private function. Text does not show what a closure captures, so the
/// number of named closures is only printed.
fn named_closures_are_counted() -> Outcome {
    for folder in ["src", "tests"] {
        let mut count = 0;
        for source in sources(&[folder]) {
            for at in 0..source.tokens.len() {
                let name = at + 1 + usize::from(source.token(at + 1) == "mut");
                let value = name + 2 + usize::from(source.token(name + 2) == "move");
                let named = source.token(at) == "let" && source.token(name + 1) == "=";
                count += usize::from(named && source.token(value) == "|");
            }
        }
        println!("{folder}: {count} closures have names");
    }
    Ok(())
}
