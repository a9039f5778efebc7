//! Checks of operations, kernels and the code that must stay in few files.

use super::source::{Source, assert_none, files, modules, read_text, relative_path, sources};
use crate::support::{Outcome, root};
use std::collections::BTreeSet;
use std::path::Path;

crate::trials![
    unsafe_occurs_only_in_allowed_files,
    no_file_tests_for_a_cargo_feature,
    every_kernel_is_a_source_of_an_operation,
    every_operation_has_tests,
    every_kernel_has_tests,
];

/// Files and folders that call C, C++ or CUDA.
const UNSAFE_ALLOWED: &[&str] =
    &["src/bridge/", "src/dist/mpi.rs", "src/dist/nccl/", "src/op/launch/", "src/bin/decode/raw.rs"];

fn unsafe_occurs_only_in_allowed_files() -> Outcome {
    fn uses_unsafe(source: &Source) -> bool {
        (0..source.tokens.len()).any(|at| source.token(at) == "unsafe")
    }
    for allowed in UNSAFE_ALLOWED {
        assert!(root().join(allowed).exists(), "{allowed} may use unsafe and does not exist");
    }
    let mut violations: Vec<String> = Vec::new();
    for source in sources(&["src"]) {
        let allowed = UNSAFE_ALLOWED.iter().any(|allowed| source.path.starts_with(allowed));
        if !allowed && uses_unsafe(&source) {
            violations.push(source.path);
        }
    }
    assert_none("a file uses unsafe", &violations);
    Ok(())
}

fn no_file_tests_for_a_cargo_feature() -> Outcome {
    for path in files("src", "rs") {
        assert!(!read_text(&path).contains("cfg(feature"), "{} tests for a Cargo feature", relative_path(&path));
    }
    Ok(())
}

fn file_stem(path: &Path) -> String {
    path.file_stem().expect("a name").to_string_lossy().to_string()
}

fn kernels() -> BTreeSet<String> {
    files("kernels", "cu").iter().map(|path| file_stem(path)).collect()
}

fn operations() -> Vec<String> {
    let mut operations = modules(&root().join("src/op/mod.rs"));
    operations.retain(|operation| operation != "launch");
    operations
}

/// Returns the text of the tests of formulas and kernels.
fn operation_tests() -> String {
    let mut text = String::new();
    for path in files("tests/op", "rs") {
        let name = file_stem(&path);
        if name.starts_with("formula") || name.starts_with("kernel") {
            text += &read_text(&path);
        }
    }
    text
}

fn every_kernel_is_a_source_of_an_operation() -> Outcome {
    let listed: BTreeSet<String> = occlude::op::kernel_sources().iter().map(|source| source.name.to_string()).collect();
    assert_eq!(kernels(), listed, "kernels/*.cu and op::kernel_sources() are the same set");
    Ok(())
}

fn every_operation_has_tests() -> Outcome {
    let tests = operation_tests();
    let mut untested = operations();
    untested.retain(|operation| !tests.contains(&format!("{operation}::")));
    assert_none("neither tests/op/formula*.rs nor tests/op/kernel*.rs tests", &untested);
    Ok(())
}

fn every_kernel_has_tests() -> Outcome {
    let tests = operation_tests();
    let operations = operations();
    for kernel in kernels() {
        // An operation with several kernels prefixes their names with its own.
        let owner =
            operations.iter().find(|operation| kernel == **operation || kernel.starts_with(&format!("{operation}_")));
        let Some(owner) = owner else { panic!("kernels/{kernel}.cu has no operation of its name") };
        let rest = kernel[owner.len()..].trim_start_matches('_');
        let called = [owner.as_str(), rest].iter().any(|name| tests.contains(&format!("{name}::kernel")));
        assert!(called, "no test in tests/op/kernel*.rs calls a kernel() of {kernel}");
    }
    Ok(())
}
