//! Tests that every kernel compiles for GPUs, in every variant, with the registers of `kernels/resources.tsv`.

use crate::support::{Outcome, root};
use occlude::op::kernel_sources;
use occlude::op::launch::{ARCHITECTURES, compile};
use std::sync::Mutex;

crate::trials![every_kernel_compiles_for_every_architecture_within_its_registers];

const HEAD: &str = "source\tvariant\tkernel\tarchitecture\tregisters\tspill stores\tspill loads";

fn every_kernel_compiles_for_every_architecture_within_its_registers() -> Outcome {
    let mut work = Vec::new();
    for source in kernel_sources() {
        for variant in (source.variants)() {
            work.extend(ARCHITECTURES.map(|architecture| (source, variant.clone(), architecture)));
        }
    }
    let work = Mutex::new(work);
    let rows = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let round = || {
            loop {
                let next = work.lock().expect("no panic").pop();
                let Some((source, variant, architecture)) = next else { return };
                let macros: Vec<String> = variant.iter().map(|(name, value)| format!("{name}={value}")).collect();
                let compiled = compile(source, &variant, architecture);
                rows.lock().expect("no panic").push(compiled.map(|compiled| {
                    assert!(!compiled.cubin.is_empty() && !compiled.resources.is_empty(), "{}", source.name);
                    let row = compiled.resources.into_iter().map(|r| {
                        let key = format!("{}\t{}\t{}\t{architecture}", source.name, macros.join(" "), r.kernel);
                        format!("{key}\t{}\t{}\t{}", r.registers, r.spills.0, r.spills.1)
                    });
                    row.collect::<Vec<_>>()
                }));
            }
        };
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(round)).collect();
        threads.into_iter().for_each(|thread| thread.join().expect("a compiler's thread"));
    });
    let mut rows = rows.into_inner()?.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    rows.sort();
    let table = format!("{HEAD}\n{}\n", rows.join("\n"));
    let kept = std::fs::read_to_string(root().join("kernels/resources.tsv")).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    let current = lines(&table);
    let listed = lines(&kept);
    if current != listed {
        let output = root().join("target/resources.tsv");
        std::fs::write(&output, &table)?;
        let new: Vec<_> = current.difference(&listed).collect();
        let missing: Vec<_> = listed.difference(&current).collect();
        panic!(
            "kernels/resources.tsv differs; the present table is in {}.\nnew: {new:#?}\ngone: {missing:#?}",
            output.display()
        );
    }
    for row in &rows {
        assert!(row.ends_with("\t0\t0"), "a kernel spills registers: {row}");
    }
    Ok(())
}
