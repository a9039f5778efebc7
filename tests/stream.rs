//! Samples from a store: the same as from a disk, whatever the way to it does.

use crate::server::Server;
use crate::shard::{packed, pictures, text};
use crate::support::Outcome;
use libtest_mimic::Failed;
use occlude::data::cache::Cache;
use occlude::data::decode::Limits;
use occlude::data::medium::{Medium, Sample};
use occlude::data::mix::{self, Mix};
use occlude::data::order::Order;
use occlude::data::store::Store;
use occlude::fault::{Code, Fault};
use occlude::feed::{Feed, Rows, Source};
use occlude::grid::Grid;
use occlude::part::view::View;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

crate::trials![
    a_store_gives_what_the_disk_gives,
    a_slow_store_is_asked_for_many_samples_at_a_time,
    the_first_step_is_fetched_first,
    what_is_kept_is_not_fetched_again,
    a_cache_keeps_to_its_limit,
    an_outage_is_ridden_out,
    a_store_that_stays_away_ends_the_feed,
    a_stalled_read_is_noticed,
    a_slow_link_is_no_fault,
    damaged_bytes_are_fetched_again,
    a_damaged_index_is_fetched_again,
    bytes_that_stay_damaged_are_a_bad_sample,
    a_lost_answer_to_a_write_is_settled,
    large_objects_travel_in_parts,
    a_mixture_keeps_its_weights,
    what_was_fetched_keeps_to_its_bytes,
    a_tar_without_an_index_is_scanned_once,
];

const PATIENCE: Duration = Duration::from_secs(120);

/// 60 pictures in shards of 16, on a disk and in a store.
struct Both {
    _folder: tempfile::TempDir,
    disk: String,
    server: Server,
}

impl Both {
    fn new() -> Result<Both, Failed> {
        let folder = tempfile::tempdir()?;
        pictures(&folder.path().join("in"), 2, 30)?;
        let out = folder.path().join("small");
        packed(&folder.path().join("in"), &out, 16)?;
        let server = Server::start();
        server.upload(&out, "b/small")?;
        Ok(Both { disk: out.to_str().expect("UTF-8").to_owned(), _folder: folder, server })
    }

    fn url(&self) -> String {
        self.server.http("b/small")
    }
}

fn open(url: &str, patience: Duration) -> Result<Arc<Mix>, Fault> {
    let sources = [mix::Source { url: url.to_owned(), weight: 1.0 }];
    Mix::open(&sources, patience).map(Arc::new)
}

fn source(set: Arc<Mix>) -> Source {
    let grid = Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 4 };
    let view = View::default();
    Source {
        set,
        cache: None,
        captions: None,
        medium: Medium::Picture,
        view: Arc::new(move |picture, id, epoch, _, out| view.train(&grid, picture, 11, id, epoch, 0, out)),
        shape: grid.pixels(),
        stills: Vec::new(),
        limits: Limits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_bad_share: 0.001,
    }
}

fn rows(source: Source, steps: u64) -> Result<Vec<Rows>, Fault> {
    let order = Order::mixed(&source.set.sizes(), 11, 2);
    let feed = Feed::train(source, order, 10, 0, 1, 0..steps)?;
    feed.map(|rows| rows.map(|rows| Rows { waited: Duration::ZERO, ..rows })).collect()
}

fn a_store_gives_what_the_disk_gives() -> Outcome {
    let both = Both::new()?;
    let disk = rows(source(open(&both.disk, PATIENCE)?), 15)?;
    let store = rows(source(open(&both.url(), PATIENCE)?), 15)?;
    assert!(disk == store, "the store's samples are others");
    assert_eq!(open(&both.disk, PATIENCE)?.digest(), open(&both.url(), PATIENCE)?.digest());
    Ok(())
}

fn a_slow_store_is_asked_for_many_samples_at_a_time() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), PATIENCE)?;
    rows(source(set.clone()), 1)?; // The indices are here.
    both.server.faults(|faults| (faults.latency, faults.fail_every) = (Duration::from_millis(100), 100));
    let (began, before) = (Instant::now(), both.server.requests());
    assert_eq!(rows(source(set), 30)?.len(), 30);
    let (seconds, requests) = (began.elapsed().as_secs_f64(), both.server.requests() - before);
    assert!(requests < 300, "300 samples in {requests} requests: neighbours were not joined");
    assert!(seconds < 0.1 * requests as f64 / 4.0, "{requests} requests of 100 ms took {seconds} s");
    assert!(both.server.most_under_way() >= 4 && both.server.connections() >= 4, "one connection caps throughput");
    Ok(())
}

fn the_first_step_is_fetched_first() -> Outcome {
    let both = Both::new()?;
    both.server.faults(|faults| faults.latency = Duration::from_millis(100));
    let source = Source { prefetch_bytes: 64 << 20, ..source(open(&both.url(), PATIENCE)?) };
    let order = Order::mixed(&source.set.sizes(), 11, 2);
    let shards = source.set.sets()[0].shards().len() as u64;
    let before = both.server.requests();
    let mut feed = Feed::train(source, order, 10, 0, 1, 0..2000)?;
    feed.next().expect("a step")?;
    let requests = both.server.requests() - before;
    // The indices, the first step, and what was asked for meanwhile: 64 at a time, twice if need be.
    assert!(requests <= 2 * shards + 128, "{requests} requests came before the first step was there");
    // Far more is wanted in all.
    for _ in 0..200 {
        feed.next().expect("a step")?;
    }
    assert!(both.server.requests() - before > 300, "{} requests", both.server.requests() - before);
    Ok(())
}

fn what_is_kept_is_not_fetched_again() -> Outcome {
    let both = Both::new()?;
    let folder = tempfile::tempdir()?;
    let cached = || -> Result<Vec<Rows>, Fault> {
        let cache = Some(Arc::new(Cache::open(folder.path(), 1 << 30)?));
        rows(Source { cache, ..source(open(&both.url(), PATIENCE)?) }, 18)
    };
    let first = cached()?;
    let before = both.server.requests();
    let second = cached()?;
    assert!(first == second && first == rows(source(open(&both.disk, PATIENCE)?), 18)?);
    // What opening asks for: manifest, sizes, headers and indices of four shards.
    assert!(both.server.requests() - before <= 1 + 4 * 4, "{} requests", both.server.requests() - before);
    // A piece that was damaged on the disk is fetched again.
    let mut pieces = Vec::new();
    for entry in std::fs::read_dir(folder.path())?.filter_map(|entry| entry.ok()).filter(|e| e.path().is_dir()) {
        pieces.extend(std::fs::read_dir(entry.path())?.map(|piece| piece.expect("a piece").path()));
    }
    assert_eq!(pieces.len(), 4, "a piece for each small shard");
    let mut bytes = std::fs::read(&pieces[0])?;
    let length = bytes.len();
    bytes[600..length - 1100].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&pieces[0], bytes)?;
    assert!(cached()? == first, "damaged pieces were used");
    Ok(())
}

fn a_cache_keeps_to_its_limit() -> Outcome {
    let both = Both::new()?;
    let folder = tempfile::tempdir()?;
    let size = std::fs::metadata(Path::new(&both.disk).join("small-000000.tar"))?.len();
    let limit = 2 * size + size / 2;
    let cache = Some(Arc::new(Cache::open(folder.path(), limit)?));
    let got = rows(Source { cache, ..source(open(&both.url(), PATIENCE)?) }, 18)?;
    assert!(got == rows(source(open(&both.disk, PATIENCE)?), 18)?);
    let kept = || -> std::io::Result<u64> {
        let mut total = 0;
        for entry in std::fs::read_dir(folder.path())?.filter_map(|entry| entry.ok()).filter(|e| e.path().is_dir()) {
            for piece in std::fs::read_dir(entry.path())? {
                total += piece.and_then(|piece| piece.metadata()).map_or(0, |meta| meta.len());
            }
        }
        Ok(total)
    };
    // What was under way when the feed was dropped may just be written.
    let began = Instant::now();
    while kept()? > limit && began.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let total = kept()?;
    assert!(total > 0 && total <= limit, "{total} bytes of {limit}");
    Ok(())
}

fn an_outage_is_ridden_out() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), PATIENCE)?;
    // Longer than object_store's own ten retries last.
    both.server.faults(|faults| faults.away_until = Some(Instant::now() + Duration::from_secs(8)));
    let began = Instant::now();
    assert!(rows(source(set), 12)? == rows(source(open(&both.disk, PATIENCE)?), 12)?);
    assert!(began.elapsed() >= Duration::from_secs(7));
    Ok(())
}

fn a_store_that_stays_away_ends_the_feed() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), Duration::from_secs(3))?;
    both.server.faults(|faults| faults.away_until = Some(Instant::now() + Duration::from_secs(3600)));
    let began = Instant::now();
    let fault = rows(source(set), 12).expect_err("the store is away");
    assert_eq!(fault.code, Code::Store, "{fault}");
    for part in ["small-00000", "503", "3 s"] {
        assert!(fault.message.contains(part), "{part} is missing: {fault}");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "took {:?}", began.elapsed());
    Ok(())
}

fn a_stalled_read_is_noticed() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), PATIENCE)?;
    rows(source(set.clone()), 1)?;
    both.server.faults(|faults| (faults.stalls, faults.silent) = (1, 1));
    let began = Instant::now();
    assert!(rows(source(set), 12)? == rows(source(open(&both.disk, PATIENCE)?), 12)?);
    let seconds = began.elapsed().as_secs_f64();
    assert!((10.0..25.0).contains(&seconds), "noticed after {seconds} s");
    Ok(())
}

fn a_slow_link_is_no_fault() -> Outcome {
    let server = Server::start();
    server.put("b/x", vec![7; 200_000]);
    server.faults(|faults| faults.rate = Some(50_000));
    // 4 s at 50 kB a second, with no patience at all: slow is not broken.
    let store = Store::open_patiently(&server.http("b"), Duration::ZERO)?;
    assert_eq!(store.get_range("x", 0..200_000)?, vec![7; 200_000]);
    Ok(())
}

fn damaged_bytes_are_fetched_again() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), PATIENCE)?;
    rows(source(set.clone()), 1)?;
    both.server.faults(|faults| (faults.flips, faults.halves) = (2, 1));
    assert!(rows(source(set), 12)? == rows(source(open(&both.disk, PATIENCE)?), 12)?);
    both.server.faults(|faults| assert_eq!((faults.flips, faults.halves), (0, 0), "nothing was damaged"));
    Ok(())
}

fn a_damaged_index_is_fetched_again() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), PATIENCE)?;
    // The first that is asked for is the index of one of its shards.
    both.server.faults(|faults| (faults.flips, faults.halves) = (2, 1));
    set.sets()[0].shard(1)?;
    both.server.faults(|faults| assert_eq!((faults.flips, faults.halves), (0, 0), "nothing was damaged"));
    both.server.faults(|faults| faults.flips = 1000);
    let fault = set.sets()[0].shard(2).expect_err("an index that stays damaged");
    assert_eq!(fault.code, Code::Corrupt, "{fault}");
    Ok(())
}

fn bytes_that_stay_damaged_are_a_bad_sample() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), PATIENCE)?;
    let key = "b/small/small-000001.tar";
    let mut tar = std::fs::read(Path::new(&both.disk).join("small-000001.tar"))?;
    let (shard, row) = set.sample(20)?;
    tar[shard.wanted(row, &["png"])?.offset as usize + 40] ^= 1;
    both.server.put(key, tar);
    let got = rows(source(set.clone()), 12)?;
    let lost = set.id(20)?;
    assert!(got.iter().all(|rows| rows.ids.len() == 10 && !rows.ids.contains(&lost)), "a damaged sample was used");
    let strict = rows(Source { max_bad_share: 0.0, ..source(set) }, 12);
    assert!(strict.is_ok(), "three always may be bad");
    Ok(())
}

fn a_lost_answer_to_a_write_is_settled() -> Outcome {
    let server = Server::start();
    let store = Store::open_patiently(&server.http("b"), Duration::from_secs(10))?;
    server.faults(|faults| faults.lost_answers = 1);
    store.put("x", b"first")?;
    assert_eq!(store.get("x")?, b"first");
    Ok(())
}

fn large_objects_travel_in_parts() -> Outcome {
    let server = Server::start();
    let bytes: Vec<u8> = (0..40_000_000u32).map(|at| ((at * 31) >> 7) as u8).collect();
    server.put("b/large", bytes.clone());
    let store = Store::open_patiently(&server.http("b"), PATIENCE)?;
    server.faults(|faults| faults.fail_every = 3);
    assert!(store.get("large")? == bytes, "the parts do not make the whole");
    assert!(server.requests() >= 4, "three parts of 16 MB and the first question");
    Ok(())
}

fn a_mixture_keeps_its_weights() -> Outcome {
    let both = Both::new()?;
    let folder = tempfile::tempdir()?;
    pictures(&folder.path().join("in"), 1, 20)?;
    let out = folder.path().join("other");
    let options = occlude::data::pack::Options { name: Some("other".into()), ..Default::default() };
    occlude::data::pack::pack(&text(&folder.path().join("in")), &text(&out), &options)?;
    let source_of = |url: &str, weight| mix::Source { url: url.to_owned(), weight };
    let sources = [source_of(&both.url(), 3.0), source_of(out.to_str().expect("UTF-8"), 1.0)];
    let set = Arc::new(Mix::open(&sources, PATIENCE)?);
    let got = rows(source(set.clone()), 400)?;
    let other: Vec<u64> = (60..80).map(|index| set.id(index)).collect::<Result<_, _>>()?;
    let mut counts: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for rows in &got {
        rows.ids.iter().zip(&rows.epochs).for_each(|(id, epoch)| counts.entry(*id).or_default().push(*epoch));
    }
    let of_other: usize = other.iter().map(|id| counts[id].len()).sum();
    // A quarter of 4,000, each block of 4,096 shared out exactly; 4,000 of them may be off by a few.
    assert!((970..=1030).contains(&of_other), "{of_other} of 4000");
    // Each source counts its own epochs: every sample once in each.
    for id in &other {
        assert_eq!(counts[id], (0..counts[id].len() as u64).collect::<Vec<_>>());
    }
    assert!(Mix::open(&[sources[0].clone(), sources[0].clone()], PATIENCE).is_err(), "two sets of one name");
    Ok(())
}

fn what_was_fetched_keeps_to_its_bytes() -> Outcome {
    let both = Both::new()?;
    let set = open(&both.url(), PATIENCE)?;
    rows(source(set.clone()), 1)?;
    // Views that take their time: what was fetched piles up in front of them, up to the limit.
    let inner = source(set.clone()).view;
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        std::thread::sleep(Duration::from_millis(3));
        inner(sample, id, epoch, repeats, out)
    });
    let narrow = Source { view, prefetch_bytes: 6000, ..source(set) };
    both.server.faults(|faults| faults.latency = Duration::from_millis(5));
    let order = Order::mixed(&narrow.set.sizes(), 11, 2);
    let mut feed = Feed::train(narrow, order, 10, 0, 1, 0..50)?;
    feed.next().expect("a step")?;
    std::thread::sleep(Duration::from_millis(500));
    let before = both.server.requests();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(both.server.requests(), before, "it fetches on though nothing is taken");
    assert_eq!(feed.filter(|rows| rows.is_ok()).count(), 49);
    Ok(())
}

fn a_tar_without_an_index_is_scanned_once() -> Outcome {
    let both = Both::new()?;
    let tar = std::fs::read(Path::new(&both.disk).join("small-000002.tar"))?;
    both.server.put("b/bare/bare-000000.tar", tar);
    let url = format!("{}/bare-{{000000..000000}}.tar", both.server.http("b/bare"));
    let first = open(&url, PATIENCE)?;
    assert_eq!(first.len(), 16);
    let before = both.server.requests();
    let second = open(&url, PATIENCE)?;
    assert_eq!(second.digest(), first.digest());
    assert!(both.server.requests() - before <= 4, "the tar was scanned again");
    assert_eq!(rows(source(second), 3)?.len(), 3);
    Ok(())
}
