//! Several clips of each video that is opened: the clips that would be made alone, of one opening.

use crate::clip::{made, recipe, videos};
use crate::footage::footage;
use crate::shard::text;
use crate::support::{Outcome, root};
use occlude::config::Config;
use occlude::data::clip::{Codec, Container};
use occlude::data::decode::{Decoder, Limits};
use occlude::data::medium::Medium;
use occlude::data::mix::Mix;
use occlude::data::order::{Order, Pick};
use occlude::data::pack::{Options, pack};
use occlude::data::set::DataSet;
use occlude::fault::{Code, Result};
use occlude::feed::{Feed, Rows, Source};
use occlude::grid::Grid;
use occlude::method::Batch;
use occlude::part::view::View;
use occlude::part::view::clip::Clip;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    clips_made_together_are_those_made_alone,
    a_video_stands_at_positions_in_a_row,
    a_video_is_opened_once_for_its_clips,
    each_clip_has_a_mask_of_its_own,
    numbers_that_cannot_be_are_refused,
];

const GRID: Grid = Grid { frames: 2, rows: 3, cols: 4, channels: 3, patch_frames: 2, patch: 8 };
const BYTES: usize = 3 * 4 * 24 * 32;

fn view(numbers: serde_json::Value, scaled_decode: bool) -> View {
    let clip: Clip = serde_json::from_value(numbers).expect("numbers");
    View { clip: Some(clip), scaled_decode, ..View::default() }
}

fn clips_made_together_are_those_made_alone() -> Outcome {
    let mut coder = videos();
    let mut decoder = Decoder::new(Limits::default());
    for (frames, gop, b_frames) in [(60, 12, 0), (60, 60, 2), (5, 1, 0)] {
        let file = made(&mut coder, &recipe(Codec::H264, Container::Mp4, gop, b_frames), frames)?;
        for (numbers, scaled) in [
            (json!({"sampling": {"stride": 2}, "repeats": 4}), false),
            (json!({"sampling": {"stride": 2}, "repeats": 4}), true),
            (json!({"sampling": "segments", "repeats": 4, "multi_scale": [1, 0.75, 0.5]}), true),
        ] {
            let view = view(numbers, scaled);
            for id in 0..3 {
                let mut several = |repeats: std::ops::Range<u32>| -> Result<Vec<u8>> {
                    let mut out = vec![0; repeats.len() * BYTES];
                    let picture = decoder.open(&file, 3)?;
                    view.train_all(&GRID, picture, 5, id, 1, repeats, &mut out)?;
                    Ok(out)
                };
                let all = several(0..4)?;
                let alone = (0..4).map(|at| several(at..at + 1)).collect::<Result<Vec<_>>>()?;
                assert!(all == alone.concat(), "{frames} frames, every {gop}th alone, scaled {scaled}, sample {id}");
                assert!(several(1..3)? == alone[1..3].concat(), "two of the four");
                let different: BTreeSet<&Vec<u8>> = alone.iter().collect();
                assert_eq!(different.len(), 4, "each clip is another");
            }
        }
    }
    Ok(())
}

fn a_video_stands_at_positions_in_a_row() -> Outcome {
    let sizes = [7, 5, 9];
    let (plain, order) = (Order::new(&sizes, 3, 2), Order::new(&sizes, 3, 2).repeating(0, 4));
    for position in 0..4 * 21 * 3 {
        let (epoch, sample) = plain.at(position / 4);
        assert_eq!(order.pick(position), Pick { epoch, sample, repeat: (position % 4) as u32 });
    }
    // Of two kinds one repeats, and a step is of one kind as before.
    let sources = [(vec![10], 1.0), (vec![6], 1.0)];
    let turns = Order::by_turns(&sources, &[0, 1], 8, 3, 2).repeating(0, 4);
    for step in 0..100 {
        let picks: Vec<Pick> = (step * 8..step * 8 + 8).map(|position| turns.pick(position)).collect();
        let first = picks[0].sample < 10;
        assert!(picks.iter().all(|pick| (pick.sample < 10) == first));
        let different: BTreeSet<(u64, u64)> = picks.iter().map(|pick| (pick.epoch, pick.sample)).collect();
        assert_eq!(different.len(), if first { 2 } else { 8 }, "{picks:?}");
        assert!(picks.iter().all(|pick| first || pick.repeat == 0));
    }
    Ok(())
}

fn source(folder: &Path, opened: &Arc<AtomicU32>) -> Result<Source> {
    let view = view(json!({"sampling": {"stride": 2}, "repeats": 4}), false);
    let opened = opened.clone();
    Ok(Source {
        set: Arc::new(Mix::one(DataSet::open(&text(&folder.join("out")))?)),
        cache: None,
        captions: None,
        medium: Medium::Picture,
        view: Arc::new(move |picture, id, epoch, repeats, out| {
            opened.fetch_add(1, Ordering::Relaxed);
            view.train_all(&GRID, picture, 11, id, epoch, repeats, out)
        }),
        shape: GRID.pixels(),
        stills: Vec::new(),
        limits: Limits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_bad_share: 0.1,
    })
}

fn a_video_is_opened_once_for_its_clips() -> Outcome {
    let folder = tempfile::tempdir()?;
    footage(&folder.path().join("in"))?;
    let options = Options { name: Some("footage".into()), samples_per_shard: 5, ..Options::default() };
    pack(&text(&folder.path().join("in")), &text(&folder.path().join("out")), &options)?;
    let read = |rank, world| -> Result<(Vec<Rows>, u32)> {
        let opened = Arc::new(AtomicU32::new(0));
        let source = source(folder.path(), &opened)?;
        let order = Order::mixed(&source.set.sizes(), 11, 2).repeating(0, 4);
        let feed = Feed::train(source, order, 12, rank, world, 0..5)?;
        let rows = feed.map(|rows| rows.map(|rows| Rows { waited: Duration::ZERO, ..rows })).collect::<Result<_>>()?;
        Ok((rows, opened.load(Ordering::Relaxed)))
    };
    let (one, opened) = read(0, 1)?;
    assert_eq!(opened, 5 * 12 / 4, "once for four clips");
    for rows in &one {
        assert_eq!(rows.repeats, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]);
        assert!(rows.ids.chunks(4).all(|ids| ids.iter().all(|id| *id == ids[0])), "{:?}", rows.ids);
    }
    // Three ranks share them evenly; of five, most begin in the middle of a video's clips.
    for world in [2, 3, 5] {
        let ranks = (0..world).map(|rank| read(rank, world)).collect::<Result<Vec<_>>>()?;
        for (step, whole) in one.iter().enumerate() {
            let parts: Vec<&Tensor> = ranks.iter().map(|(rows, _)| &rows[step].pixels).collect();
            assert!(whole.pixels == Tensor::cat(&parts, 0), "step {step} on {world} ranks");
        }
    }
    Ok(())
}

fn each_clip_has_a_mask_of_its_own() -> Outcome {
    let rows = Rows {
        step: 0,
        ids: vec![7; 4],
        epochs: vec![2; 4],
        repeats: vec![0, 1, 2, 3],
        text: None,
        labels: None,
        valid: vec![32; 4],
        pixels: Tensor::zeros([4, 1, 8, 32, 32], (Kind::Uint8, Device::Cpu)),
        waited: Duration::ZERO,
    };
    let config = Config::read(&root().join("configs/tiny/videomae.json"), &[])?;
    let method = config.method.build(&config.input)?;
    let mask = method.mask(&Batch::new(rows.pixels.shallow_clone(), &rows.origins(), 5));
    let masks: BTreeSet<Vec<i64>> = (0..4).map(|row| Vec::try_from(mask.keep.get(row)).expect("numbers")).collect();
    assert_eq!(masks.len(), 4);
    Ok(())
}

fn numbers_that_cannot_be_are_refused() -> Outcome {
    for (line, words) in
        [("view.clip.repeats=0", "view.clip.repeats is 0"), ("view.clip.repeats=65", "must lie in 1..=64")]
    {
        let fault = Config::read(&root().join("configs/tiny/videomae.json"), &[line.into()]).expect_err(line);
        assert!(fault.code == Code::Usage && fault.message.contains(words), "{fault}");
    }
    Ok(())
}
