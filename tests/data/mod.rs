//! Tests of the data: stores, shards, the order of samples, decoders, tokenizers, packing.

crate::modules![
    store,
    cloud_store,
    shard,
    order,
    decode,
    hostile_images,
    video,
    video_faults,
    video_pipeline,
    audio,
    audio_pipeline,
    tokenizer,
    pack,
];
