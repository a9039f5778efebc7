//! Tests of the data loader on local shards.

use crate::data::shard::{pack_images, write_images};
use crate::support::Outcome;
use occlude::data::decode::ImageLimits;
use occlude::data::mixture::Mixture;
use occlude::data::modality::{Modality, Sample};
use occlude::data::order::{SampleOrder, max_rank_blocks};
use occlude::data::set::DataSet;
use occlude::data::shard::ShardInfo;
use occlude::error::ExitCode;
use occlude::grid::Grid;
use occlude::loader::{DataLoader, Labels, LoadedRows, LoaderOptions, UpdateBlocks};
use occlude::view::{View, ViewKey};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tch::Tensor;

crate::trials![
    any_number_of_ranks_reads_the_same_batch,
    threads_and_memory_limits_do_not_change_batches,
    bytes_in_flight_stay_within_the_limit,
    a_loader_resumes_where_another_stopped,
    a_sequential_pass_reads_every_sample_once,
    labels_are_read_where_they_are_wanted_and_checked,
    blocks_of_an_update_are_equal_on_any_number_of_ranks,
    a_corrupt_sample_is_replaced_identically_on_all_ranks,
    too_many_corrupt_samples_stop_the_loader,
    a_lost_shard_is_not_a_corrupt_sample,
    a_panic_in_a_view_names_the_sample,
    a_dropped_loader_stops_its_threads,
];

/// Returns a set of 30 images of two classes in shards of 8.
fn small_set(folder: &Path) -> Result<Arc<Mixture>, libtest_mimic::Failed> {
    write_images(&folder.join("in"), 2, 15)?;
    pack_images(&folder.join("in"), &folder.join("out"), 8)?;
    Ok(Arc::new(Mixture::from_set(DataSet::open(folder.join("out").to_str().expect("UTF-8"))?)))
}

fn source(set: &Arc<Mixture>) -> LoaderOptions {
    let grid = Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 4 };
    let view = View::default();
    LoaderOptions {
        labels: Labels::Required,
        mixture: set.clone(),
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
        prefetch_bytes: 20_000,
        max_corrupt_fraction: 0.001,
    }
}

fn order(set: &Mixture) -> SampleOrder {
    SampleOrder::with_sources(&set.weighted_sizes(), 11, 2)
}

/// Returns all steps of a loader, with measured times set to zero.
fn all_steps(loader: DataLoader) -> occlude::error::Result<Vec<LoadedRows>> {
    loader.map(|rows| rows.map(|rows| LoadedRows { wait_time: Duration::ZERO, ..rows })).collect()
}

/// Concatenates the steps of several ranks.
fn concat_ranks(ranks: Vec<Vec<LoadedRows>>) -> Vec<LoadedRows> {
    let mut ranks = ranks.into_iter();
    let mut full = ranks.next().expect("a rank");
    for rank in ranks {
        for (full, part) in full.iter_mut().zip(rank) {
            assert_eq!(full.step, part.step);
            full.ids.extend(part.ids);
            full.epochs.extend(part.epochs);
            full.repeats.extend(part.repeats);
            full.pixels = Tensor::cat(&[&full.pixels, &part.pixels], 0);
            full.side.valid.as_mut().expect("lengths").extend(part.side.valid.clone().expect("lengths"));
            let labels = [&full.side, &part.side].map(|side| side.labels.as_ref().expect("labels"));
            full.side.labels = Some(Tensor::cat(&labels, 0));
        }
    }
    full
}

fn any_number_of_ranks_reads_the_same_batch() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let run = |world: usize| -> occlude::error::Result<Vec<LoadedRows>> {
        let rank = |rank| all_steps(DataLoader::for_training(source(&set), order(&set), 3, rank, world, 0..25)?);
        Ok(concat_ranks((0..world).map(rank).collect::<Result<_, _>>()?))
    };
    let one = run(1)?;
    assert_eq!(one.len(), 25);
    assert!(one.iter().all(|rows| rows.ids.len() == 3 && rows.pixels.size() == [3, 3, 1, 8, 8]));
    let mut first: Vec<u64> = one[..10].iter().flat_map(|rows| rows.ids.clone()).collect();
    first.sort_unstable();
    let mut ids: Vec<u64> = (0..30).map(|index| set.id(index)).collect::<Result<_, _>>()?;
    ids.sort_unstable();
    assert_eq!(first, ids, "an epoch has ten steps of three");
    assert_eq!((one[9].epochs[2], one[10].epochs[0]), (0, 1));
    for world in 2..=4 {
        assert!(run(world)? == one, "{world} ranks read other rows");
    }
    Ok(())
}

fn threads_and_memory_limits_do_not_change_batches() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let run = |threads, prefetch_bytes| {
        let source = LoaderOptions { threads, prefetch_bytes, ..source(&set) };
        all_steps(DataLoader::for_training(source, order(&set), 4, 0, 1, 0..12)?)
    };
    let one = run(1, 0)?;
    assert_eq!(one.len(), 12);
    assert!(run(4, 1 << 20)? == one);
    Ok(())
}

fn bytes_in_flight_stay_within_the_limit() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let views = Arc::new(AtomicUsize::new(0));
    let inner = source(&set).view;
    let count = views.clone();
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        count.fetch_add(1, Ordering::SeqCst);
        inner(sample, id, epoch, repeats, out)
    });
    // Room for two steps of five rows and a half.
    let narrow = LoaderOptions { view, prefetch_bytes: 12 * 192, ..source(&set) };
    let mut loader = DataLoader::for_training(narrow, order(&set), 5, 0, 1, 0..20)?;
    for done in 0..3 {
        let due = 10 + 5 * done;
        let start = Instant::now();
        while views.load(Ordering::SeqCst) < due && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(views.load(Ordering::SeqCst), due, "rows made after {done} steps were taken");
        loader.next().expect("a step")?;
    }
    Ok(())
}

fn a_loader_resumes_where_another_stopped() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let run = |steps| all_steps(DataLoader::for_training(source(&set), order(&set), 4, 0, 1, steps)?);
    let full = run(0..12)?;
    assert!(run(5..12)? == full[5..]);
    assert_eq!(run(12..12)?, []);
    Ok(())
}

fn a_sequential_pass_reads_every_sample_once() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let ids: Vec<u64> = (0..30).map(|index| set.id(index)).collect::<Result<_, _>>()?;
    for world in 1..=4 {
        let ranks = (0..world)
            .map(|rank| all_steps(DataLoader::sequential(source(&set), 4, rank, world)?))
            .collect::<Result<Vec<_>, _>>()?;
        let steps: Vec<LoadedRows> = ranks.into_iter().flatten().collect();
        assert_eq!(steps.iter().flat_map(|rows| rows.ids.clone()).collect::<Vec<_>>(), ids, "{world} ranks");
        let labels: Vec<i64> = steps
            .iter()
            .flat_map(|rows| Vec::<i64>::try_from(rows.side.labels.as_ref().expect("labels")).expect("ids"))
            .collect();
        assert_eq!(labels.iter().sum::<i64>(), 15);
        assert!(steps.iter().all(|rows| rows.pixels.numel() == rows.ids.len() * 192));
    }
    Ok(())
}

/// Returns the ids and pixels of the blocks of three updates of 11 samples, in blocks of 4, 4 and 3.
fn update_blocks(set: &Arc<Mixture>, world: usize) -> occlude::error::Result<Vec<(Vec<u64>, Tensor)>> {
    let mut ranks = Vec::new();
    for rank in 0..world {
        let blocks = UpdateBlocks { global_batch: 11, block: 4, updates: 0..3 };
        ranks.push(all_steps(DataLoader::for_training_in_blocks(source(set), order(set), blocks, rank, world)?)?);
    }
    let steps = max_rank_blocks(11, 4, world) as usize;
    let mut blocks = Vec::new();
    for update in 0..3 {
        for rank in &ranks {
            assert_eq!(rank.len(), 3 * steps, "every rank takes the same number of steps");
            let loaded = rank[update * steps..][..steps].iter().filter(|rows| !rows.ids.is_empty());
            blocks.extend(loaded.map(|rows| (rows.ids.clone(), rows.pixels.copy())));
        }
    }
    Ok(blocks)
}

fn blocks_of_an_update_are_equal_on_any_number_of_ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let one = update_blocks(&set, 1)?;
    assert_eq!(one.iter().map(|(ids, _)| ids.len()).collect::<Vec<_>>(), [4, 4, 3].repeat(3));
    let full = all_steps(DataLoader::for_training(source(&set), order(&set), 11, 0, 1, 0..3)?)?;
    assert!(one.iter().flat_map(|(ids, _)| ids).eq(full.iter().flat_map(|rows| &rows.ids)));
    for world in 2..=5 {
        assert!(update_blocks(&set, world)? == one, "{world} ranks");
    }
    Ok(())
}

/// Flips a byte in the images of the first `count` samples.
fn flip_bytes(set: &Mixture, count: u64) -> Outcome {
    for index in 0..count {
        let (shard, row) = set.find_sample(index)?;
        let member = shard.require_member(row, &["png"])?;
        let mut bytes = fs::read(shard.name())?;
        bytes[member.offset as usize + 30] ^= 1;
        fs::write(shard.name(), bytes)?;
    }
    Ok(())
}

fn labels_are_read_where_they_are_wanted_and_checked() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let first = |labels: Labels| {
        let options = LoaderOptions { labels, ..source(&set) };
        DataLoader::sequential(options, 30, 0, 1).and_then(|mut loader| loader.next().expect("a step"))
    };
    assert!(first(Labels::Ignored)?.side.labels.is_none());
    let optional = first(Labels::Optional { classes: 2 })?.side.labels.expect("labels");
    assert!(optional == first(Labels::Required)?.side.labels.expect("labels"));
    let error = first(Labels::Optional { classes: 1 }).expect_err("a label of 1");
    assert!(error.code == ExitCode::Usage && error.message.contains("its label is 1"), "{error}");
    Ok(())
}

fn a_corrupt_sample_is_replaced_identically_on_all_ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let run = |world: usize| -> occlude::error::Result<Vec<LoadedRows>> {
        let rank = |rank| all_steps(DataLoader::for_training(source(&set), order(&set), 5, rank, world, 0..12)?);
        Ok(concat_ranks((0..world).map(rank).collect::<Result<_, _>>()?))
    };
    let before = run(1)?;
    flip_bytes(&set, 2)?;
    let after = run(1)?;
    let lost = [set.id(0)?, set.id(1)?];
    let mut replaced = 0;
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(after.ids.len(), 5);
        for (row, (old, new)) in before.ids.iter().zip(&after.ids).enumerate() {
            assert!(!lost.contains(new));
            assert!(old == new || lost.contains(old), "step {} row {row} changed needlessly", before.step);
            replaced += usize::from(old != new);
        }
    }
    assert_eq!(replaced, 4, "two samples in two epochs");
    assert!(run(3)? == after, "three ranks replace differently");
    let swept = all_steps(DataLoader::sequential(source(&set), 7, 0, 1)?)?;
    let ids: Vec<u64> = swept.iter().flat_map(|rows| rows.ids.clone()).collect();
    assert_eq!(
        ids,
        (2..30).map(|index| set.id(index)).collect::<Result<Vec<_>, _>>()?,
        "a sweep leaves bad samples out"
    );
    assert!(swept.iter().all(|rows| rows.pixels.numel() == rows.ids.len() * 192));
    Ok(())
}

fn too_many_corrupt_samples_stop_the_loader() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    flip_bytes(&set, 3)?;
    all_steps(DataLoader::for_training(source(&set), order(&set), 5, 0, 1, 0..6)?)?;
    flip_bytes(&set, 3)?; // A second flip of the same bit repairs them.
    flip_bytes(&set, 4)?;
    let error = all_steps(DataLoader::for_training(source(&set), order(&set), 5, 0, 1, 0..6)?)
        .expect_err("4 of 30 are corrupt, 3 are allowed");
    assert_eq!(error.code, ExitCode::Corrupt);
    for index in 0..4 {
        let key = set.key(index)?;
        assert!(error.message.contains(&key), "{key} is not named: {error}");
    }
    let tolerant = LoaderOptions { max_corrupt_fraction: 0.2, ..source(&set) };
    all_steps(DataLoader::for_training(tolerant, order(&set), 5, 0, 1, 0..6)?)?;
    Ok(())
}

fn a_lost_shard_is_not_a_corrupt_sample() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let lost = set.sets()[0].shards()[1].name();
    fs::remove_file(&lost)?;
    assert!(Path::new(&ShardInfo::index_name(&lost)).exists());
    let error =
        all_steps(DataLoader::for_training(source(&set), order(&set), 5, 0, 1, 0..6)?).expect_err("a shard is missing");
    assert_eq!(error.code, ExitCode::Disk, "{error}");
    assert!(error.message.contains("small-000001.tar"), "{error}");
    Ok(())
}

fn a_panic_in_a_view_names_the_sample() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let cursed = set.id(7)?;
    let inner = source(&set).view;
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        assert!(id != cursed, "the seventh sample is cursed");
        inner(sample, id, epoch, repeats, out)
    });
    let mut loader = DataLoader::for_training(LoaderOptions { view, ..source(&set) }, order(&set), 5, 0, 1, 0..6)?;
    let error = loop {
        match loader.next() {
            Some(Ok(_)) => {}
            None => return Err("the panic was lost".into()),
            Some(Err(error)) => break error,
        }
    };
    assert_eq!(error.code, ExitCode::Failed);
    for part in [&set.key(7)?, &format!("{cursed:016x}"), "cursed"] {
        assert!(error.message.contains(part), "{part} is not named: {error}");
    }
    assert!(loader.next().is_some_and(|rows| rows.is_err()), "after an error the loader does not end normally");
    Ok(())
}

fn a_dropped_loader_stops_its_threads() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = small_set(folder.path())?;
    let held = Arc::new(());
    let inner = source(&set).view;
    let mark = held.clone();
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        let _mark = &mark;
        std::thread::sleep(Duration::from_millis(20));
        inner(sample, id, epoch, repeats, out)
    });
    let slow = LoaderOptions { view, prefetch_bytes: 1 << 30, ..source(&set) };
    let mut loader = DataLoader::for_training(slow, order(&set), 10, 0, 1, 0..1000)?;
    let first = loader.next().expect("a step")?;
    assert!(first.wait_time >= Duration::from_millis(50), "ten samples on two threads: waited {:?}", first.wait_time);
    let start = Instant::now();
    drop(loader);
    assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
    assert_eq!(Arc::strong_count(&held), 1, "a thread still holds the view");
    Ok(())
}
