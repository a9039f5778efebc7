//! A vocabulary's files become a tokenizer. Each form is written out as the `tokenizer.json` that it stands for, so that
//! one reader reads all.

use serde_json::{Map, Value, json};
use std::io::Read;
use std::path::Path;
use tokenizers::Tokenizer;

/// The most bytes of a vocabulary, unpacked.
const MOST: u64 = 256 << 20;

/// The tokenizer of a file, and its digest; or why there is none.
pub fn read(path: &Path) -> Result<(Tokenizer, String), String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let bytes = bytes(path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes);
    let described = match name.as_str() {
        _ if name.ends_with(".gz") => clip_list(&text(bytes)?)?,
        _ if name.ends_with(".txt") => word_pieces(&text(bytes)?)?,
        _ => {
            let value: Value = serde_json::from_slice(&bytes).map_err(|error| format!("not JSON: {error}"))?;
            // A vocabulary may have the word: then it is a number.
            match value.get("model").is_some_and(Value::is_object) {
                true => value,
                false => {
                    let beside = path.with_file_name("merges.txt");
                    let merges = self::bytes(&beside)
                        .map_err(|why| format!("a vocab.json wants {}: {why}", beside.display()))?;
                    hasher.update(&merges);
                    clip(value, &text(merges)?)
                }
            }
        }
    };
    let mut tokenizer =
        Tokenizer::from_bytes(described.to_string()).map_err(|error| format!("no tokenizer: {error}"))?;
    // Length is ours to see to.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    Ok((tokenizer, hasher.finalize().to_hex()[..16].to_string()))
}

/// A file's bytes, unpacked where they are gzip.
fn bytes(path: &Path) -> Result<Vec<u8>, String> {
    let file = std::fs::File::open(path).map_err(|error| format!("{error}; give a local vocabulary file"))?;
    let packed = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gz"));
    let reader: Box<dyn Read> = if packed { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) };
    let mut bytes = Vec::new();
    reader.take(MOST + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    match bytes.len() as u64 > MOST {
        true => Err(format!("longer than {MOST} bytes, which no vocabulary is")),
        false => Ok(bytes),
    }
}

fn text(bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|error| format!("not UTF-8: {error}"))
}

/// BERT's uncased WordPiece (Devlin et al., 2019) of `vocabulary`, token → id.
pub fn word_piece(vocabulary: Map<String, Value>) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null, "decoder": null,
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary
        },
    })
}

/// `vocab.txt`: a token a line, numbered from 0.
fn word_pieces(list: &str) -> Result<Value, String> {
    let vocabulary: Map<String, Value> =
        list.lines().enumerate().map(|(id, token)| (token.trim_end().to_owned(), json!(id))).collect();
    match ["[PAD]", "[UNK]"].iter().find(|token| !vocabulary.contains_key(**token)) {
        Some(token) => Err(format!("it has no {token}: not a WordPiece vocabulary")),
        None => Ok(word_piece(vocabulary)),
    }
}

/// CLIP's byte pairs (Radford et al., 2021): lower case, white space as one blank, words by the official pattern.
fn clip(vocabulary: Value, merges: &str) -> Value {
    let merges: Vec<&str> = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()).collect();
    let unknown = ["<|endoftext|>", "<end_of_text>"].into_iter().find(|name| vocabulary.get(*name).is_some());
    let words = "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+";
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}, {"type": "Lowercase"}
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
        ]},
        "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "vocab": vocabulary, "merges": merges
        },
    })
}

/// `bpe_simple_vocab_16e6.txt`: the merges that CLIP takes of it, and the vocabulary that follows from them: every byte,
/// every byte that ends a word, every merge, the two marks (official `simple_tokenizer.py`).
fn clip_list(list: &str) -> Result<Value, String> {
    const TOKENS: usize = 49408;
    const MERGES: usize = TOKENS - 2 * 256 - 2;
    let merges: Vec<&str> = list.lines().skip(1).take(MERGES).collect();
    if merges.len() < MERGES {
        return Err(format!("{} merges; CLIP's list has {MERGES} and more", merges.len()));
    }
    let letters = letters();
    let ends = letters.iter().map(|letter| format!("{letter}</w>"));
    let joined = merges.iter().map(|merge| merge.split(' ').collect::<String>());
    let marks = ["<start_of_text>", "<end_of_text>"].map(str::to_owned);
    let tokens = letters.iter().map(char::to_string).chain(ends).chain(joined).chain(marks);
    let vocabulary: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    Ok(clip(Value::Object(vocabulary), &merges.join("\n")))
}

/// The letter that stands for each byte, in the official order: bytes that print stand for themselves, the others, which
/// come last, for letters from 256 on.
fn letters() -> Vec<char> {
    let prints = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others = (0..256).filter(|byte| !prints(byte)).zip(256..).map(|(_, letter)| letter);
    (0..256).filter(prints).chain(others).map(|letter| char::from_u32(letter).expect("a letter")).collect()
}
