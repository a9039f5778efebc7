//! Tokenizes captions to a fixed length: longer captions are truncated, shorter ones padded.
//!
//! Reads local vocabularies only: a `tokenizer.json` (Hugging Face), BERT's `vocab.txt` (WordPiece, uncased), CLIP's
//! `vocab.json` with `merges.txt` next to it, and CLIP's `bpe_simple_vocab_16e6.txt.gz`. With WordPiece a caption is
//! its tokens followed by padding, without start and end tokens (as in FLIP's code); with CLIP's byte pairs it is the
//! start token, its tokens, the end token, which is never truncated, and zeros (as in open_clip). Text is used as it
//! is: open_clip also repairs wrongly decoded characters and HTML entities, which is better done once, before packing.

mod vocabulary; // files → a tokenizer
mod train; // captions → a vocabulary

pub use train::train;

use super::index::MemberRef;
use super::shard::Shard;
use crate::error::{Error, ExitCode, Result};
use std::path::Path;

/// Maximum length of a caption, in bytes.
pub const MAX_CAPTION_BYTES: usize = 64 << 10;

/// Returns the `.txt` member of a sample.
///
/// # Errors
/// ExitCode::Corrupt where there is none, or it is too long.
pub fn caption_member(shard: &Shard, row: usize) -> Result<MemberRef<'_>> {
    let member = shard.require_member(row, &["txt"])?;
    if u64::from(member.length) > MAX_CAPTION_BYTES as u64 {
        let message = format!(
            "{}: {} has {} bytes, a caption at most {MAX_CAPTION_BYTES}",
            shard.name(),
            member.name,
            member.length
        );
        return Err(Error::new(ExitCode::Corrupt, message));
    }
    Ok(member)
}

/// A tokenizer of captions; threads share one.
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    special: SpecialTokens,
    context_length: usize,
    file: String,
    /// Digest of the vocabulary's files.
    digest: String,
}

/// The ids that surround a caption's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SpecialTokens {
    /// Padding behind the tokens.
    Padding(i64),
    /// Start and end token; zeros behind.
    StartEnd { start: i64, end: i64 },
}

impl Tokenizer {
    /// Reads a vocabulary, for captions of `context_length` tokens.
    ///
    /// # Errors
    /// ExitCode::Usage for a file that is not a vocabulary.
    pub fn open(file: &str, context_length: usize) -> Result<Tokenizer> {
        let usage = |why: String| Error::usage(format!("{file}: {why}"));
        let (tokenizer, digest) = vocabulary::read(Path::new(file)).map_err(usage)?;
        let id = |names: &[&str]| names.iter().find_map(|name| tokenizer.token_to_id(name)).map(i64::from);
        let start = id(&["<|startoftext|>", "<start_of_text>"]);
        let end = id(&["<|endoftext|>", "<end_of_text>"]);
        let special = if let (Some(start), Some(end)) = (start, end) {
            if context_length < 2 {
                return Err(usage(format!("{context_length} tokens leave no room for the start and end token")));
            }
            SpecialTokens::StartEnd { start, end }
        } else if let Some(padding) = id(&["[PAD]", "<pad>"]) {
            SpecialTokens::Padding(padding)
        } else {
            let remedy = "give a WordPiece vocabulary such as BERT's, or CLIP's byte pairs";
            return Err(usage(format!("it has neither [PAD] nor start and end tokens; {remedy}")));
        };
        Ok(Tokenizer { tokenizer, special, context_length, file: file.to_owned(), digest })
    }

    /// Returns the size of the vocabulary: every id is below it. A file may number its tokens with gaps.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab(true).values().max().map_or(0, |&last| last as usize + 1)
    }

    /// Returns the number of tokens of each caption.
    pub fn context_length(&self) -> usize {
        self.context_length
    }

    /// Returns the id that fills up shorter captions.
    pub fn padding_id(&self) -> i64 {
        match self.special {
            SpecialTokens::Padding(padding) => padding,
            SpecialTokens::StartEnd { .. } => 0,
        }
    }

    /// Returns the digest of the vocabulary's files.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Returns the ids of a `.txt` member.
    ///
    /// # Errors
    /// ExitCode::Corrupt where it is not UTF-8, or too long.
    pub fn encode_caption(&self, bytes: &[u8]) -> Result<Vec<i64>> {
        let corrupt = |why: String| Error::new(ExitCode::Corrupt, format!("its caption {why}"));
        if bytes.len() > MAX_CAPTION_BYTES {
            return Err(corrupt(format!("has {} bytes, the limit is {MAX_CAPTION_BYTES}", bytes.len())));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| corrupt(format!("is not UTF-8: {error}")))?;
        self.encode(text)
    }

    /// Returns the ids of a text.
    ///
    /// # Errors
    /// ExitCode::Corrupt where the vocabulary has no token for a part of it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| {
            Error::new(ExitCode::Corrupt, format!("a text that {} cannot encode: {error}", self.file))
        })?;
        let ids = encoding.get_ids().iter().map(|&id| i64::from(id));
        let mut ids: Vec<i64> = match self.special {
            SpecialTokens::Padding(_) => ids.take(self.context_length).collect(),
            SpecialTokens::StartEnd { start, end } => {
                let ids = ids.take(self.context_length - 2);
                std::iter::once(start).chain(ids).chain([end]).collect()
            }
        };
        ids.resize(self.context_length, self.padding_id());
        Ok(ids)
    }
}
