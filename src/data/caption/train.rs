//! Trains a small vocabulary on captions, for users who have none.

use super::vocabulary::word_piece_json;
use crate::error::{Error, Result};
use serde_json::Map;
use std::collections::{BTreeMap, BTreeSet};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::wordpiece::WordPieceTrainer;
use tokenizers::tokenizer::{NormalizedString, Normalizer, OffsetReferential, OffsetType};
use tokenizers::tokenizer::{PreTokenizedString, PreTokenizer};
use tokenizers::{AddedToken, Tokenizer};

/// Trains a WordPiece vocabulary of at most `size` tokens and returns it as a `tokenizer.json`. The result does not
/// depend on the order of the captions.
///
/// # Errors
/// ExitCode::Usage where there is no caption, or `size` is below the number of characters in them.
pub fn train<'a>(captions: impl Iterator<Item = &'a str> + Clone + Send, size: usize) -> Result<String> {
    train_word_piece(captions, size).map_err(|why| Error::usage(format!("a vocabulary of {size} tokens: {why}")))
}

fn train_word_piece<'a>(captions: impl Iterator<Item = &'a str> + Clone + Send, size: usize) -> Result<String, String> {
    if captions.clone().next().is_none() {
        return Err("there is no caption to learn it from; give a list with the column caption".into());
    }
    let special = word_piece_json(Map::from_iter([("[PAD]".into(), 0.into()), ("[UNK]".into(), 1.into())]));
    let mut tokenizer = Tokenizer::from_bytes(special.to_string()).map_err(|error| error.to_string())?;
    // The trainer numbers the characters inside words in the order of a hash map and breaks ties by number. Numbering
    // them here makes the result deterministic.
    let mut inner = BTreeSet::new();
    for caption in captions.clone() {
        collect_inner_characters(&tokenizer, caption, &mut inner).map_err(|error| error.to_string())?;
    }
    let first = ["[PAD]", "[UNK]"].map(str::to_owned).into_iter().chain(inner.iter().map(|c| format!("##{c}")));
    let first: Vec<AddedToken> = first.map(|token| AddedToken::from(token, true)).collect();
    let trainer = WordPieceTrainer::builder().vocab_size(size).special_tokens(first).show_progress(false).build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), captions).map_err(|error| error.to_string())?;
    let tokens: BTreeMap<u32, String> = tokenizer.get_vocab(false).into_iter().map(|(token, id)| (id, token)).collect();
    if tokens.len() > size {
        return Err(format!("the characters of the captions alone are {}; ask for more", tokens.len()));
    }
    let vocabulary = word_piece_json(tokens.into_iter().map(|(id, token)| (token, id.into())).collect());
    Ok(serde_json::to_string_pretty(&vocabulary).expect("a vocabulary is JSON"))
}

/// Adds the characters inside a text's words (all but the first of each), after normalization.
fn collect_inner_characters(tokenizer: &Tokenizer, text: &str, inner: &mut BTreeSet<char>) -> tokenizers::Result<()> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizer.normalize(&mut normalized)?;
    }
    let mut words = PreTokenizedString::from(normalized);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words)?;
    }
    for (word, ..) in words.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
        inner.extend(word.chars().skip(1));
    }
    Ok(())
}
