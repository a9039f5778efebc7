//! Tests of the occupancy of kernels at the shapes of training steps: computed as NVIDIA computes it, and recorded in
//! `kernels/occupancy.tsv`.

use crate::support::{Outcome, root};
use libtest_mimic::Failed;
use occlude::error::Result;
use occlude::grid::Grid;
use occlude::op::adamw::{AdamWBuffers, TensorState, control};
use occlude::op::attention::{self, AttentionMask, Windows};
use occlude::op::bias_gelu::{self, Gelu};
use occlude::op::launch::occupancy::{blocks_per_multiprocessor, occupancy};
use occlude::op::launch::{ARCHITECTURES, record_launches};
use occlude::op::lerp::{self, LerpWeight};
use occlude::op::patch::{self, ChannelStats, PatchNorm};
use occlude::op::tokens;
use occlude::op::tokens::TokenLayout;
use occlude::op::{adamw, info_nce, layer_norm, masked_mse, square_sum};
use std::collections::HashMap;
use std::io::Write;
use std::process::{Command, Stdio};
use tch::{Device, Kind, Tensor};

crate::trials![
    block_counts_match_the_nvidia_calculator,
    block_counts_of_known_kernels_are_right,
    occupancy_of_hot_kernels_matches_the_table,
];

fn block_counts_of_known_kernels_are_right() -> Outcome {
    // By hand from the tables of the CUDA programming guide: 2,048 threads; 65,536 registers; 164 and 228 KiB.
    assert_eq!((blocks_per_multiprocessor("sm_80", 32, 256, 0), occupancy("sm_80", 32, 256, 0)), (8, 1.0));
    assert_eq!((blocks_per_multiprocessor("sm_90a", 128, 256, 0), occupancy("sm_90a", 128, 256, 0)), (2, 0.25));
    // Three times 75 KiB and the reserve of the driver fill the 228 KiB of Hopper; Ampere holds two.
    assert_eq!(
        [blocks_per_multiprocessor("sm_90a", 32, 128, 75 << 10), blocks_per_multiprocessor("sm_80", 32, 128, 75 << 10)],
        [3, 2]
    );
    assert_eq!(
        [blocks_per_multiprocessor("sm_100a", 16, 32, 0), blocks_per_multiprocessor("sm_80", 32, 256, 164 << 10)],
        [32, 0]
    );
    Ok(())
}

fn block_counts_match_the_nvidia_calculator() -> Outcome {
    let header = root().join(".deps/site/nvidia/cu13/include");
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("occupancy");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let source = root().join("tests/oracle/occupancy.cpp");
    let output = Command::new(compiler).args(["-w", "-I"]).arg(header).arg(source).arg("-o").arg(&program).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut request = Vec::new();
    for (architecture, of) in [("sm_80", "8 0"), ("sm_90a", "9 0"), ("sm_100a", "10 0")] {
        for registers in [1, 16, 32, 33, 40, 64, 65, 96, 127, 128, 146, 168, 197, 238, 255] {
            for threads in [1, 32, 64, 96, 100, 128, 160, 192, 224, 256, 512, 1024] {
                for shared in [0u32, 1, 1000, 8192, 16384, 26_112, 49_152, 75 << 10, 100_000, 163 << 10] {
                    request.push((architecture, of, registers, threads, shared));
                }
            }
        }
    }
    let lines: Vec<String> = request.iter().map(|(_, of, r, t, s)| format!("{of} {r} {t} {s}\n")).collect();
    let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut into = child.stdin.take().expect("a pipe");
    let writer = std::thread::spawn(move || into.write_all(lines.concat().as_bytes()));
    let reply = String::from_utf8(child.wait_with_output()?.stdout)?;
    writer.join().expect("no panic")?;
    let reference: Vec<u32> = reply.lines().map(str::parse).collect::<std::result::Result<_, _>>()?;
    assert_eq!(reference.len(), request.len());
    for ((architecture, _, registers, threads, shared), reference) in request.into_iter().zip(reference) {
        let ours = blocks_per_multiprocessor(architecture, registers, threads, shared);
        assert_eq!(ours, reference, "{registers} registers, {threads} threads, {shared} bytes on {architecture}");
    }
    Ok(())
}

fn empty(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu))
}

/// Runs forward and backward.
fn forward_backward(inputs: &[Tensor], forward: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    let leaves: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone().set_requires_grad(true)).collect();
    Ok(forward(&leaves)?.sum(Kind::Float).f_backward()?)
}

fn norm(width: i64) -> Result<()> {
    forward_backward(&[empty(&[64, width]), empty(&[64, width]), empty(&[width]), empty(&[width])], |x| {
        Ok(layer_norm::add_kernel(&x[0], &x[1], &x[2], &x[3])?.1)
    })
}

fn unit(width: i64) -> Result<()> {
    forward_backward(&[empty(&[64, width]), empty(&[width])], |x| bias_gelu::kernel(&x[0], Some(&x[1]), Gelu::Exact))
}

fn mixing(tokens: i64, heads: i64, each: i64) -> Result<()> {
    forward_backward(&[empty(&[2, tokens, 3 * heads * each])], |x| {
        attention::kernel(&x[0], heads, AttentionMask::Full { from: 0 })
    })
}

fn windows() -> Result<()> {
    let windows = Windows::new([64, 8], [4, 4], [2, 0], Device::Cpu)?;
    forward_backward(&[empty(&[16, 512, 3 * 512]), empty(&[16]), empty(&[16, 16, 16])], |x| {
        attention::cosine::kernel(&x[0], 16, &windows, [&x[1], &x[2]])
    })
}

fn rows() -> Result<()> {
    let grid = Grid { frames: 1, rows: 14, cols: 14, channels: 3, patch_frames: 1, patch: 16 };
    let x = Tensor::zeros([2, 3, 1, 224, 224], (Kind::Uint8, Device::Cpu));
    let order = Tensor::arange(196, (Kind::Int64, Device::Cpu)).repeat([2, 1]);
    let [keep, drop] = [(0, 49), (49, 147)].map(|(from, n)| order.narrow(1, from, n).contiguous());
    let scale = ChannelStats { mean: vec![0.5; 3], std: vec![0.25; 3] };
    let _ = patch::kernel(&x, &grid, &scale, &keep, PatchNorm::Raw, Kind::BFloat16)?;
    let _ = patch::kernel(&x, &grid, &scale, &drop, PatchNorm::PerPatch, Kind::Float)?;
    let positions = Tensor::zeros([196, 512], (Kind::Float, Device::Cpu));
    forward_backward(&[empty(&[2, 50, 512]), empty(&[512])], |x| {
        tokens::kernel(&x[0], None, TokenLayout { positions: &positions, keep: &keep, hidden: Some((&x[1], &drop)) })
    })
}

fn flat() -> Result<()> {
    let n = 1 << 20;
    let [master, first, second, gradient] = [(); 4].map(|()| Tensor::zeros([n], (Kind::Float, Device::Cpu)));
    let compute = master.to_kind(Kind::BFloat16);
    let steps = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    let table = TensorState::new(std::slice::from_ref(&(0..n as usize)), &[true], n as usize, &steps);
    let buffers = AdamWBuffers {
        master: &master,
        exp_avg: &first,
        exp_avg_sq: &second,
        gradient: &gradient,
        compute_weights: Some(&compute),
    };
    adamw::kernel(buffers, &table, &control(1e-4, 0.05, 1.0, true, Device::Cpu), [0.9, 0.95], 1e-8)?;
    lerp::kernel(&first, &second, LerpWeight::Scalar(0.1))?;
    let _ = square_sum::kernel(&gradient)?;
    Ok(())
}

fn losses() -> Result<()> {
    let target = Tensor::zeros([2, 147, 768], (Kind::Float, Device::Cpu));
    forward_backward(&[empty(&[2, 147, 768])], |x| masked_mse::kernel(&x[0], &target))?;
    let scale = Tensor::ones([], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    forward_backward(&[empty(&[64, 32]), empty(&[256, 32])], |x| info_nce::kernel(&x[0], &x[1], &scale, 0, 32))
}

/// A shape, and operations of a training step at it.
type Hot = (&'static str, fn() -> Result<()>);

fn hot() -> Vec<Hot> {
    vec![
        ("rows 768 wide", || norm(768)),
        ("rows 1024 wide", || norm(1024)),
        ("rows 1280 wide", || norm(1280)),
        ("rows 3072 wide", || unit(3072)),
        ("50 tokens, 12 heads of 64", || mixing(50, 12, 64)),
        ("65 tokens, 16 heads of 80", || mixing(65, 16, 80)),
        ("99 tokens, 16 heads of 64", || mixing(99, 16, 64)),
        ("160 tokens, 12 heads of 64", || mixing(160, 12, 64)),
        ("197 tokens, 16 heads of 32", || mixing(197, 16, 32)),
        ("windows of 16 tokens, 16 heads of 32", windows),
        ("224 × 224 by 16, 512 wide", rows),
        ("all parameters", flat),
        ("losses", losses),
    ]
}

const HEAD: &str = "kernel\tshape\tarchitecture\tregisters\tthreads\tshared bytes\tblocks\toccupancy";

/// Returns the registers of a kernel by source, variant, kernel and architecture, from `kernels/resources.tsv`.
fn registers() -> std::result::Result<HashMap<[String; 4], u32>, Failed> {
    let table = std::fs::read_to_string(root().join("kernels/resources.tsv"))?;
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('\t').collect();
        Ok(([0, 1, 2, 3].map(|i| cells[i].to_owned()), cells[4].parse()?))
    };
    table.lines().skip(1).map(row).collect()
}

fn occupancy_of_hot_kernels_matches_the_table() -> Outcome {
    let registers = registers()?;
    let mut rows = Vec::new();
    for (shape, work) in hot() {
        for launch in record_launches(work)? {
            let macros: Vec<String> = launch.variant.iter().map(|(name, value)| format!("{name}={value}")).collect();
            for architecture in ARCHITECTURES {
                let key = [launch.source, &macros.join(" "), launch.entry, architecture].map(str::to_owned);
                let registers = *registers.get(&key).ok_or_else(|| format!("{key:?} is not in resources.tsv"))?;
                let threads = launch.threads;
                let shared = launch.shared_bytes as u32;
                let held = blocks_per_multiprocessor(architecture, registers, threads, shared);
                let fraction = (100.0 * occupancy(architecture, registers, threads, shared)).round();
                assert!(held > 0, "{key:?} does not fit");
                let row = format!("{}\t{shape}\t{architecture}\t{registers}\t{threads}\t{shared}", launch.entry);
                rows.push((format!("{row}\t{held}\t{fraction} %"), launch.entry, fraction));
            }
        }
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows.dedup_by(|a, b| a.0 == b.0);
    let lines: Vec<&str> = rows.iter().map(|(line, ..)| line.as_str()).collect();
    let table = format!("{HEAD}\n{}\n", lines.join("\n"));
    let path = root().join("kernels/occupancy.tsv");
    let output = root().join("target/occupancy.tsv");
    if std::fs::read_to_string(&path).unwrap_or_default() != table {
        std::fs::write(&output, &table)?;
        return Err(format!("kernels/occupancy.tsv differs; what is true now is in {}", output.display()).into());
    }
    let reasons = std::fs::read_to_string(root().join("kernels/notes/occupancy.md"))?;
    for (line, kernel, fraction) in &rows {
        let named = reasons.contains(&format!("`{kernel}`"));
        assert!(*fraction >= 50.0 || named, "kernels/notes/occupancy.md gives no reason for {line}");
    }
    Ok(())
}
