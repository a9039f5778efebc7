//! Files of the repository, and Rust source as tokens.

use crate::support::root;
use std::path::{Path, PathBuf};

/// Returns the files under `folder` with this extension.
pub fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = all_files(folder);
    found.retain(|path| path.extension().is_some_and(|other| other == extension));
    assert!(!found.is_empty(), "no .{extension} under {folder}");
    found
}

/// Returns all files under `folder`.
pub fn all_files(folder: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            if entry.path().is_dir() { walk(&entry.path(), out) } else { out.push(entry.path()) }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    found.sort();
    found
}

pub fn read_text(path: &Path) -> String {
    std::fs::read_to_string(path).expect("a text file")
}

pub fn relative_path(path: &Path) -> String {
    path.strip_prefix(root()).expect("inside the repository").display().to_string()
}

/// Returns the names in the `pub mod` and `mod` lines of a file, in order.
pub fn modules(path: &Path) -> Vec<String> {
    fn module_name(line: &str) -> Option<String> {
        let line = line.strip_prefix("pub ").unwrap_or(line);
        Some(line.strip_prefix("mod ")?.split(';').next()?.to_string())
    }
    read_text(path).lines().filter_map(module_name).collect()
}

/// A token: an identifier, a literal with its quotes, or punctuation. `::`, `=>` and `->` are one token each.
pub struct Token {
    pub text: String,
    pub line: usize,
}

/// A Rust file.
pub struct Source {
    /// Path from the root of the repository.
    pub path: String,
    pub text: String,
    pub tokens: Vec<Token>,
}

/// A function with a body.
pub struct Function {
    pub name: String,
    /// Tokens of each parameter, joined by spaces; without `self`.
    pub parameters: Vec<String>,
    pub line: usize,
    /// Lines from `fn` to the closing brace.
    pub lines: usize,
}

/// Returns the Rust files under the folders.
pub fn sources(folders: &[&str]) -> Vec<Source> {
    let paths = folders.iter().flat_map(|folder| files(folder, "rs"));
    paths
        .map(|path| {
            let text = read_text(&path);
            let tokens = tokenize(&text);
            Source { path: relative_path(&path), text, tokens }
        })
        .collect()
}

impl Source {
    /// Returns the text of a token; nothing behind the end.
    pub fn token(&self, index: usize) -> &str {
        self.tokens.get(index).map_or("", |token| token.text.as_str())
    }

    /// Returns `path:line` of a token.
    pub fn place(&self, index: usize) -> String {
        format!("{}:{}", self.path, self.tokens[index].line)
    }

    /// Returns the index of the bracket that closes the one at `open`.
    pub fn closing(&self, open: usize) -> usize {
        let mut depth = 0;
        for index in open..self.tokens.len() {
            match self.token(index) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return index;
            }
        }
        panic!("{}: a bracket is not closed", self.place(open))
    }

    /// Returns what stands between commas outside brackets, in the tokens from `start` to before `end`.
    pub fn split_at_commas(&self, start: usize, end: usize) -> Vec<String> {
        let mut items = vec![String::new()];
        let mut depth = 0;
        for index in start..end {
            let text = self.token(index);
            match text {
                "(" | "[" | "{" | "<" => depth += 1,
                ")" | "]" | "}" | ">" => depth -= 1,
                _ => {}
            }
            if text == "," && depth == 0 {
                items.push(String::new());
            } else {
                let item = items.last_mut().expect("an item");
                *item += text;
                item.push(' ');
            }
        }
        items.retain(|item| !item.trim().is_empty());
        items
    }

    /// Returns the functions that have a body.
    pub fn functions(&self) -> Vec<Function> {
        (0..self.tokens.len())
            .filter(|index| self.token(*index) == "fn")
            .filter_map(|index| self.function(index))
            .collect()
    }

    fn function(&self, start: usize) -> Option<Function> {
        let mut open = start + 2;
        if self.token(open) == "<" {
            let mut depth = 0;
            loop {
                match self.token(open) {
                    "<" => depth += 1,
                    ">" => depth -= 1,
                    _ => {}
                }
                open += 1;
                if depth == 0 {
                    break;
                }
            }
        }
        if self.token(open) != "(" {
            return None;
        }
        let close = self.closing(open);
        let mut body = close + 1;
        while !matches!(self.token(body), "{" | ";" | "") {
            let bracket = matches!(self.token(body), "(" | "[");
            body = if bracket { self.closing(body) + 1 } else { body + 1 };
        }
        if self.token(body) != "{" {
            return None;
        }
        let mut parameters = self.split_at_commas(open + 1, close);
        parameters
            .retain(|parameter| !parameter.split(':').next().expect("a name").split(' ').any(|word| word == "self"));
        let line = self.tokens[start].line;
        let lines = self.tokens[self.closing(body)].line - line + 1;
        Some(Function { name: self.token(start + 1).to_string(), parameters, line, lines })
    }
}

/// Reads Rust source as tokens, without comments.
pub fn tokenize(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut at = 0;
    let mut line = 1;
    while let Some(first) = text[at..].chars().next() {
        let rest = &text[at..];
        let length = token_length(rest, first);
        let token = &rest[..length];
        if !first.is_whitespace() && !token.starts_with("//") && !token.starts_with("/*") {
            tokens.push(Token { text: token.to_string(), line });
        }
        line += token.matches('\n').count();
        at += length;
    }
    tokens
}

/// Returns the bytes of the token, the comment or the blank at the start of `rest`.
fn token_length(rest: &str, first: char) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return rest.find("*/").map_or(rest.len(), |end| end + 2);
    }
    if let Some(length) = raw_string_length(rest) {
        return length;
    }
    match first {
        '"' => quoted_length(rest),
        '\'' => char_length(rest),
        _ if first.is_alphanumeric() || first == '_' => {
            rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
        }
        _ if ["::", "=>", "->"].iter().any(|pair| rest.starts_with(pair)) => 2,
        _ => first.len_utf8(),
    }
}

fn raw_string_length(rest: &str) -> Option<usize> {
    let behind = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = behind.len() - behind.trim_start_matches('#').len();
    if !behind[hashes..].starts_with('"') {
        return None;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let start = rest.len() - behind.len() + hashes + 1;
    Some(start + rest[start..].find(&end)? + end.len())
}

fn quoted_length(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Returns the length of a character literal or of a lifetime.
fn char_length(rest: &str) -> usize {
    let mut characters = rest.char_indices().skip(1);
    match characters.next() {
        // The character behind the backslash may be a quote.
        Some((_, '\\')) => 3 + rest[3..].find('\'').map_or(rest.len() - 3, |end| end + 1),
        Some(_) if matches!(characters.next(), Some((_, '\''))) => {
            rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at + 1)
        }
        _ => 1 + rest[1..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len() - 1),
    }
}

/// Fails with all violations of a law.
pub fn assert_none(law: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{law}:\n{}", violations.join("\n"));
}
