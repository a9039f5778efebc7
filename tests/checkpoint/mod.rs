//! Tests of checkpoints: saving, loading, damage, the lease, full disks.

crate::modules![save_load, damage, lease, full_disk,];
