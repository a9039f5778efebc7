//! The conveyor.

use crate::shard::{packed, pictures};
use crate::support::Outcome;
use occlude::data::decode::Limits;
use occlude::data::medium::{Medium, Sample};
use occlude::data::mix::Mix;
use occlude::data::order::Order;
use occlude::data::set::DataSet;
use occlude::data::shard::Found;
use occlude::fault::Code;
use occlude::feed::{Feed, Rows, Source};
use occlude::grid::Grid;
use occlude::part::view::View;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tch::Tensor;

crate::trials![
    any_number_of_ranks_reads_the_same_batch,
    threads_and_memory_change_nothing,
    what_is_under_way_keeps_to_its_bytes,
    a_feed_goes_on_where_another_stopped,
    a_sweep_reads_every_sample_once,
    a_bad_sample_is_replaced_alike_everywhere,
    too_many_bad_samples_end_the_feed,
    a_lost_shard_is_no_bad_sample,
    a_panic_of_a_view_names_the_sample,
    a_dropped_feed_stops_its_threads,
];

/// 30 pictures of two classes in shards of 8.
fn set(folder: &Path) -> Result<Arc<Mix>, libtest_mimic::Failed> {
    pictures(&folder.join("in"), 2, 15)?;
    packed(&folder.join("in"), &folder.join("out"), 8)?;
    Ok(Arc::new(Mix::one(DataSet::open(folder.join("out").to_str().expect("UTF-8"))?)))
}

fn source(set: &Arc<Mix>) -> Source {
    let grid = Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 4 };
    let view = View::default();
    Source {
        set: set.clone(),
        cache: None,
        captions: None,
        medium: Medium::Picture,
        view: Arc::new(move |picture, id, epoch, _, out| view.train(&grid, picture, 11, id, epoch, 0, out)),
        shape: grid.pixels(),
        stills: Vec::new(),
        limits: Limits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 20_000,
        max_bad_share: 0.001,
    }
}

fn order(set: &Mix) -> Order {
    Order::mixed(&set.sizes(), 11, 2)
}

/// All steps of a feed, what is measured set to nothing.
fn all(feed: Feed) -> occlude::fault::Result<Vec<Rows>> {
    feed.map(|rows| rows.map(|rows| Rows { waited: Duration::ZERO, ..rows })).collect()
}

/// Steps of several ranks, laid one after another.
fn together(ranks: Vec<Vec<Rows>>) -> Vec<Rows> {
    let mut ranks = ranks.into_iter();
    let mut whole = ranks.next().expect("a rank");
    for rank in ranks {
        for (whole, part) in whole.iter_mut().zip(rank) {
            assert_eq!(whole.step, part.step);
            whole.ids.extend(part.ids);
            whole.epochs.extend(part.epochs);
            whole.repeats.extend(part.repeats);
            whole.valid.extend(part.valid);
            whole.pixels = Tensor::cat(&[&whole.pixels, &part.pixels], 0);
            whole.labels.as_mut().expect("labels").extend(part.labels.expect("labels"));
        }
    }
    whole
}

fn any_number_of_ranks_reads_the_same_batch() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let run = |world: usize| -> occlude::fault::Result<Vec<Rows>> {
        let rank = |rank| all(Feed::train(source(&set), order(&set), 3, rank, world, 0..25)?);
        Ok(together((0..world).map(rank).collect::<Result<_, _>>()?))
    };
    let one = run(1)?;
    assert_eq!(one.len(), 25);
    assert!(one.iter().all(|rows| rows.ids.len() == 3 && rows.pixels.size() == [3, 3, 1, 8, 8]));
    let mut first: Vec<u64> = one[..10].iter().flat_map(|rows| rows.ids.clone()).collect();
    first.sort_unstable();
    let mut ids: Vec<u64> = (0..30).map(|index| set.id(index)).collect::<Result<_, _>>()?;
    ids.sort_unstable();
    assert_eq!(first, ids, "ten steps of three are an epoch");
    assert_eq!((one[9].epochs[2], one[10].epochs[0]), (0, 1));
    for world in 2..=4 {
        assert!(run(world)? == one, "{world} ranks read something else");
    }
    Ok(())
}

fn threads_and_memory_change_nothing() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let run = |threads, prefetch_bytes| {
        let source = Source { threads, prefetch_bytes, ..source(&set) };
        all(Feed::train(source, order(&set), 4, 0, 1, 0..12)?)
    };
    let one = run(1, 0)?;
    assert_eq!(one.len(), 12);
    assert!(run(4, 1 << 20)? == one);
    Ok(())
}

fn what_is_under_way_keeps_to_its_bytes() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let views = Arc::new(AtomicUsize::new(0));
    let (inner, count) = (source(&set).view, views.clone());
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        count.fetch_add(1, Ordering::SeqCst);
        inner(sample, id, epoch, repeats, out)
    });
    // Room for two steps of five rows and a half.
    let narrow = Source { view, prefetch_bytes: 12 * 192, ..source(&set) };
    let mut feed = Feed::train(narrow, order(&set), 5, 0, 1, 0..20)?;
    for taken in 0..3 {
        let due = 10 + 5 * taken;
        let began = Instant::now();
        while views.load(Ordering::SeqCst) < due && began.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(views.load(Ordering::SeqCst), due, "rows made once {taken} steps were taken");
        feed.next().expect("a step")?;
    }
    Ok(())
}

fn a_feed_goes_on_where_another_stopped() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let run = |steps| all(Feed::train(source(&set), order(&set), 4, 0, 1, steps)?);
    let whole = run(0..12)?;
    assert!(run(5..12)? == whole[5..]);
    assert_eq!(run(12..12)?, []);
    Ok(())
}

fn a_sweep_reads_every_sample_once() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let ids: Vec<u64> = (0..30).map(|index| set.id(index)).collect::<Result<_, _>>()?;
    for world in 1..=4 {
        let ranks =
            (0..world).map(|rank| all(Feed::sweep(source(&set), 4, rank, world)?)).collect::<Result<Vec<_>, _>>()?;
        let steps: Vec<Rows> = ranks.into_iter().flatten().collect();
        assert_eq!(steps.iter().flat_map(|rows| rows.ids.clone()).collect::<Vec<_>>(), ids, "{world} ranks");
        let labels: Vec<i64> = steps.iter().flat_map(|rows| rows.labels.clone().expect("labels")).collect();
        assert_eq!(labels.iter().sum::<i64>(), 15);
        assert!(steps.iter().all(|rows| rows.pixels.numel() == rows.ids.len() * 192));
    }
    Ok(())
}

/// Flips a byte in the pictures of the first `count` samples.
fn damage(set: &Mix, count: u64) -> Outcome {
    for index in 0..count {
        let (shard, row) = set.sample(index)?;
        let member = shard.wanted(row, &["png"])?;
        let mut bytes = fs::read(shard.name())?;
        bytes[member.offset as usize + 30] ^= 1;
        fs::write(shard.name(), bytes)?;
    }
    Ok(())
}

fn a_bad_sample_is_replaced_alike_everywhere() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let run = |world: usize| -> occlude::fault::Result<Vec<Rows>> {
        let rank = |rank| all(Feed::train(source(&set), order(&set), 5, rank, world, 0..12)?);
        Ok(together((0..world).map(rank).collect::<Result<_, _>>()?))
    };
    let before = run(1)?;
    damage(&set, 2)?;
    let after = run(1)?;
    let lost = [set.id(0)?, set.id(1)?];
    let mut replaced = 0;
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(after.ids.len(), 5);
        for (row, (old, new)) in before.ids.iter().zip(&after.ids).enumerate() {
            assert!(!lost.contains(new));
            assert!(old == new || lost.contains(old), "step {} row {row} changed without need", before.step);
            replaced += usize::from(old != new);
        }
    }
    assert_eq!(replaced, 4, "two samples in two epochs");
    assert!(run(3)? == after, "three ranks replace otherwise");
    let swept = all(Feed::sweep(source(&set), 7, 0, 1)?)?;
    let ids: Vec<u64> = swept.iter().flat_map(|rows| rows.ids.clone()).collect();
    assert_eq!(
        ids,
        (2..30).map(|index| set.id(index)).collect::<Result<Vec<_>, _>>()?,
        "a sweep leaves bad samples out"
    );
    assert!(swept.iter().all(|rows| rows.pixels.numel() == rows.ids.len() * 192));
    Ok(())
}

fn too_many_bad_samples_end_the_feed() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    damage(&set, 3)?;
    all(Feed::train(source(&set), order(&set), 5, 0, 1, 0..6)?)?;
    damage(&set, 3)?; // A second flip of the same bit makes them whole again.
    damage(&set, 4)?;
    let fault = all(Feed::train(source(&set), order(&set), 5, 0, 1, 0..6)?).expect_err("4 of 30 are bad, 3 may be");
    assert_eq!(fault.code, Code::Corrupt);
    for index in 0..4 {
        let key = set.key(index)?;
        assert!(fault.message.contains(&key), "{key} is not named: {fault}");
    }
    let tolerant = Source { max_bad_share: 0.2, ..source(&set) };
    all(Feed::train(tolerant, order(&set), 5, 0, 1, 0..6)?)?;
    Ok(())
}

fn a_lost_shard_is_no_bad_sample() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let lost = set.sets()[0].shards()[1].name();
    fs::remove_file(&lost)?;
    assert!(Path::new(&Found::index_of(&lost)).exists());
    let fault = all(Feed::train(source(&set), order(&set), 5, 0, 1, 0..6)?).expect_err("a shard is gone");
    assert_eq!(fault.code, Code::Disk, "{fault}");
    assert!(fault.message.contains("small-000001.tar"), "{fault}");
    Ok(())
}

fn a_panic_of_a_view_names_the_sample() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let (cursed, inner) = (set.id(7)?, source(&set).view);
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        assert!(id != cursed, "the seventh sample is cursed");
        inner(sample, id, epoch, repeats, out)
    });
    let mut feed = Feed::train(Source { view, ..source(&set) }, order(&set), 5, 0, 1, 0..6)?;
    let fault = loop {
        match feed.next() {
            Some(Ok(_)) => {}
            None => return Err("the panic was lost".into()),
            Some(Err(fault)) => break fault,
        }
    };
    assert_eq!(fault.code, Code::Failed);
    for part in [&set.key(7)?, &format!("{cursed:016x}"), "cursed"] {
        assert!(fault.message.contains(part), "{part} is not named: {fault}");
    }
    assert!(feed.next().is_some_and(|rows| rows.is_err()), "after a fault the feed does not read as finished");
    Ok(())
}

fn a_dropped_feed_stops_its_threads() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = set(folder.path())?;
    let held = Arc::new(());
    let (inner, mark) = (source(&set).view, held.clone());
    let view = Arc::new(move |sample: Sample<'_>, id, epoch, repeats, out: &mut [u8]| {
        let _mark = &mark;
        std::thread::sleep(Duration::from_millis(20));
        inner(sample, id, epoch, repeats, out)
    });
    let slow = Source { view, prefetch_bytes: 1 << 30, ..source(&set) };
    let mut feed = Feed::train(slow, order(&set), 10, 0, 1, 0..1000)?;
    let first = feed.next().expect("a step")?;
    assert!(first.waited >= Duration::from_millis(50), "ten samples on two threads: waited {:?}", first.waited);
    let began = Instant::now();
    drop(feed);
    assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
    assert_eq!(Arc::strong_count(&held), 1, "a thread still holds the view");
    Ok(())
}
