//! Checks of words: standard terms, American spelling, names of methods and files.

use super::source::{all_files, assert_none, files, read_text, relative_path};
use crate::support::Outcome;
use occlude::method::catalog;
use std::path::PathBuf;

crate::trials![
    src_uses_standard_terms,
    spelling_is_american,
    method_names_occur_only_in_method,
    no_file_has_an_unspecific_name,
];

/// Words of an earlier vocabulary, each with a standard term in its place.
const REPLACED_WORDS: &[&str] = &[
    "told",
    "heard",
    "truth",
    "guess",
    "guesses",
    "forgetful",
    "begun",
    "looking_back",
    "speaks",
    "Pulse",
    "Booth",
    "Lent",
    "Said",
    "Landing",
    "Ledger",
    "Spool",
    "Errand",
    "likeness",
];

/// Parts of words in British spelling.
const BRITISH_PARTS: &[&str] = &[
    "normalis",
    "initialis",
    "optimis",
    "serialis",
    "synchronis",
    "standardis",
    "quantis",
    "tokenis",
    "solaris",
    "posteris",
    "equalis",
    "organis",
    "recognis",
    "summaris",
    "minimis",
    "maximis",
    "utilis",
    "generalis",
    "specialis",
    "randomis",
    "visualis",
    "vectoris",
    "colour",
    "grey",
    "centre",
    "centring",
    "neighbour",
    "behaviour",
    "favour",
    "labelled",
    "labelling",
    "modelled",
    "modelling",
    "cancelled",
    "cancelling",
    "signalled",
    "signalling",
    "artefact",
    "analyse",
    "catalogue",
    "licence",
    "defence",
    "learnt",
    "whilst",
];

/// Words that contain a British part and are spelled so everywhere.
const AMERICAN_WORDS: &[&str] = &["optimism", "optimistic", "generalist", "specialist", "analyses"];

/// Splits text into words of letters, digits and underscores.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Returns `path:line` and the word of each word for which `is_wrong` holds.
fn find_words(paths: &[PathBuf], is_wrong: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for path in paths {
        // Pictures and other binary files have no words.
        let Ok(text) = std::fs::read_to_string(path) else { continue };
        for (index, line) in text.lines().enumerate() {
            let wrong = words(line).filter(|word| is_wrong(word));
            found.extend(wrong.map(|word| format!("{}:{} {word}", relative_path(path), index + 1)));
        }
    }
    found
}

fn src_uses_standard_terms() -> Outcome {
    assert_none("not the standard term", &find_words(&files("src", "rs"), |word| REPLACED_WORDS.contains(&word)));
    Ok(())
}

fn is_british(word: &str) -> bool {
    let word = word.to_lowercase();
    BRITISH_PARTS.iter().any(|part| word.contains(part)) && !AMERICAN_WORDS.contains(&word.as_str())
}

fn spelling_is_american() -> Outcome {
    let folders = ["src", "configs", "kernels", "tests", "launch"];
    let mut paths: Vec<PathBuf> = folders.iter().flat_map(|folder| all_files(folder)).collect();
    // This file lists the British forms.
    paths.retain(|path| relative_path(path) != "tests/architecture/words.rs");
    assert_none("British spelling", &find_words(&paths, is_british));
    Ok(())
}

fn method_names_occur_only_in_method() -> Outcome {
    let mut violations = Vec::new();
    for path in files("src", "rs") {
        let name = relative_path(&path);
        // Interop formats are named after the projects that define them.
        if name.starts_with("src/method/") || name.starts_with("src/interop/") {
            continue;
        }
        for (index, line) in read_text(&path).lines().enumerate() {
            // Paths of configs and names of papers in comments are allowed.
            let code = line.split("//").next().unwrap_or("").replace("configs/tiny/mae.json", "");
            // `flip` is also a horizontal flip in views, and an operation of libtorch.
            let code =
                if name.starts_with("src/view/") { code.replace("flip", "") } else { code.replace(".flip(", "(") };
            let methods = words(&code).filter(|word| catalog::Config::NAMES.contains(word));
            violations.extend(methods.map(|method| format!("{name}:{} {method}", index + 1)));
        }
    }
    assert_none("a method's name outside src/method", &violations);
    Ok(())
}

fn no_file_has_an_unspecific_name() -> Outcome {
    let unspecific = ["util", "utils", "common", "helper", "helpers", "misc", "base", "core"];
    let mut paths: Vec<String> = Vec::new();
    for path in ["src", "tests", "kernels", "launch"].iter().flat_map(|folder| all_files(folder)) {
        let stem = path.file_stem().expect("a name").to_string_lossy().to_string();
        if unspecific.contains(&stem.as_str()) {
            paths.push(relative_path(&path));
        }
    }
    assert_none("an unspecific name", &paths);
    Ok(())
}
