//! Tests of several clips per opened video: they equal clips that are made one by one.

use crate::data::video::{encode_video, recipe, videos};
use crate::data::video_pipeline::write_videos;
use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, path_text, root};
use occlude::config::Config;
use occlude::data::decode::{ImageLimits, VisualDecoder};
use occlude::data::mixture::Mixture;
use occlude::data::modality::Modality;
use occlude::data::order::{SampleOrder, SampleRef};
use occlude::data::pack::{PackOptions, pack};
use occlude::data::set::DataSet;
use occlude::data::video::{Codec, Container};
use occlude::error::{ExitCode, Result};
use occlude::grid::Grid;
use occlude::loader::{DataLoader, Labels, LoadedRows, LoaderOptions};
use occlude::method::Batch;
use occlude::part::batch::Side;
use occlude::view::clip::ClipConfig;
use occlude::view::{View, ViewKey};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    repeated_clips_equal_clips_made_one_by_one,
    repeats_of_a_video_have_consecutive_positions,
    a_video_is_opened_once_for_all_its_clips,
    each_clip_has_its_own_mask,
    invalid_numbers_are_rejected,
];

const GRID: Grid = Grid { frames: 2, rows: 3, cols: 4, channels: 3, patch_frames: 2, patch: 8 };
const BYTES: usize = 3 * 4 * 24 * 32;

fn view(numbers: serde_json::Value, scaled_decode: bool) -> View {
    let clip: ClipConfig = serde_json::from_value(numbers).expect("numbers");
    View { clip: Some(clip), scaled_decode, ..View::default() }
}

fn repeated_clips_equal_clips_made_one_by_one() -> Outcome {
    let mut coder = videos();
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    for (frames, gop, b_frames) in [(60, 12, 0), (60, 60, 2), (5, 1, 0)] {
        let file = encode_video(&mut coder, &recipe(Codec::H264, Container::Mp4, gop, b_frames), frames)?;
        for (numbers, scaled) in [
            (json!({"sampling": {"stride": 2}, "repeats": 4}), false),
            (json!({"sampling": {"stride": 2}, "repeats": 4}), true),
            (json!({"sampling": "segments", "repeats": 4, "multi_scale": [1, 0.75, 0.5]}), true),
        ] {
            let view = view(numbers, scaled);
            for id in 0..3 {
                let mut several = |repeats: std::ops::Range<u32>| -> Result<Vec<u8>> {
                    let mut out = vec![0; repeats.len() * BYTES];
                    let image = decoder.open(&file, 3)?;
                    view.train_views(&GRID, image, ViewKey { seed: 5, id, epoch: 1 }, repeats, &mut out)?;
                    Ok(out)
                };
                let all = several(0..4)?;
                let alone = (0..4).map(|at| several(at..at + 1)).collect::<Result<Vec<_>>>()?;
                assert!(
                    all == alone.concat(),
                    "{frames} frames, keyframe interval {gop}, scaled {scaled}, sample {id}"
                );
                assert!(several(1..3)? == alone[1..3].concat(), "two of the four");
                let different: BTreeSet<&Vec<u8>> = alone.iter().collect();
                assert_eq!(different.len(), 4, "all clips differ");
            }
        }
    }
    Ok(())
}

fn repeats_of_a_video_have_consecutive_positions() -> Outcome {
    let sizes = [7, 5, 9];
    let plain = SampleOrder::new(&sizes, 3, 2);
    let order = SampleOrder::new(&sizes, 3, 2).with_repeats(0, 4);
    for position in 0..4 * 21 * 3 {
        let (epoch, sample) = plain.epoch_and_sample(position / 4);
        assert_eq!(order.sample_at(position), SampleRef { epoch, sample, repeat: (position % 4) as u32 });
    }
    // One of two modalities repeats, and a step still has one modality.
    let sources = [(vec![10], 1.0), (vec![6], 1.0)];
    let turns = SampleOrder::alternating(&sources, &[0, 1], 8, 3, 2).with_repeats(0, 4);
    for step in 0..100 {
        let picks: Vec<SampleRef> = (step * 8..step * 8 + 8).map(|position| turns.sample_at(position)).collect();
        let first = picks[0].sample < 10;
        assert!(picks.iter().all(|pick| (pick.sample < 10) == first));
        let different: BTreeSet<(u64, u64)> = picks.iter().map(|pick| (pick.epoch, pick.sample)).collect();
        assert_eq!(different.len(), if first { 2 } else { 8 }, "{picks:?}");
        assert!(picks.iter().all(|pick| first || pick.repeat == 0));
    }
    Ok(())
}

fn source(folder: &Path, opened: &Arc<AtomicU32>) -> Result<LoaderOptions> {
    let view = view(json!({"sampling": {"stride": 2}, "repeats": 4}), false);
    let opened = opened.clone();
    Ok(LoaderOptions {
        labels: Labels::Required,
        mixture: Arc::new(Mixture::from_set(DataSet::open(&path_text(folder.join("out")))?)),
        cache: None,
        tokenizer: None,
        modality: Modality::Image,
        view: Arc::new(move |image, id, epoch, repeats, out| {
            opened.fetch_add(1, Ordering::Relaxed);
            view.train_views(&GRID, image, ViewKey { seed: 11, id, epoch }, repeats, out)
        }),
        shape: GRID.pixel_shape(),
        single_frame_sets: Vec::new(),
        limits: ImageLimits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_corrupt_fraction: 0.1,
    })
}

fn a_video_is_opened_once_for_all_its_clips() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_videos(&folder.path().join("in"))?;
    let options = PackOptions { name: Some("footage".into()), samples_per_shard: 5, ..PackOptions::default() };
    pack(&path_text(folder.path().join("in")), &path_text(folder.path().join("out")), &options)?;
    let read = |rank, world| -> Result<(Vec<LoadedRows>, u32)> {
        let opened = Arc::new(AtomicU32::new(0));
        let source = source(folder.path(), &opened)?;
        let order = SampleOrder::with_sources(&source.mixture.weighted_sizes(), 11, 2).with_repeats(0, 4);
        let loader = DataLoader::for_training(source, order, 12, rank, world, 0..5)?;
        let rows = loader
            .map(|rows| rows.map(|rows| LoadedRows { wait_time: Duration::ZERO, ..rows }))
            .collect::<Result<_>>()?;
        Ok((rows, opened.load(Ordering::Relaxed)))
    };
    let (one, opened) = read(0, 1)?;
    assert_eq!(opened, 5 * 12 / 4, "once for four clips");
    for rows in &one {
        assert_eq!(rows.repeats, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]);
        assert!(rows.ids.chunks(4).all(|ids| ids.iter().all(|id| *id == ids[0])), "{:?}", rows.ids);
    }
    // Three ranks share them evenly; of five ranks, most begin in the middle of the clips of a video.
    for world in [2, 3, 5] {
        let ranks = (0..world).map(|rank| read(rank, world)).collect::<Result<Vec<_>>>()?;
        for (step, full) in one.iter().enumerate() {
            let parts: Vec<&Tensor> = ranks.iter().map(|(rows, _)| &rows[step].pixels).collect();
            assert!(full.pixels == Tensor::cat(&parts, 0), "step {step} on {world} ranks");
        }
    }
    Ok(())
}

fn each_clip_has_its_own_mask() -> Outcome {
    let rows = LoadedRows {
        step: 0,
        ids: vec![7; 4],
        epochs: vec![2; 4],
        repeats: vec![0, 1, 2, 3],
        side: Side::default(),
        pixels: Tensor::zeros([4, 1, 8, 32, 32], (Kind::Uint8, Device::Cpu)),
        wait_time: Duration::ZERO,
    };
    let config = Config::read(&root().join("configs/tiny/videomae.json"), &[])?;
    let method = config.method.build(&config.input)?;
    let mask = method.sample_mask(&Batch::new(rows.pixels.shallow_clone(), &rows.keys(), 5));
    let masks: BTreeSet<Vec<i64>> = (0..4).map(|row| Vec::try_from(mask.keep.get(row)).expect("numbers")).collect();
    assert_eq!(masks.len(), 4);
    Ok(())
}

fn invalid_numbers_are_rejected() -> Outcome {
    for (line, words) in
        [("view.clip.repeats=0", "view.clip.repeats is 0"), ("view.clip.repeats=65", "must lie in 1..=64")]
    {
        let error = Config::read(&root().join("configs/tiny/videomae.json"), &[line.into()]).expect_err(line);
        assert!(error.code == ExitCode::Usage && error.message.contains(words), "{error}");
    }
    Ok(())
}
