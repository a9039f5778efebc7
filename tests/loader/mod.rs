//! Tests of the data loader, from disks and from stores.

crate::modules![data_loader, streaming, memory_bounds, repeated_clips,];
