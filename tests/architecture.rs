//! The laws of the house, as tests.

use crate::support::{Outcome, root};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

crate::trials![
    a_module_imports_only_what_stands_above_it,
    a_part_imports_only_the_parts_above_it,
    a_methods_name_stays_in_its_room,
    a_method_is_short,
    unsafe_stands_only_at_the_borders,
    no_feature_is_asked_for_outside_the_files_named_for_it,
    every_file_says_what_it_is_and_is_named_for_it,
    every_operation_is_tested,
    the_readme_leads_to_what_exists,
];

/// Files under `folder` with this extension.
pub fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            if entry.path().is_dir() { walk(&entry.path(), out) } else { out.push(entry.path()) }
        }
    }
    let mut out = Vec::new();
    walk(&root().join(folder), &mut out);
    out.retain(|path| path.extension().is_some_and(|found| found == extension));
    out.sort();
    assert!(!out.is_empty(), "no .{extension} under {folder}");
    out
}

pub fn text(path: &Path) -> String {
    std::fs::read_to_string(path).expect("a text file")
}

pub fn short(path: &Path) -> String {
    path.strip_prefix(root()).expect("inside the repository").display().to_string()
}

/// The `pub mod` and `mod` lines of a file, in order.
fn modules(path: &Path) -> Vec<String> {
    let name = |line: &str| {
        let line = line.strip_prefix("pub ").unwrap_or(line);
        Some(line.strip_prefix("mod ")?.split(';').next()?.to_string())
    };
    text(path).lines().filter_map(name).collect()
}

/// The first segment after `prefix` wherever the text names it, brace groups included.
fn named_after(text: &str, prefix: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        let rest = &text[at + prefix.len()..];
        let word =
            |text: &str| text.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").to_string();
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut items = vec![String::new()];
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => items.push(String::new()),
                    c if depth == 0 => items.last_mut().expect("an item").push(c),
                    _ => {}
                }
            }
            found.extend(items.iter().map(|item| word(item)));
        } else {
            found.insert(word(rest));
        }
    }
    found.remove("");
    found
}

fn imports_run_one_way(folder: &str, list: &str, prefix: &str) {
    let order = modules(&root().join(list));
    assert!(order.len() > 3, "{list} lists its modules");
    let place = |module: &str| order.iter().position(|found| found == module);
    for path in files(folder, "rs") {
        let inside = path.strip_prefix(root().join(folder)).expect("inside").components().next().expect("a name");
        let own = inside.as_os_str().to_string_lossy().trim_end_matches(".rs").to_string();
        let Some(at) = place(&own) else { continue };
        for other in named_after(&text(&path), prefix) {
            let Some(above) = place(&other) else { continue };
            assert!(above <= at, "{} imports {prefix}{other}, which stands below {own} in {list}", short(&path));
        }
    }
}

fn a_module_imports_only_what_stands_above_it() -> Outcome {
    imports_run_one_way("src", "src/lib.rs", "crate::");
    Ok(())
}

fn a_part_imports_only_the_parts_above_it() -> Outcome {
    imports_run_one_way("src/part", "src/part/mod.rs", "crate::part::");
    Ok(())
}

fn a_methods_name_stays_in_its_room() -> Outcome {
    let methods: Vec<String> =
        modules(&root().join("src/method/mod.rs")).into_iter().filter(|name| name != "catalog").collect();
    assert!(methods.contains(&"mae".to_string()));
    for path in files("src", "rs") {
        let place = short(&path);
        // Formats are called what the world calls them.
        if place.starts_with("src/method/") || place.starts_with("src/run/exchange/") {
            continue;
        }
        for line in text(&path).lines() {
            // A path to a config and a paper's name in a comment are not code that knows a method.
            let code = line.split("//").next().unwrap_or("").replace("configs/tiny/mae.json", "");
            // A view mirrors pictures, which the config calls a flip, and so libtorch calls what a tensor does.
            let code = if place.starts_with("src/part/view/") { code.replace("flip", "") } else { code };
            let code = code.replace(".flip(", "");
            let words: BTreeSet<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            for method in &methods {
                assert!(!words.contains(method.as_str()), "{place} names the method {method}: {line}");
            }
        }
    }
    Ok(())
}

/// What methods share is a part; what is left is the paper's figure.
fn a_method_is_short() -> Outcome {
    for path in files("src/method", "rs") {
        let lines = text(&path).lines().count();
        assert!(lines <= 150, "{} has {lines} lines: move what others need too into a part", short(&path));
    }
    Ok(())
}

fn unsafe_stands_only_at_the_borders() -> Outcome {
    let allowed = ["src/bridge/", "src/device/mpi.rs", "src/device/nccl/", "src/op/launch/", "src/bin/decode/raw.rs"];
    for path in files("src", "rs") {
        let place = short(&path);
        let code = |line: &str| line.split("//").next().unwrap_or("").to_string();
        let forms = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait"];
        let used = text(&path).lines().any(|line| forms.iter().any(|form| code(line).contains(form)));
        assert!(!used || allowed.iter().any(|room| place.starts_with(room)), "{place} uses unsafe");
    }
    Ok(())
}

fn no_feature_is_asked_for_outside_the_files_named_for_it() -> Outcome {
    for path in files("src", "rs") {
        assert!(!text(&path).contains("cfg(feature"), "{} asks for a feature", short(&path));
    }
    Ok(())
}

fn every_file_says_what_it_is_and_is_named_for_it() -> Outcome {
    let nothing = ["util", "utils", "common", "helper", "helpers", "misc", "base", "core"];
    for path in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let place = short(&path);
        let body = text(&path);
        assert!(body.starts_with("//! "), "{place} does not begin by saying what it is");
        let stem = path.file_stem().expect("a name").to_string_lossy().to_string();
        assert!(!nothing.contains(&stem.as_str()), "{place} has a name that says nothing");
        let lines = body.lines().count();
        assert!(lines <= 500, "{place} has {lines} lines: it does more than one thing");
    }
    Ok(())
}

/// A kernel has an operation of its name that lists its source, an operation has tests that name it, and where it has a
/// kernel, tests that call that.
fn every_operation_is_tested() -> Outcome {
    let name = |path: &Path| path.file_stem().expect("a name").to_string_lossy().to_string();
    let kernels: BTreeSet<String> = files("kernels", "cu").iter().map(|path| name(path)).collect();
    let sources: BTreeSet<String> = occlude::op::sources().iter().map(|source| source.name.to_string()).collect();
    assert_eq!(kernels, sources, "kernels/*.cu and op::sources() are the same set");
    let mut tested = String::new();
    for path in files("tests", "rs") {
        if name(&path) == "op" || name(&path).starts_with("kernel") {
            tested += &text(&path);
        }
    }
    let operations = modules(&root().join("src/op/mod.rs"));
    for operation in operations.iter().filter(|operation| *operation != "launch") {
        assert!(
            tested.contains(&format!("{operation}::")),
            "neither tests/op.rs nor tests/kernel*.rs tests {operation}"
        );
    }
    for kernel in kernels {
        // An operation of several files names them after itself.
        let owner =
            operations.iter().find(|operation| kernel == **operation || kernel.starts_with(&format!("{operation}_")));
        let Some(owner) = owner else { panic!("kernels/{kernel}.cu has no operation of its name") };
        let rest = kernel[owner.len()..].trim_start_matches('_');
        let called = [owner.as_str(), rest].iter().any(|name| tested.contains(&format!("{name}::kernel")));
        assert!(called, "no test in tests/kernel*.rs calls a kernel() of {kernel}");
    }
    Ok(())
}

fn the_readme_leads_to_what_exists() -> Outcome {
    let readme = text(&root().join("README.md"));
    let links: Vec<&str> = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    assert!(links.len() > 15, "the README walks a sample's route");
    for link in links.into_iter().filter(|link| !link.starts_with("http")) {
        assert!(root().join(link).exists(), "the README leads to {link}, which is not there");
    }
    Ok(())
}
