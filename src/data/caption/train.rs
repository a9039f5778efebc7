//! A small vocabulary out of captions, where none is at hand.

use super::vocabulary::word_piece;
use crate::fault::{Fault, Result};
use serde_json::Map;
use std::collections::{BTreeMap, BTreeSet};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::wordpiece::WordPieceTrainer;
use tokenizers::tokenizer::{NormalizedString, Normalizer, OffsetReferential, OffsetType};
use tokenizers::tokenizer::{PreTokenizedString, PreTokenizer};
use tokenizers::{AddedToken, Tokenizer};

/// A WordPiece vocabulary of at most `size` tokens as a `tokenizer.json`. The same captions give the same file, in
/// whatever order they come.
///
/// # Errors
/// Code::Usage where there is no caption, or no room for the letters in them.
pub fn train<'a>(captions: impl Iterator<Item = &'a str> + Clone + Send, size: usize) -> Result<String> {
    learned(captions, size).map_err(|why| Fault::usage(format!("a vocabulary of {size} tokens: {why}")))
}

fn learned<'a>(captions: impl Iterator<Item = &'a str> + Clone + Send, size: usize) -> Result<String, String> {
    if captions.clone().next().is_none() {
        return Err("there is no caption to learn it from; give a list with the column caption".into());
    }
    let blank = word_piece(Map::from_iter([("[PAD]".into(), 0.into()), ("[UNK]".into(), 1.into())]));
    let mut tokenizer = Tokenizer::from_bytes(blank.to_string()).map_err(|error| error.to_string())?;
    // The trainer numbers letters inside of words as they turn up in a hash map, and decides between equals by number:
    // numbered here, they make it decide the same every time.
    let mut inside = BTreeSet::new();
    for caption in captions.clone() {
        letters(&tokenizer, caption, &mut inside).map_err(|error| error.to_string())?;
    }
    let first = ["[PAD]", "[UNK]"].map(str::to_owned).into_iter().chain(inside.iter().map(|c| format!("##{c}")));
    let first: Vec<AddedToken> = first.map(|token| AddedToken::from(token, true)).collect();
    let trainer = WordPieceTrainer::builder().vocab_size(size).special_tokens(first).show_progress(false).build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), captions).map_err(|error| error.to_string())?;
    let tokens: BTreeMap<u32, String> = tokenizer.get_vocab(false).into_iter().map(|(token, id)| (id, token)).collect();
    if tokens.len() > size {
        return Err(format!("the letters of the captions alone are {}; ask for more", tokens.len()));
    }
    let described = word_piece(tokens.into_iter().map(|(id, token)| (token, id.into())).collect());
    Ok(serde_json::to_string_pretty(&described).expect("a vocabulary is JSON"))
}

/// Adds the letters that a text has inside of its words, as the tokenizer will see them.
fn letters(tokenizer: &Tokenizer, text: &str, inside: &mut BTreeSet<char>) -> tokenizers::Result<()> {
    let mut plain = NormalizedString::from(text);
    tokenizer.get_normalizer().map_or(Ok(()), |normalizer| normalizer.normalize(&mut plain))?;
    let mut words = PreTokenizedString::from(plain);
    tokenizer.get_pre_tokenizer().map_or(Ok(()), |splitter| splitter.pre_tokenize(&mut words))?;
    for (word, ..) in words.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
        inside.extend(word.chars().skip(1));
    }
    Ok(())
}
