//! Reads the files of a vocabulary. Every format is converted to the equivalent `tokenizer.json`, which one reader
//! reads.

use serde_json::{Map, Value, json};
use std::io::Read;
use std::path::Path;
use tokenizers::Tokenizer;

/// Maximum bytes of a vocabulary, uncompressed.
const MAX_BYTES: u64 = 256 << 20;

/// Reads a vocabulary and returns its tokenizer and its digest, or the reason why it cannot be read.
pub fn read(path: &Path) -> Result<(Tokenizer, String), String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let bytes = read_bytes(path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes);
    let definition = if name.ends_with(".gz") {
        clip_merges_json(&decode_utf8(bytes)?)?
    } else if name.ends_with(".txt") {
        word_list_json(&decode_utf8(bytes)?)?
    } else {
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| format!("not JSON: {error}"))?;
        // In a `vocab.json`, "model" may be a token: then its value is a number.
        if value.get("model").is_some_and(Value::is_object) {
            value
        } else {
            let sidecar = path.with_file_name("merges.txt");
            let merges =
                read_bytes(&sidecar).map_err(|why| format!("a vocab.json needs {}: {why}", sidecar.display()))?;
            hasher.update(&merges);
            clip_json(value, &decode_utf8(merges)?)
        }
    };
    let mut tokenizer =
        Tokenizer::from_bytes(definition.to_string()).map_err(|error| format!("no tokenizer: {error}"))?;
    // `super::Tokenizer` pads and truncates.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    Ok((tokenizer, hasher.finalize().to_hex()[..16].to_string()))
}

/// Reads a file; a `.gz` is uncompressed.
fn read_bytes(path: &Path) -> Result<Vec<u8>, String> {
    let file = std::fs::File::open(path).map_err(|error| format!("{error}; give a local vocabulary file"))?;
    let compressed = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gz"));
    let reader: Box<dyn Read> = if compressed { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) };
    let mut bytes = Vec::new();
    reader.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("longer than {MAX_BYTES} bytes, which no vocabulary is"));
    }
    Ok(bytes)
}

fn decode_utf8(bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|error| format!("not UTF-8: {error}"))
}

/// Returns the `tokenizer.json` of BERT's uncased WordPiece (Devlin et al., 2019) with this vocabulary, token → id.
pub fn word_piece_json(vocabulary: Map<String, Value>) -> Value {
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

/// Converts a `vocab.txt`: one token per line, numbered from 0.
fn word_list_json(list: &str) -> Result<Value, String> {
    let vocabulary: Map<String, Value> =
        list.lines().enumerate().map(|(id, token)| (token.trim_end().to_owned(), json!(id))).collect();
    match ["[PAD]", "[UNK]"].iter().find(|token| !vocabulary.contains_key(**token)) {
        Some(token) => Err(format!("it has no {token}: not a WordPiece vocabulary")),
        None => Ok(word_piece_json(vocabulary)),
    }
}

/// Converts CLIP's byte-pair encoding (Radford et al., 2021): lower case, white space collapsed, words by the official
/// pattern.
fn clip_json(vocabulary: Value, merges: &str) -> Value {
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

/// Converts `bpe_simple_vocab_16e6.txt`: the merges that CLIP uses, and the vocabulary derived from them: every byte,
/// every byte at the end of a word, every merge, the start and end token (official `simple_tokenizer.py`).
fn clip_merges_json(list: &str) -> Result<Value, String> {
    const TOKENS: usize = 49408;
    const MERGES: usize = TOKENS - 2 * 256 - 2;
    let merges: Vec<&str> = list.lines().skip(1).take(MERGES).collect();
    if merges.len() < MERGES {
        return Err(format!("{} merges; CLIP's list has at least {MERGES}", merges.len()));
    }
    let characters = byte_characters();
    let ends = characters.iter().map(|character| format!("{character}</w>"));
    let merged = merges.iter().map(|merge| merge.split(' ').collect::<String>());
    let special = ["<start_of_text>", "<end_of_text>"].map(str::to_owned);
    let tokens = characters.iter().map(char::to_string).chain(ends).chain(merged).chain(special);
    let vocabulary: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    Ok(clip_json(Value::Object(vocabulary), &merges.join("\n")))
}

/// Returns the character that represents each byte, in the official order: printable bytes represent themselves; the
/// others, which come last, are represented by the characters from 256 on.
fn byte_characters() -> Vec<char> {
    let is_printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others = (0..256).filter(|byte| !is_printable(byte)).zip(256..).map(|(_, character)| character);
    let codes = (0..256).filter(is_printable).chain(others);
    codes.map(|code| char::from_u32(code).expect("a valid code point")).collect()
}
