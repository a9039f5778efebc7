//! Captions become ids: other people's tokenizers on the same texts, vocabularies of our own, and what is no caption.

use crate::captions::{place, run};
use crate::refuse::text;
use crate::support::{Outcome, oracle};
use libtest_mimic::Failed;
use occlude::data::caption::{LONGEST, Tokenizer, train};
use occlude::data::set::DataSet;
use occlude::fault::Code;
use occlude::rng::{Draw, Purpose};
use serde_json::{Value, json};
use std::path::Path;

crate::trials![
    clips_byte_pairs_are_open_clips,
    word_pieces_are_transformers,
    a_learned_vocabulary_is_the_same_every_time,
    a_vocabulary_is_not_learned_from_the_test_part,
    a_caption_that_is_no_text_is_refused,
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

/// What an oracle makes of [`TEXTS`].
fn theirs(which: &str, length: usize, place: &Path) -> Result<Vec<Value>, Failed> {
    let folder = tempfile::tempdir()?;
    let (request, reply) = (folder.path().join("request.json"), folder.path().join("reply.json"));
    std::fs::write(&request, json!({"texts": TEXTS, "length": length}).to_string())?;
    oracle("captions.py", &[which, &text(&request), &text(&reply), &text(place)])?;
    Ok(serde_json::from_str(&std::fs::read_to_string(reply)?)?)
}

fn agrees(tokenizer: &Tokenizer, theirs: &[Value]) -> Outcome {
    for (text, theirs) in TEXTS.iter().zip(theirs) {
        assert_eq!(json!(tokenizer.ids(text)?), *theirs, "{text:?}");
    }
    Ok(())
}

fn clips_byte_pairs_are_open_clips() -> Outcome {
    let folder = tempfile::tempdir()?;
    for length in [77, 16] {
        let theirs = theirs("clip", length, folder.path())?;
        let list = theirs.last().and_then(Value::as_str).expect("the path of the list").to_owned();
        for file in [list, text(folder.path().join("vocab.json"))] {
            let tokenizer = Tokenizer::open(&file, length)?;
            assert_eq!(tokenizer.size(), 49408);
            agrees(&tokenizer, &theirs)?;
        }
    }
    Ok(())
}

fn word_pieces_are_transformers() -> Outcome {
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
    let tokenizer = Tokenizer::open(&text(&file), 32)?;
    assert_eq!(tokenizer.size(), tokens.len());
    agrees(&tokenizer, &theirs("bert", 32, &file)?)
}

fn a_learned_vocabulary_is_the_same_every_time() -> Outcome {
    let captions: Vec<String> = (0..200).map(|i| format!("{} number {}", TEXTS[i % 5], i * 37)).collect();
    let learned = |order: &[String]| train(order.iter().map(String::as_str), 150);
    let first = learned(&captions)?;
    let back: Vec<String> = captions.iter().rev().cloned().collect();
    for again in [learned(&captions)?, learned(&back)?] {
        assert!(again == first, "the same captions gave another vocabulary");
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("tokenizer.json");
    std::fs::write(&file, &first)?;
    let tokenizer = Tokenizer::open(&text(&file), 24)?;
    assert!((100..=150).contains(&tokenizer.size()), "{}", tokenizer.size());
    let ids = tokenizer.ids("a photo of a cat")?;
    assert!(ids.iter().all(|id| *id != 1) && ids[..3].iter().all(|id| *id > 1) && ids[23] == 0, "{ids:?}");
    for (captions, words) in [(Vec::new(), "no caption"), (captions, "letters")] {
        let fault = train(captions.iter().map(String::as_str), 8).expect_err("no vocabulary");
        assert!(fault.code == Code::Usage && fault.message.contains(words), "{fault}");
    }
    Ok(())
}

fn a_vocabulary_is_not_learned_from_the_test_part() -> Outcome {
    let mut draw = Draw::new(2, 3, 0, Purpose::Order, 0);
    let mut word = || (0..7).map(|_| (b'a' + draw.below(26) as u8) as char).collect::<String>();
    let list: String =
        (0..40).map(|i| json!({"path": format!("{i}.png"), "caption": word()}).to_string() + "\n").collect();
    let (source, out) = (text(place().join("words.jsonl")), place().join("words"));
    std::fs::write(&source, list)?;
    let tokenizer = text(out.join("tokenizer.json"));
    let learns = ["--train-tokenizer", "1000", "--tokenizer-out", &tokenizer];
    run(&[&["pack", &source, &text(&out), "--test-share", "0.3"][..], &learns].concat())?;
    let tokenizer = Tokenizer::open(&tokenizer, 8)?;
    for (part, whole) in [("train", true), ("test", false)] {
        let set = DataSet::open(&text(out.join(part)))?;
        for index in 0..set.len() {
            let (shard, row) = set.sample(index)?;
            let ids = tokenizer.caption(&shard.read(row, &["txt"])?)?;
            assert_eq!(ids[1] == 0, whole, "a word of the {part} part in tokens: {ids:?}");
        }
    }
    Ok(())
}

fn a_caption_that_is_no_text_is_refused() -> Outcome {
    let tokenizer = Tokenizer::open(&text(place().join("tokenizer.json")), 8)?;
    let long = vec![b'a'; LONGEST + 1];
    for (bytes, words) in [(&b"\xff\xfe"[..], "not UTF-8"), (&long, "the limit is")] {
        let fault = tokenizer.caption(bytes).expect_err("no caption");
        assert!(fault.code == Code::Corrupt && fault.message.contains(words), "{fault}");
    }
    assert_eq!(tokenizer.caption(&long[1..])?.len(), 8);
    for (name, content) in [("no.json", "{"), ("no.txt", "one\ntwo"), ("vocab.json", "{\"a\": 1}"), ("list.gz", "gzip")]
    {
        let file = place().join(name);
        std::fs::write(&file, content)?;
        let fault = Tokenizer::open(&text(&file), 8).err().expect("no vocabulary");
        assert!(fault.code == Code::Usage && fault.message.contains(name), "{fault}");
    }
    Ok(())
}
