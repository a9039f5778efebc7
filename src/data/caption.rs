//! Captions become token ids, as many for each: cut where there are more, padded where there are fewer.
//!
//! Reads local vocabularies alone: a `tokenizer.json` (Hugging Face), BERT's `vocab.txt` (WordPiece, uncased), CLIP's
//! `vocab.json` with `merges.txt` beside it, and CLIP's `bpe_simple_vocab_16e6.txt.gz`. Of WordPiece a caption is its tokens
//! and then padding, without marks for begin and end (FLIP's code); of CLIP's byte pairs the begin mark, its tokens, the
//! end mark, which is there always, and zeros (open_clip). Texts are taken as they are: open_clip also mends wrongly decoded
//! letters and HTML entities, which is better done once, where data are packed.

mod vocabulary; // files → a tokenizer
mod train; // captions → a vocabulary

pub use train::train;

use super::index::Row;
use super::shard::Shard;
use crate::fault::{Code, Fault, Result};
use std::path::Path;

/// The longest caption, in bytes.
pub const LONGEST: usize = 64 << 10;

/// Where the caption of a sample lies: its `.txt` member. Code::Corrupt where there is none, or too long a one.
pub fn member(shard: &Shard, row: usize) -> Result<Row<'_>> {
    let member = shard.wanted(row, &["txt"])?;
    match u64::from(member.length) > LONGEST as u64 {
        false => Ok(member),
        true => {
            let (name, bytes) = (format!("{}: {}", shard.name(), member.name), member.length);
            Err(Fault::new(Code::Corrupt, format!("{name} has {bytes} bytes, and a caption at most {LONGEST}")))
        }
    }
}

/// Makes captions into ids; threads share one.
pub struct Tokenizer {
    tokens: tokenizers::Tokenizer,
    marks: Marks,
    length: usize,
    file: String,
    /// Of the vocabulary's files.
    digest: String,
}

/// What stands around a caption's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marks {
    /// Nothing in front, and this behind, up to the length.
    Padding(i64),
    /// Begin and end; zeros behind.
    Around([i64; 2]),
}

impl Tokenizer {
    /// Reads a vocabulary, for captions of `length` tokens. Faults with Code::Usage on a file that is none.
    pub fn open(file: &str, length: usize) -> Result<Tokenizer> {
        let wrong = |why: String| Fault::usage(format!("{file}: {why}"));
        let (tokens, digest) = vocabulary::read(Path::new(file)).map_err(wrong)?;
        let id = |names: &[&str]| names.iter().find_map(|name| tokens.token_to_id(name)).map(i64::from);
        let around = (id(&["<|startoftext|>", "<start_of_text>"]), id(&["<|endoftext|>", "<end_of_text>"]));
        let marks = match (around, id(&["[PAD]", "<pad>"])) {
            ((Some(begin), Some(end)), _) if length >= 2 => Marks::Around([begin, end]),
            ((Some(_), Some(_)), _) => return Err(wrong(format!("{length} tokens leave no room for begin and end"))),
            (_, Some(padding)) => Marks::Padding(padding),
            _ => {
                let remedy = "give a WordPiece vocabulary such as BERT's, or CLIP's byte pairs";
                return Err(wrong(format!("it has neither [PAD] nor marks of begin and end; {remedy}")));
            }
        };
        Ok(Tokenizer { tokens, marks, length, file: file.to_owned(), digest })
    }

    /// How many tokens it knows: ids lie below it.
    pub fn size(&self) -> usize {
        // A file may number its tokens with gaps.
        self.tokens.get_vocab(true).values().max().map_or(0, |&last| last as usize + 1)
    }

    /// Tokens of each caption.
    pub fn length(&self) -> usize {
        self.length
    }

    /// What fills up captions that are shorter.
    pub fn padding(&self) -> i64 {
        match self.marks {
            Marks::Padding(padding) => padding,
            Marks::Around(_) => 0,
        }
    }

    /// What tells this vocabulary from others.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The ids of a `.txt` member. Faults with Code::Corrupt on one that is no text in UTF-8, or too long.
    pub fn caption(&self, bytes: &[u8]) -> Result<Vec<i64>> {
        let corrupt = |why: String| Fault::new(Code::Corrupt, format!("its caption {why}"));
        if bytes.len() > LONGEST {
            return Err(corrupt(format!("has {} bytes, the limit is {LONGEST}", bytes.len())));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| corrupt(format!("is not UTF-8: {error}")))?;
        self.ids(text)
    }

    /// The ids of a text. Faults with Code::Corrupt where the vocabulary has no token for a part of it.
    pub fn ids(&self, text: &str) -> Result<Vec<i64>> {
        let coded = self.tokens.encode_fast(text, false);
        let coded = coded
            .map_err(|error| Fault::new(Code::Corrupt, format!("a text that {} cannot read: {error}", self.file)))?;
        let ids = coded.get_ids().iter().map(|&id| i64::from(id));
        let mut ids: Vec<i64> = match self.marks {
            Marks::Padding(_) => ids.take(self.length).collect(),
            Marks::Around([begin, end]) => {
                let inside = ids.take(self.length - 2);
                std::iter::once(begin).chain(inside).chain([end]).collect()
            }
        };
        ids.resize(self.length, self.padding());
        Ok(ids)
    }
}
