//! Tests of the emulator of a GPU thread block: kernels compute the right values, and errors that a GPU ignores stop
//! them.

use crate::support::{Outcome, normal};
use occlude::op::launch::{Argument, KernelSource, Launch, Variant, single_variant};
use tch::{Device, Kind, Tensor};

crate::trials![
    warp_and_block_reductions_sum_over_threads,
    half_precision_rounds_to_nearest,
    tensor_core_products_match_matmul,
    transposed_loads_transpose,
    async_copies_arrive_after_the_wait,
    a_planted_race_is_caught,
    a_planted_race_within_a_warp_is_caught,
    lanes_may_access_one_address_in_turn,
    a_planted_race_between_blocks_is_caught,
    a_planted_access_out_of_bounds_is_caught,
    a_planted_misaligned_access_is_caught,
    a_planted_uninitialized_read_is_caught,
    a_planted_missing_barrier_is_caught,
    a_planted_divergent_barrier_is_caught,
    a_planted_divergent_warp_is_caught,
    an_async_copy_without_a_wait_is_caught,
    too_little_shared_memory_is_caught,
    mismatched_arguments_are_caught,
];

/// Runs the kernel `k` with the given parameters and body.
fn run_kernel(
    text: &str,
    threads: u32,
    grid: u32,
    shared: usize,
    arguments: &[Argument],
) -> occlude::error::Result<()> {
    let text = format!("#include \"device.cuh\"\nKERNEL(1024) void k{text}\nENTRY(k)\n");
    let source = KernelSource { name: "planted", embedded: Box::leak(text.into_boxed_str()), variants: single_variant };
    let launch = Launch {
        source: &source,
        variant: Variant::new(),
        entry: "k",
        grid: [grid, 1, 1],
        threads,
        shared_bytes: shared,
    };
    launch.run(arguments)
}

fn assert_caught(words: &[&str], text: &str, threads: u32, grid: u32, shared: usize) {
    let x = Tensor::arange(256, (Kind::Float, Device::Cpu));
    let y = Tensor::zeros([256], (Kind::Float, Device::Cpu));
    let error = run_kernel(text, threads, grid, shared, &[(&x).into(), (&y).into()]).expect_err(words[0]);
    for word in words {
        assert!(error.message.contains(word), "no `{word}` in: {error}");
    }
}

fn warp_and_block_reductions_sum_over_threads() -> Outcome {
    let x = normal(1, &[3, 128]);
    let y = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    let body = "(Global<const float> x, Global<float> y) {
        const auto room = shared<float>(0, 4);
        const float sum = block_sum(x[block() * 128 + thread()], room);
        if (thread() == 0) y.set(block(), sum);
    }";
    run_kernel(body, 128, 3, 16, &[(&x).into(), (&y).into()])?;
    let expected = x.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    assert!((y - expected).abs().max().double_value(&[]) < 1e-4);
    Ok(())
}

fn half_precision_rounds_to_nearest() -> Outcome {
    // Every magnitude, ties, overflow and subnormal values.
    let all =
        [0.0, 1.0, -1.5, 65504.0, 65519.0, 65520.0, 1e-8, 5.97e-8, 6.1e-5, 3.3e38, 1.000_976_6, 1.001_464_8, 2049.0];
    let x = Tensor::cat(&[Tensor::from_slice(&all.map(|x: f64| x as f32)), normal(2, &[243])], 0);
    for (name, kind) in [("bf16", Kind::BFloat16), ("f16", Kind::Half)] {
        let half = Tensor::zeros([256], (kind, Device::Cpu));
        let back = Tensor::zeros([256], (Kind::Float, Device::Cpu));
        let body = format!(
            "(Global<const float> x, Global<{name}> half, Global<float> back) {{
                const u32 i = thread();
                half.set(i, narrow<{name}>(x[i]));
                back.set(i, wide(half[i]));
            }}"
        );
        run_kernel(&body, 256, 1, 0, &[(&x).into(), (&half).into(), (&back).into()])?;
        let bits = |x: &Tensor, kind| x.view_dtype(kind);
        assert_eq!(bits(&half, Kind::Int16), bits(&x.to_kind(kind), Kind::Int16), "{name}");
        let wide = x.to_kind(kind).to_kind(Kind::Float);
        assert_eq!(bits(&back, Kind::Int), bits(&wide, Kind::Int), "{name}, converted back");
    }
    Ok(())
}

/// c [16, 8] = a [16, 16] · b, where b is stored as [8, 16] (column by column) or as [16, 8] (transposed on loading).
fn product(turned: bool) -> Outcome {
    let kind = Kind::BFloat16;
    let a = normal(3, &[16, 16]).to_kind(kind);
    let b = normal(4, &[16, 8]).to_kind(kind);
    let lies = if turned { b.copy() } else { b.transpose(0, 1).contiguous() };
    let c = Tensor::zeros([16, 8], (Kind::Float, Device::Cpu));
    // For b by columns: matrices of rows 0..8 of columns 0..8 and 8..16; transposed: rows 0..8 and 8..16.
    let address = if turned { "(l % 16) * 8" } else { "(l % 8) * 16 + l / 8 % 2 * 8" };
    let body = format!(
        "(Global<const bf16> a, Global<const bf16> b, Global<float> c) {{
            const auto left = shared<bf16>(0, 256);
            const auto right = shared<bf16>(512, 128);
            const u32 l = thread();
            for (u32 i = l; i < 256; i += 32) left.set(i, a[i]);
            for (u32 i = l; i < 128; i += 32) right.set(i, b[i]);
            barrier();
            u32 x[4], y[4];
            load_matrices<false>(x, left, (l % 16) * 16 + l / 16 * 8);
            load_matrices<{turned}>(y, right, {address});
            float sums[4] = {{}};
            multiply<bf16>(sums, x, y[0], y[1]);
            for (u32 e = 0; e < 4; ++e) c.set((l / 4 + e / 2 * 8) * 8 + l % 4 * 2 + e % 2, sums[e]);
        }}"
    );
    run_kernel(&body, 32, 1, 768, &[(&a).into(), (&lies).into(), (&c).into()])?;
    let expected = a.to_kind(Kind::Float).matmul(&b.to_kind(Kind::Float));
    assert!((c - expected).abs().max().double_value(&[]) < 1e-5);
    Ok(())
}

fn tensor_core_products_match_matmul() -> Outcome {
    product(false)
}

fn transposed_loads_transpose() -> Outcome {
    product(true)
}

const COPY: &str = "(Global<const float> x, Global<float> y) {
    const auto room = shared<float>(0, 256);
    copy_async(room, 4 * thread(), x, 4 * thread());
    copy_commit();
    WAIT
    barrier();
    for (u32 i = thread(); i < 256; i += 64) y.set(i, room[255 - i]);
}";

fn async_copies_arrive_after_the_wait() -> Outcome {
    let x = normal(5, &[256]);
    let y = Tensor::zeros([256], (Kind::Float, Device::Cpu));
    run_kernel(&COPY.replace("WAIT", "copy_wait<0>();"), 64, 1, 1024, &[(&x).into(), (&y).into()])?;
    assert_eq!(y, x.flip([0]));
    Ok(())
}

fn an_async_copy_without_a_wait_is_caught() -> Outcome {
    assert_caught(&["read before it is written"], &COPY.replace("WAIT", ""), 64, 1, 1024);
    let early = "(Global<const float> x, Global<float> y) {
        copy_async(shared<float>(0, 256), 4 * thread(), x, 4 * thread());
        copy_commit();
    }";
    assert_caught(&["ends before its asynchronous copies"], early, 64, 1, 1024);
    Ok(())
}

fn a_planted_race_is_caught() -> Outcome {
    let body = "(Global<const float> x, Global<float> y) {
        const auto room = shared<float>(0, 64);
        room.set(thread() / 2, x[thread()]);
        barrier();
        y.set(thread(), room[thread() / 2]);
    }";
    assert_caught(&["race of two writers", "kernel k", "thread 1"], body, 64, 1, 256);
    Ok(())
}

fn a_planted_race_within_a_warp_is_caught() -> Outcome {
    let body = "(Global<const float> x, Global<float> y) {
        const auto room = shared<float>(0, 32);
        room.set(thread(), x[thread()]);
        BARRIER
        y.set(thread(), room[thread() ^ 1]);
    }";
    // Lane 1 has not written yet when lane 0 reads; with a warp barrier it has.
    assert_caught(&["read before it is written"], &body.replace("BARRIER", ""), 32, 1, 128);
    let x = normal(6, &[256]);
    let y = Tensor::zeros([256], (Kind::Float, Device::Cpu));
    run_kernel(&body.replace("BARRIER", "warp_barrier();"), 32, 1, 128, &[(&x).into(), (&y).into()])?;
    let second = "(Global<const float> x, Global<float> y) {
        const auto room = shared<float>(0, 32);
        room.set(thread(), x[thread()]);
        warp_barrier();
        const float other = room[thread() ^ 1];
        room.set(thread(), other);
        y.set(thread(), room[thread()]);
    }";
    assert_caught(&["race of a reader with a writer"], second, 32, 1, 128);
    Ok(())
}

fn lanes_may_access_one_address_in_turn() -> Outcome {
    // Each pass reads what other lanes read and wrote in the pass before, and writes it again.
    let body = "(Global<const float> x, Global<float> y) {
        const auto room = shared<float>(0, 32);
        room.set(thread(), x[thread()]);
        for (u32 step = 16; step > 0; step /= 2) {
            warp_barrier();
            const u32 low = thread() / step * 2 * step + thread() % step, high = low + step;
            if (thread() < 16) {
                const float a = room[low], b = room[high];
                room.set(low, a + b), room.set(high, a - b);
            }
        }
        warp_barrier();
        y.set(thread(), room[thread()]);
    }";
    let x = normal(9, &[256]);
    let y = Tensor::zeros([256], (Kind::Float, Device::Cpu));
    run_kernel(body, 32, 1, 128, &[(&x).into(), (&y).into()])?;
    let sum = x.narrow(0, 0, 32).sum(Kind::Float).double_value(&[]);
    assert!((y.double_value(&[0]) - sum).abs() < 1e-5);
    assert_caught(&["read before it is written"], &body.replacen("warp_barrier();", "", 1), 32, 1, 128);
    Ok(())
}

fn a_planted_race_between_blocks_is_caught() -> Outcome {
    let two = "(Global<const float> x, Global<float> y) { y.set(thread(), x[thread()]); }";
    assert_caught(&["race at global memory", "block (1, 0, 0)"], two, 32, 2, 0);
    let in_place = "(Global<const float> x, Global<float> y) { y.set(thread(), y[(thread() + 1) % 32]); }";
    assert_caught(&["race at global memory", "has read it"], in_place, 32, 1, 0);
    Ok(())
}

fn a_planted_access_out_of_bounds_is_caught() -> Outcome {
    let past = "(Global<const float> x, Global<float> y) { y.set(thread(), x[thread() + 225]); }";
    assert_caught(&["global memory byte 1027 of 1024", "thread 31"], past, 32, 1, 0);
    let before = "(Global<const float> x, Global<float> y) { y.set(i64(thread()) - 1, x[thread()]); }";
    assert_caught(&["global memory byte -4"], before, 32, 1, 0);
    let shared = "(Global<const float> x, Global<float> y) { shared<float>(0, 32).set(thread(), x[thread()]); }";
    assert_caught(&["element 32 is beyond its part"], shared, 64, 1, 512);
    Ok(())
}

fn a_planted_misaligned_access_is_caught() -> Outcome {
    let body = "(Global<const float> x, Global<float> y) { y.store<4>(4 * thread(), x.load<4>(4 * thread() + 1)); }";
    assert_caught(&["byte 4 is not aligned"], body, 32, 1, 0);
    Ok(())
}

fn a_planted_uninitialized_read_is_caught() -> Outcome {
    let body = "(Global<const float> x, Global<float> y) { y.set(thread(), shared<float>(0, 64)[thread()]); }";
    assert_caught(&["read before it is written"], body, 32, 1, 256);
    Ok(())
}

fn a_planted_missing_barrier_is_caught() -> Outcome {
    let body = "(Global<const float> x, Global<float> y) {
        const auto room = shared<float>(0, 64);
        for (u32 turn = 0; turn < 2; ++turn) {
            room.set(thread(), x[thread()]);
            barrier();
            y.set(64 * turn + thread(), room[63 - thread()]);
            MISSING
        }
    }";
    assert_caught(&["race of a", "there is no barrier between them"], &body.replace("MISSING", ""), 64, 1, 256);
    let x = normal(7, &[256]);
    let y = Tensor::zeros([256], (Kind::Float, Device::Cpu));
    run_kernel(&body.replace("MISSING", "barrier();"), 64, 1, 256, &[(&x).into(), (&y).into()])?;
    Ok(())
}

fn a_planted_divergent_barrier_is_caught() -> Outcome {
    let left_out = "(Global<const float> x, Global<float> y) { if (thread() < 40) barrier(); }";
    assert_caught(&["ended while others wait at a barrier"], left_out, 64, 1, 0);
    let two = "(Global<const float> x, Global<float> y) {
        if (thread() < 32) {
            barrier();
        } else {
            barrier();
        }
    }";
    assert_caught(&["waits at this barrier while others wait at line"], two, 64, 1, 0);
    Ok(())
}

fn a_planted_divergent_warp_is_caught() -> Outcome {
    let body =
        "(Global<const float> x, Global<float> y) { if (thread() != 5) y.set(thread(), warp_sum(x[thread()])); }";
    assert_caught(&["not every lane of the warp has reached"], body, 32, 1, 0);
    Ok(())
}

fn too_little_shared_memory_is_caught() -> Outcome {
    let body = "(Global<const float> x, Global<float> y) { shared<float>(0, 64).set(thread(), x[thread()]); }";
    assert_caught(&["256 bytes of shared memory are used, 128 were given"], body, 32, 1, 128);
    Ok(())
}

fn mismatched_arguments_are_caught() -> Outcome {
    let x = normal(8, &[4]);
    let error =
        run_kernel("(Global<const float> x, int n) {}", 32, 1, 0, &[(&x).into()]).expect_err("one argument of two");
    assert!(error.message.contains("takes 2 arguments, 1 were given"), "{error}");
    let error = run_kernel("(Global<const float> x) {}", 32, 1, 0, &[(&x.view([2, 2]).transpose(0, 1)).into()]);
    assert!(error.expect_err("turned").message.contains("wants contiguous tensors"));
    let error =
        run_kernel("(Global<const float> x) { nothing(); }", 32, 1, 0, &[(&x).into()]).expect_err("no such name");
    assert!(error.message.contains("nothing"), "{error}");
    Ok(())
}
