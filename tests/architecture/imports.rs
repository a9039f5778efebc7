//! Checks of the order of modules: imports run one way, and tests/ mirrors src/.

use super::source::{Source, all_files, assert_none, modules, relative_path, sources};
use crate::support::{Outcome, root};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

crate::trials![
    modules_import_only_modules_listed_before_them,
    parts_import_only_parts_listed_before_them,
    no_two_files_import_each_other,
    no_folder_of_src_is_called_target,
    tests_mirror_src,
];

/// Module path of each file of the library, such as `["part", "mask", "text"]`, with the modules that it imports.
type Imports = BTreeMap<Vec<String>, BTreeSet<Vec<String>>>;

/// Returns the module path of a file of src.
fn module_path(path: &str) -> Vec<String> {
    let inside = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    inside.split('/').filter(|segment| *segment != "lib").map(str::to_string).collect()
}

/// Reads the tree of paths at a token, such as `crate::{grid::Grid, op::{self, linear}}`. Adds each path behind `prefix`
/// and returns the index of the token behind the tree.
fn read_paths(source: &Source, mut at: usize, prefix: &[String], out: &mut Vec<Vec<String>>) -> usize {
    let mut path = prefix.to_vec();
    loop {
        if source.token(at) == "{" {
            let end = source.closing(at);
            at += 1;
            while at < end {
                at = read_paths(source, at, &path, out) + 1;
            }
            return end + 1;
        }
        path.push(source.token(at).to_string());
        at += 1;
        if source.token(at) != "::" || source.token(at + 1) == "<" {
            break;
        }
        at += 1;
    }
    if source.token(at) == "as" {
        at += 2;
    }
    out.push(path);
    at
}

/// Replaces `crate`, `super` and `self` at the front of a path that stands in `module`.
fn absolute_path(path: &[String], module: &[String]) -> Vec<String> {
    let mut base = module.to_vec();
    let mut rest = path;
    while let Some(first) = rest.first() {
        match first.as_str() {
            "crate" => base.clear(),
            "super" => drop(base.pop()),
            "self" => {}
            _ => break,
        }
        rest = &rest[1..];
    }
    base.extend_from_slice(rest);
    base
}

fn imports() -> Imports {
    let sources: Vec<Source> = sources(&["src"])
        .into_iter()
        .filter(|source| !source.path.starts_with("src/bin/") && source.path != "src/main.rs")
        .collect();
    let known: BTreeSet<Vec<String>> = sources.iter().map(|source| module_path(&source.path)).collect();
    let mut imports = Imports::new();
    for source in &sources {
        let module = module_path(&source.path);
        let mut paths = Vec::new();
        for at in 0..source.tokens.len() {
            let relative = matches!(source.token(at), "crate" | "super" | "self") && source.token(at + 1) == "::";
            if relative && (at == 0 || source.token(at - 1) != "::") {
                read_paths(source, at, &[], &mut paths);
            }
        }
        let found = imports.entry(module.clone()).or_default();
        for path in paths {
            let mut path = absolute_path(&path, &module);
            while !known.contains(&path) {
                path.pop();
            }
            if path != module {
                found.insert(path);
            }
        }
    }
    imports
}

/// Asserts that modules under `folder` import only modules listed before them in `list`, and themselves.
fn assert_imports_follow_order(folder: &[&str], list: &str) {
    let order = modules(&root().join(list));
    assert!(order.len() > 3, "{list} lists its modules");
    let position = |path: &[String]| {
        let inside = path.len() > folder.len() && path[..folder.len()] == *folder;
        inside.then(|| order.iter().position(|name| *name == path[folder.len()])).flatten()
    };
    let mut violations = Vec::new();
    for (module, others) in imports() {
        let Some(at) = position(&module) else { continue };
        for other in others {
            if position(&other).is_some_and(|above| above > at) {
                violations.push(format!("{} imports {}", module.join("::"), other.join("::")));
            }
        }
    }
    assert_none(&format!("modules import what {list} lists after them"), &violations);
}

fn modules_import_only_modules_listed_before_them() -> Outcome {
    assert_imports_follow_order(&[], "src/lib.rs");
    Ok(())
}

fn parts_import_only_parts_listed_before_them() -> Outcome {
    assert_imports_follow_order(&["part"], "src/part/mod.rs");
    Ok(())
}

/// A module and a module inside it may know each other: the outer one holds what the inner ones share.
fn no_two_files_import_each_other() -> Outcome {
    let imports = imports();
    assert!(imports.values().map(BTreeSet::len).sum::<usize>() > 300, "imports are found");
    let mut violations = Vec::new();
    for (module, others) in &imports {
        for other in others.iter().filter(|other| *other > module) {
            let nested = other.starts_with(module) || module.starts_with(other);
            if !nested && imports.get(other).is_some_and(|back| back.contains(module)) {
                violations.push(format!("{} and {}", module.join("::"), other.join("::")));
            }
        }
    }
    assert_none("files of src import each other", &violations);
    Ok(())
}

/// Tools that skip build folders skip every folder of this name.
fn no_folder_of_src_is_called_target() -> Outcome {
    let mut inside: Vec<String> = all_files("src").iter().map(|path| relative_path(path)).collect();
    inside.retain(|path| path.contains("/target/"));
    assert_none("a folder of src is called target", &inside);
    Ok(())
}

fn tests_mirror_src() -> Outcome {
    let mut known = modules(&root().join("src/lib.rs"));
    // `tests` is the file that lists the modules.
    known.extend(["support", "oracle", "launch", "architecture", "tests", "README"].map(str::to_string));
    let mut unknown = BTreeSet::new();
    for path in all_files("tests") {
        let inside = path.strip_prefix(root().join("tests"))?;
        let top = inside.components().next().expect("a name").as_os_str();
        let name = Path::new(top).file_stem().expect("a name").to_string_lossy().to_string();
        if !known.contains(&name) {
            unknown.insert(relative_path(&path));
        }
    }
    assert_none("tests/ holds what is no module of src", &unknown.into_iter().collect::<Vec<_>>());
    Ok(())
}
