//! Tests of the scripts in `launch/`.

crate::modules![mpirun, cluster, bench_scripts,];
