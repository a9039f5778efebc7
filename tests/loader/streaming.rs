//! Tests of samples from a store: the same as from a disk, despite latency and failures.

use crate::data::shard::{pack_images, write_images};
use crate::support::object_store::Server;
use crate::support::{Outcome, path_text};
use libtest_mimic::Failed;
use occlude::data::cache::Cache;
use occlude::data::decode::ImageLimits;
use occlude::data::mixture;
use occlude::data::mixture::Mixture;
use occlude::data::modality::{Modality, Sample};
use occlude::data::order::SampleOrder;
use occlude::data::store::Store;
use occlude::error::{Error, ExitCode};
use occlude::grid::Grid;
use occlude::loader::{DataLoader, Labels, LoadedRows, LoaderOptions};
use occlude::view::{View, ViewKey};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

crate::trials![
    a_store_gives_the_same_batches_as_a_disk,
    a_slow_store_gets_many_concurrent_requests,
    the_first_step_is_fetched_first,
    cached_shards_are_not_fetched_again,
    the_cache_stays_within_its_limit,
    a_short_outage_is_survived,
    a_lasting_outage_stops_the_loader,
    a_stalled_read_is_retried,
    a_slow_connection_is_not_an_error,
    damaged_bytes_are_fetched_again,
    a_damaged_index_is_fetched_again,
    bytes_that_stay_damaged_are_a_corrupt_sample,
    a_lost_response_to_a_write_is_resolved,
    large_objects_use_multipart_uploads,
    a_mixture_keeps_its_weights,
    fetched_bytes_stay_within_the_limit,
    a_tar_without_an_index_is_scanned_once,
];

const RETRY_BUDGET: Duration = Duration::from_secs(120);

/// 60 images in shards of 16, on a disk and in a store.
struct DiskAndStore {
    _folder: tempfile::TempDir,
    disk: String,
    server: Server,
}

impl DiskAndStore {
    fn new() -> Result<DiskAndStore, Failed> {
        let folder = tempfile::tempdir()?;
        write_images(&folder.path().join("in"), 2, 30)?;
        let out = folder.path().join("small");
        pack_images(&folder.path().join("in"), &out, 16)?;
        let server = Server::start();
        server.upload(&out, "b/small")?;
        Ok(DiskAndStore { disk: out.to_str().expect("UTF-8").to_owned(), _folder: folder, server })
    }

    fn url(&self) -> String {
        self.server.http("b/small")
    }
}

fn open(url: &str, patience: Duration) -> Result<Arc<Mixture>, Error> {
    let sources = [mixture::MixtureSource { url: url.to_owned(), weight: 1.0 }];
    Mixture::open(&sources, patience).map(Arc::new)
}

fn source(set: Arc<Mixture>) -> LoaderOptions {
    let grid = Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 4 };
    let view = View::default();
    LoaderOptions {
        labels: Labels::Required,
        mixture: set,
        cache: None,
        tokenizer: None,
        modality: Modality::Image,
        view: Arc::new(move |image, id, epoch, _, out| {
            view.train_view(&grid, image, ViewKey { seed: 11, id, epoch }, 0, out)
        }),
        shape: grid.pixel_shape(),
        single_frame_sets: Vec::new(),
        limits: ImageLimits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_corrupt_fraction: 0.001,
    }
}

fn rows(source: LoaderOptions, steps: u64) -> Result<Vec<LoadedRows>, Error> {
    let order = SampleOrder::with_sources(&source.mixture.weighted_sizes(), 11, 2);
    let loader = DataLoader::for_training(source, order, 10, 0, 1, 0..steps)?;
    loader.map(|rows| rows.map(|rows| LoadedRows { wait_time: Duration::ZERO, ..rows })).collect()
}

fn a_store_gives_the_same_batches_as_a_disk() -> Outcome {
    let stores = DiskAndStore::new()?;
    let disk = rows(source(open(&stores.disk, RETRY_BUDGET)?), 15)?;
    let store = rows(source(open(&stores.url(), RETRY_BUDGET)?), 15)?;
    assert!(disk == store, "the samples of the store differ");
    assert_eq!(open(&stores.disk, RETRY_BUDGET)?.digest(), open(&stores.url(), RETRY_BUDGET)?.digest());
    Ok(())
}

fn a_slow_store_gets_many_concurrent_requests() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), RETRY_BUDGET)?;
    rows(source(set.clone()), 1)?; // Fetches the indices.
    stores.server.faults(|errors| (errors.latency, errors.fail_every) = (Duration::from_millis(100), 100));
    let start = Instant::now();
    let before = stores.server.requests();
    assert_eq!(rows(source(set), 30)?.len(), 30);
    let seconds = start.elapsed().as_secs_f64();
    let requests = stores.server.requests() - before;
    assert!(requests < 300, "300 samples in {requests} requests: neighbors were not merged");
    assert!(seconds < 0.1 * requests as f64 / 4.0, "{requests} requests of 100 ms took {seconds} s");
    assert!(stores.server.most_under_way() >= 4 && stores.server.connections() >= 4, "one connection caps throughput");
    Ok(())
}

fn the_first_step_is_fetched_first() -> Outcome {
    let stores = DiskAndStore::new()?;
    stores.server.faults(|errors| errors.latency = Duration::from_millis(100));
    let source = LoaderOptions { prefetch_bytes: 64 << 20, ..source(open(&stores.url(), RETRY_BUDGET)?) };
    let order = SampleOrder::with_sources(&source.mixture.weighted_sizes(), 11, 2);
    let shards = source.mixture.sets()[0].shards().len() as u64;
    let before = stores.server.requests();
    let mut loader = DataLoader::for_training(source, order, 10, 0, 1, 0..2000)?;
    loader.next().expect("a step")?;
    let requests = stores.server.requests() - before;
    // The indices, the first step, and the requests in flight meanwhile: 64 at a time, twice if need be.
    assert!(requests <= 2 * shards + 128, "{requests} requests before the first step was ready");
    // The whole set is far larger.
    for _ in 0..200 {
        loader.next().expect("a step")?;
    }
    assert!(stores.server.requests() - before > 300, "{} requests", stores.server.requests() - before);
    Ok(())
}

fn cached_shards_are_not_fetched_again() -> Outcome {
    let stores = DiskAndStore::new()?;
    let folder = tempfile::tempdir()?;
    let cached = || -> Result<Vec<LoadedRows>, Error> {
        let cache = Some(Arc::new(Cache::open(folder.path(), 1 << 30)?));
        rows(LoaderOptions { cache, ..source(open(&stores.url(), RETRY_BUDGET)?) }, 18)
    };
    let first = cached()?;
    let before = stores.server.requests();
    let second = cached()?;
    assert!(first == second && first == rows(source(open(&stores.disk, RETRY_BUDGET)?), 18)?);
    // Requests of opening: manifest, sizes, headers and indices of four shards.
    assert!(stores.server.requests() - before <= 1 + 4 * 4, "{} requests", stores.server.requests() - before);
    // A chunk that was damaged on the disk is fetched again.
    let mut pieces = Vec::new();
    for entry in std::fs::read_dir(folder.path())?.filter_map(|entry| entry.ok()).filter(|e| e.path().is_dir()) {
        pieces.extend(std::fs::read_dir(entry.path())?.map(|piece| piece.expect("a chunk").path()));
    }
    assert_eq!(pieces.len(), 4, "a chunk for each small shard");
    let mut bytes = std::fs::read(&pieces[0])?;
    let length = bytes.len();
    bytes[600..length - 1100].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&pieces[0], bytes)?;
    assert!(cached()? == first, "damaged chunks were used");
    Ok(())
}

fn the_cache_stays_within_its_limit() -> Outcome {
    let stores = DiskAndStore::new()?;
    let folder = tempfile::tempdir()?;
    let size = std::fs::metadata(Path::new(&stores.disk).join("small-000000.tar"))?.len();
    let limit = 2 * size + size / 2;
    let cache = Some(Arc::new(Cache::open(folder.path(), limit)?));
    let ours = rows(LoaderOptions { cache, ..source(open(&stores.url(), RETRY_BUDGET)?) }, 18)?;
    assert!(ours == rows(source(open(&stores.disk, RETRY_BUDGET)?), 18)?);
    let kept = || -> std::io::Result<u64> {
        let mut total = 0;
        for entry in std::fs::read_dir(folder.path())?.filter_map(|entry| entry.ok()).filter(|e| e.path().is_dir()) {
            for piece in std::fs::read_dir(entry.path())? {
                total += piece.and_then(|piece| piece.metadata()).map_or(0, |meta| meta.len());
            }
        }
        Ok(total)
    };
    // A request in flight when the loader was dropped may still be written.
    let start = Instant::now();
    while kept()? > limit && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let total = kept()?;
    assert!(total > 0 && total <= limit, "{total} bytes of {limit}");
    Ok(())
}

fn a_short_outage_is_survived() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), RETRY_BUDGET)?;
    // Longer than the ten retries of object_store.
    stores.server.faults(|errors| errors.away_until = Some(Instant::now() + Duration::from_secs(8)));
    let start = Instant::now();
    assert!(rows(source(set), 12)? == rows(source(open(&stores.disk, RETRY_BUDGET)?), 12)?);
    assert!(start.elapsed() >= Duration::from_secs(7));
    Ok(())
}

fn a_lasting_outage_stops_the_loader() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), Duration::from_secs(3))?;
    stores.server.faults(|errors| errors.away_until = Some(Instant::now() + Duration::from_secs(3600)));
    let start = Instant::now();
    let error = rows(source(set), 12).expect_err("the store is unavailable");
    assert_eq!(error.code, ExitCode::Store, "{error}");
    for part in ["small-00000", "503", "3 s"] {
        assert!(error.message.contains(part), "{part} is missing: {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(10), "took {:?}", start.elapsed());
    Ok(())
}

fn a_stalled_read_is_retried() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), RETRY_BUDGET)?;
    rows(source(set.clone()), 1)?;
    stores.server.faults(|errors| (errors.stalls, errors.silent) = (1, 1));
    let start = Instant::now();
    assert!(rows(source(set), 12)? == rows(source(open(&stores.disk, RETRY_BUDGET)?), 12)?);
    let seconds = start.elapsed().as_secs_f64();
    assert!((10.0..25.0).contains(&seconds), "detected after {seconds} s");
    Ok(())
}

fn a_slow_connection_is_not_an_error() -> Outcome {
    let server = Server::start();
    server.put("b/x", vec![7; 200_000]);
    server.faults(|errors| errors.rate = Some(50_000));
    // 4 s at 50 kB a second without a retry budget: slow is not an error.
    let store = Store::open_with_timeout(&server.http("b"), Duration::ZERO)?;
    assert_eq!(store.get_range("x", 0..200_000)?, vec![7; 200_000]);
    Ok(())
}

fn damaged_bytes_are_fetched_again() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), RETRY_BUDGET)?;
    rows(source(set.clone()), 1)?;
    stores.server.faults(|errors| (errors.flips, errors.halves) = (2, 1));
    assert!(rows(source(set), 12)? == rows(source(open(&stores.disk, RETRY_BUDGET)?), 12)?);
    stores.server.faults(|errors| assert_eq!((errors.flips, errors.halves), (0, 0), "nothing was damaged"));
    Ok(())
}

fn a_damaged_index_is_fetched_again() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), RETRY_BUDGET)?;
    // The first request is for the index of one of its shards.
    stores.server.faults(|errors| (errors.flips, errors.halves) = (2, 1));
    set.sets()[0].shard(1)?;
    stores.server.faults(|errors| assert_eq!((errors.flips, errors.halves), (0, 0), "nothing was damaged"));
    stores.server.faults(|errors| errors.flips = 1000);
    let error = set.sets()[0].shard(2).expect_err("an index that stays damaged");
    assert_eq!(error.code, ExitCode::Corrupt, "{error}");
    Ok(())
}

fn bytes_that_stay_damaged_are_a_corrupt_sample() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), RETRY_BUDGET)?;
    let key = "b/small/small-000001.tar";
    let mut tar = std::fs::read(Path::new(&stores.disk).join("small-000001.tar"))?;
    let (shard, row) = set.find_sample(20)?;
    tar[shard.require_member(row, &["png"])?.offset as usize + 40] ^= 1;
    stores.server.put(key, tar);
    let ours = rows(source(set.clone()), 12)?;
    let lost = set.id(20)?;
    assert!(ours.iter().all(|rows| rows.ids.len() == 10 && !rows.ids.contains(&lost)), "a damaged sample was used");
    let strict = rows(LoaderOptions { max_corrupt_fraction: 0.0, ..source(set) }, 12);
    assert!(strict.is_ok(), "three corrupt samples are always allowed");
    Ok(())
}

fn a_lost_response_to_a_write_is_resolved() -> Outcome {
    let server = Server::start();
    let store = Store::open_with_timeout(&server.http("b"), Duration::from_secs(10))?;
    server.faults(|errors| errors.lost_answers = 1);
    store.put("x", b"first")?;
    assert_eq!(store.get("x")?, b"first");
    Ok(())
}

fn large_objects_use_multipart_uploads() -> Outcome {
    let server = Server::start();
    let bytes: Vec<u8> = (0..40_000_000u32).map(|at| ((at * 31) >> 7) as u8).collect();
    server.put("b/large", bytes.clone());
    let store = Store::open_with_timeout(&server.http("b"), RETRY_BUDGET)?;
    server.faults(|errors| errors.fail_every = 3);
    assert!(store.get("large")? == bytes, "the parts do not make the object");
    assert!(server.requests() >= 4, "three parts of 16 MB and the first request");
    Ok(())
}

fn a_mixture_keeps_its_weights() -> Outcome {
    let stores = DiskAndStore::new()?;
    let folder = tempfile::tempdir()?;
    write_images(&folder.path().join("in"), 1, 20)?;
    let out = folder.path().join("other");
    let options = occlude::data::pack::PackOptions { name: Some("other".into()), ..Default::default() };
    occlude::data::pack::pack(&path_text(folder.path().join("in")), &path_text(&out), &options)?;
    let source_of = |url: &str, weight| mixture::MixtureSource { url: url.to_owned(), weight };
    let sources = [source_of(&stores.url(), 3.0), source_of(out.to_str().expect("UTF-8"), 1.0)];
    let set = Arc::new(Mixture::open(&sources, RETRY_BUDGET)?);
    let ours = rows(source(set.clone()), 400)?;
    let other: Vec<u64> = (60..80).map(|index| set.id(index)).collect::<Result<_, _>>()?;
    let mut counts: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for rows in &ours {
        rows.ids.iter().zip(&rows.epochs).for_each(|(id, epoch)| counts.entry(*id).or_default().push(*epoch));
    }
    let of_other: usize = other.iter().map(|id| counts[id].len()).sum();
    // A quarter of 4,000, each block of 4,096 in exact proportion; 4,000 of them may be off by a few.
    assert!((970..=1030).contains(&of_other), "{of_other} of 4000");
    // Each source counts its own epochs: every sample once in each.
    for id in &other {
        assert_eq!(counts[id], (0..counts[id].len() as u64).collect::<Vec<_>>());
    }
    assert!(Mixture::open(&[sources[0].clone(), sources[0].clone()], RETRY_BUDGET).is_err(), "two sets of one name");
    Ok(())
}

fn fetched_bytes_stay_within_the_limit() -> Outcome {
    let stores = DiskAndStore::new()?;
    let set = open(&stores.url(), RETRY_BUDGET)?;
    rows(source(set.clone()), 1)?;
    // Slow views: fetched bytes pile up before them, up to the limit.
    let inner = source(set.clone()).view;
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        std::thread::sleep(Duration::from_millis(3));
        inner(sample, id, epoch, repeats, out)
    });
    let narrow = LoaderOptions { view, prefetch_bytes: 6000, ..source(set) };
    stores.server.faults(|errors| errors.latency = Duration::from_millis(5));
    let order = SampleOrder::with_sources(&narrow.mixture.weighted_sizes(), 11, 2);
    let mut loader = DataLoader::for_training(narrow, order, 10, 0, 1, 0..50)?;
    loader.next().expect("a step")?;
    std::thread::sleep(Duration::from_millis(500));
    let before = stores.server.requests();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(stores.server.requests(), before, "it continues to fetch although nothing is taken");
    assert_eq!(loader.filter(|rows| rows.is_ok()).count(), 49);
    Ok(())
}

fn a_tar_without_an_index_is_scanned_once() -> Outcome {
    let stores = DiskAndStore::new()?;
    let tar = std::fs::read(Path::new(&stores.disk).join("small-000002.tar"))?;
    stores.server.put("b/bare/bare-000000.tar", tar);
    let url = format!("{}/bare-{{000000..000000}}.tar", stores.server.http("b/bare"));
    let first = open(&url, RETRY_BUDGET)?;
    assert_eq!(first.len(), 16);
    let before = stores.server.requests();
    let second = open(&url, RETRY_BUDGET)?;
    assert_eq!(second.digest(), first.digest());
    assert!(stores.server.requests() - before <= 4, "the tar was scanned again");
    assert_eq!(rows(source(second), 3)?.len(), 3);
    Ok(())
}
