//! Checks of comments: every file and every public item has docs, and docs are sentences.

use super::source::{assert_none, files, read_text, relative_path};
use crate::support::{Outcome, root};

crate::trials![
    every_file_begins_with_docs,
    no_comment_begins_with_a_fragment,
    every_public_item_has_docs,
    readme_links_point_to_existing_files,
];

/// Words that begin a fragment: a comment begins with a subject and a verb.
const FRAGMENT_STARTS: &[&str] = &["What", "Of", "Where", "Whether", "As", "Those"];

fn every_file_begins_with_docs() -> Outcome {
    let mut violations: Vec<String> = Vec::new();
    for path in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        if !read_text(&path).starts_with("//! ") {
            violations.push(relative_path(&path));
        }
    }
    assert_none("a file does not begin with a module doc comment", &violations);
    Ok(())
}

/// Returns the text of a line that is a comment and nothing else.
fn comment(line: &str) -> Option<&str> {
    Some(line.trim().strip_prefix("//")?.trim_start_matches(['/', '!']).trim())
}

fn no_comment_begins_with_a_fragment() -> Outcome {
    let mut violations = Vec::new();
    for path in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let mut inside = false;
        for (index, line) in read_text(&path).lines().enumerate() {
            let text = comment(line).unwrap_or("");
            let first = text.split(' ').next().unwrap_or("");
            if !inside && FRAGMENT_STARTS.contains(&first) {
                violations.push(format!("{}:{} {text}", relative_path(&path), index + 1));
            }
            inside = !text.is_empty();
        }
    }
    assert_none("a comment begins with a fragment", &violations);
    Ok(())
}

/// Returns the kind of a public item that begins in this line.
fn public_item(line: &str) -> Option<&str> {
    let words = line.trim().strip_prefix("pub ")?.split(' ');
    let kind = words.into_iter().find(|word| !matches!(*word, "unsafe" | "async" | "extern" | "\"C\""))?;
    ["fn", "struct", "enum", "trait", "const", "static", "type"].contains(&kind).then_some(kind)
}

/// The program's arguments are exempt: clap prints their doc comments as help.
fn every_public_item_has_docs() -> Outcome {
    let mut undocumented = Vec::new();
    for path in files("src", "rs").into_iter().filter(|path| !relative_path(path).starts_with("src/cli/")) {
        let text = read_text(&path);
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let above = lines[..index].iter().rev().find(|line| !line.trim().starts_with("#["));
            if public_item(line).is_some() && !above.is_some_and(|line| line.trim().starts_with("///")) {
                undocumented.push(format!("{}:{} {}", relative_path(&path), index + 1, line.trim()));
            }
        }
    }
    assert_none("a public item has no doc comment", &undocumented);
    Ok(())
}

fn readme_links_point_to_existing_files() -> Outcome {
    let readme = read_text(&root().join("README.md"));
    let links: Vec<&str> = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    assert!(links.len() > 15, "the README links to the source");
    for link in links.into_iter().filter(|link| !link.starts_with("http")) {
        let path = link.split('#').next().expect("a path");
        assert!(root().join(path).exists(), "the README links to {link}, which does not exist");
    }
    Ok(())
}
