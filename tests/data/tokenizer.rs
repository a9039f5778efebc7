//! Tests of tokenizers: against open_clip and transformers on the same texts, trained vocabularies, invalid captions.

use crate::method::captioned_images::{run_program, shared_folder};
use crate::support::{Outcome, oracle, path_text};
use libtest_mimic::Failed;
use occlude::data::caption::{MAX_CAPTION_BYTES, Tokenizer, train};
use occlude::data::set::DataSet;
use occlude::error::ExitCode;
use occlude::rng::{Philox, Purpose};
use serde_json::{Value, json};
use std::path::Path;

crate::trials![
    byte_pair_encoding_matches_open_clip,
    word_piece_encoding_matches_transformers,
    training_a_tokenizer_is_deterministic,
    tokenizer_training_does_not_use_the_test_split,
    a_caption_that_is_not_text_is_rejected,
];

const TEXTS: [&str; 12] = [
    "a photo of a cat",
    "",
    "Two dogs, one cat; it's 3 o'clock — they'll run!",
    "  white   space\tand\nlines ",
    "A VERY LOUD CAPTION WITH 1234567890 NUMBERS",
    "naïve café, Übergröße, smørrebrød",
    "日本語の説明 and some English",
    "emoji 🐈‍⬛ and symbols €$%&*()_+=@#",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "we've I'm you'd can't 's 'S 'RE",
    "x",
    "a caption that goes on and on and on, for much longer than any model of this test would ever wish to read, so that \
     it has to be cut somewhere, and the end mark has to come at the very end of what is left of it, wherever that is",
];

/// Returns the ids of [`TEXTS`] from an oracle.
fn reference_ids(which: &str, length: usize, path: &Path) -> Result<Vec<Value>, Failed> {
    let folder = tempfile::tempdir()?;
    let request = folder.path().join("request.json");
    let reply = folder.path().join("reply.json");
    std::fs::write(&request, json!({"texts": TEXTS, "length": length}).to_string())?;
    oracle("captions.py", &[which, &path_text(&request), &path_text(&reply), &path_text(path)])?;
    Ok(serde_json::from_str(&std::fs::read_to_string(reply)?)?)
}

fn assert_matches(tokenizer: &Tokenizer, reference: &[Value]) -> Outcome {
    for (text, reference) in TEXTS.iter().zip(reference) {
        assert_eq!(json!(tokenizer.encode(text)?), *reference, "{text:?}");
    }
    Ok(())
}

fn byte_pair_encoding_matches_open_clip() -> Outcome {
    let folder = tempfile::tempdir()?;
    for length in [77, 16] {
        let reference = reference_ids("clip", length, folder.path())?;
        let list = reference.last().and_then(Value::as_str).expect("the path of the list").to_owned();
        for file in [list, path_text(folder.path().join("vocab.json"))] {
            let tokenizer = Tokenizer::open(&file, length)?;
            assert_eq!(tokenizer.vocab_size(), 49408);
            assert_matches(&tokenizer, &reference)?;
        }
    }
    Ok(())
}

fn word_piece_encoding_matches_transformers() -> Outcome {
    let folder = tempfile::tempdir()?;
    // Letters and some words, so that both whole words and pieces occur.
    let mut tokens: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned).to_vec();
    for letter in ('a'..='z').chain('0'..='9') {
        tokens.extend([letter.to_string(), format!("##{letter}")]);
    }
    tokens
        .extend(["cat", "photo", "of", "cap", "##tion", ",", "'", "!", "日", "very", "nai", "##ve"].map(str::to_owned));
    let file = folder.path().join("vocab.txt");
    std::fs::write(&file, tokens.join("\n") + "\n")?;
    let tokenizer = Tokenizer::open(&path_text(&file), 32)?;
    assert_eq!(tokenizer.vocab_size(), tokens.len());
    assert_matches(&tokenizer, &reference_ids("bert", 32, &file)?)
}

fn training_a_tokenizer_is_deterministic() -> Outcome {
    let captions: Vec<String> = (0..200).map(|i| format!("{} number {}", TEXTS[i % 5], i * 37)).collect();
    let learned = |order: &[String]| train(order.iter().map(String::as_str), 150);
    let first = learned(&captions)?;
    let back: Vec<String> = captions.iter().rev().cloned().collect();
    for second in [learned(&captions)?, learned(&back)?] {
        assert!(second == first, "the same captions gave a different vocabulary");
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("tokenizer.json");
    std::fs::write(&file, &first)?;
    let tokenizer = Tokenizer::open(&path_text(&file), 24)?;
    assert!((100..=150).contains(&tokenizer.vocab_size()), "{}", tokenizer.vocab_size());
    let ids = tokenizer.encode("a photo of a cat")?;
    assert!(ids.iter().all(|id| *id != 1) && ids[..3].iter().all(|id| *id > 1) && ids[23] == 0, "{ids:?}");
    for (captions, words) in [(Vec::new(), "no caption"), (captions, "characters")] {
        let error = train(captions.iter().map(String::as_str), 8).expect_err("no vocabulary");
        assert!(error.code == ExitCode::Usage && error.message.contains(words), "{error}");
    }
    Ok(())
}

fn tokenizer_training_does_not_use_the_test_split() -> Outcome {
    let mut draw = Philox::new(2, 3, 0, Purpose::Order, 0);
    let mut word = || (0..7).map(|_| (b'a' + draw.uniform_int(26) as u8) as char).collect::<String>();
    let list: String =
        (0..40).map(|i| json!({"path": format!("{i}.png"), "caption": word()}).to_string() + "\n").collect();
    let source = path_text(shared_folder().join("words.jsonl"));
    let out = shared_folder().join("words");
    std::fs::write(&source, list)?;
    let tokenizer = path_text(out.join("tokenizer.json"));
    let learns = ["--train-tokenizer", "1000", "--tokenizer-out", &tokenizer];
    run_program(&[&["pack", &source, &path_text(&out), "--test-fraction", "0.3"][..], &learns].concat())?;
    let tokenizer = Tokenizer::open(&tokenizer, 8)?;
    for (part, full) in [("train", true), ("test", false)] {
        let set = DataSet::open(&path_text(out.join(part)))?;
        for index in 0..set.len() {
            let (shard, row) = set.find_sample(index)?;
            let ids = tokenizer.encode_caption(&shard.read(row, &["txt"])?)?;
            assert_eq!(ids[1] == 0, full, "a word of the {part} part in tokens: {ids:?}");
        }
    }
    Ok(())
}

fn a_caption_that_is_not_text_is_rejected() -> Outcome {
    let tokenizer = Tokenizer::open(&path_text(shared_folder().join("tokenizer.json")), 8)?;
    let long = vec![b'a'; MAX_CAPTION_BYTES + 1];
    for (bytes, words) in [(&b"\xff\xfe"[..], "not UTF-8"), (&long, "the limit is")] {
        let error = tokenizer.encode_caption(bytes).expect_err("not a caption");
        assert!(error.code == ExitCode::Corrupt && error.message.contains(words), "{error}");
    }
    assert_eq!(tokenizer.encode_caption(&long[1..])?.len(), 8);
    for (name, content) in [("no.json", "{"), ("no.txt", "one\ntwo"), ("vocab.json", "{\"a\": 1}"), ("list.gz", "gzip")]
    {
        let file = shared_folder().join(name);
        std::fs::write(&file, content)?;
        let error = Tokenizer::open(&path_text(&file), 8).err().expect("no vocabulary");
        assert!(error.code == ExitCode::Usage && error.message.contains(name), "{error}");
    }
    Ok(())
}
