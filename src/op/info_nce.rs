//! The InfoNCE loss (van den Oord et al., 2018, equation 4): each query identifies its own key among all keys.
//!
//! Queries are processed in strips, so that only one strip of logits exists at a time: 128 MB on a GPU, 8 MB on a CPU,
//! plus their gradients in the features' dtype in backward, whatever the batch size; all logits of 65,536 queries and
//! keys would take 17 GB. Matrix products are the library's; the kernels do the steps between them, each in one pass
//! over the strip. A fused kernel would save the strip's 22 bytes per logit (written and read as fp32 in both passes,
//! its gradients written once and read twice), which at 4.3 TB/s take as long as the four products of 2·D operations at
//! 788 TFLOP/s for D = 512; but the gradient of a row of that width does not fit on chip beside the tiles, so that each
//! logit would be computed five times instead of twice. The whole loss, strips included, is about a hundredth of
//! FLIP-L's step (199 GFLOP per pair; 8·D·G per direction is 0.4 of them for D = 768 and G = 65,536). Everything is
//! computed in fp32; features in half precision enter the products as they are, and sums are in fp32.

use super::launch::{KernelSource, Launch, Variant, type_name};
use super::sizes;
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// queries [B, D], keys [G, D] of one dtype, both normalized; `scale` [] multiplies their dot products; the positive
/// key of query i is key `offset` + i, where `offset` is the first row of this rank → the sum of cross entropies, fp32
/// [].
pub fn info_nce(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64) -> Result<Tensor> {
    if !KINDS.contains(&queries.kind()) {
        check(queries, keys, offset)?;
        return Ok(formula(queries, keys, scale, offset));
    }
    if queries.device().is_cuda() {
        return kernel(queries, keys, scale, offset, strip_rows(keys, 1 << 25));
    }
    let strips = Strips { offset, rows: strip_rows(keys, 1 << 21), backend: StripBackend::Library };
    strips.apply(queries, keys, scale)
}

/// Sums both directions: this rank's images against the texts of all ranks, and its texts against all images.
pub fn symmetric_info_nce(
    [image, text]: [&Tensor; 2],
    [images, texts]: [&Tensor; 2],
    scale: &Tensor,
    offset: i64,
) -> Result<Tensor> {
    Ok(info_nce(image, texts, scale, offset)? + info_nce(text, images, scale, offset)?)
}

fn check(queries: &Tensor, keys: &Tensor, offset: i64) -> Result<()> {
    let [rows, width] = sizes(queries);
    let [columns, key_width] = sizes(keys);
    if width != key_width || offset < 0 || offset + rows > columns || columns > i64::from(i32::MAX) {
        return Err(Error::failed(format!(
            "info_nce: queries [{rows}, {width}] with positive keys from row {offset} of keys [{columns}, {key_width}]: \
             expected the same width and one positive key for each query"
        )));
    }
    Ok(())
}

/// The reference, in fp32, or in fp64 if the queries are.
pub fn formula(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64) -> Tensor {
    let kind = if queries.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let logits = queries.to_kind(kind).matmul(&keys.to_kind(kind).transpose(0, 1)) * scale.to_kind(kind);
    let positives = Tensor::arange_start(offset, offset + queries.size()[0], (Kind::Int64, queries.device()));
    let positives = positives.unsqueeze(1);
    (logits.logsumexp([1i64].as_slice(), true) - logits.gather(1, &positives, false)).sum(kind)
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "info_nce",
    embedded: include_str!("../../kernels/info_nce.cu"),
    variants: || KINDS.iter().flat_map(|kind| [1, 4].map(|columns| variant(*kind, columns))).collect(),
};

fn variant(kind: Kind, columns: i64) -> Variant {
    let vector_width = if columns % 4 == 0 { 4 } else { 1 };
    vec![("ELEMENT", type_name(kind).into()), ("WIDE", vector_width.to_string())]
}

/// Returns the queries of a strip of at most `max_logits` logits.
fn strip_rows(keys: &Tensor, max_logits: i64) -> i64 {
    (max_logits / keys.size()[0].max(1)).max(1)
}

/// The same by the kernels, `strip` queries at a time.
pub fn kernel(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64, strip: i64) -> Result<Tensor> {
    Strips { offset, rows: strip, backend: StripBackend::Kernels }.apply(queries, keys, scale)
}

/// How the loss is computed strip by strip.
#[derive(Clone, Copy)]
struct Strips {
    /// The positive key of the first query.
    offset: i64,
    /// Queries per strip.
    rows: i64,
    backend: StripBackend,
}

/// The tensors that the forward pass saves.
struct SavedForward<'a> {
    queries: &'a Tensor,
    keys: &'a Tensor,
    scale: &'a Tensor,
    normalizers: &'a Tensor,
}

impl Strips {
    fn apply(self, queries: &Tensor, keys: &Tensor, scale: &Tensor) -> Result<Tensor> {
        check(queries, keys, self.offset)?;
        let scale_size = scale.size();
        let scale_kind = scale.kind();
        let forward = |inputs: &[Tensor]| self.forward(&inputs[0], &inputs[1], &inputs[2]);
        let outputs = apply_function(&[queries, keys, scale], forward, move |saved, gradients, needed| {
            let [queries, keys, scale, normalizers] = saved else {
                unreachable!("the forward pass saves four tensors")
            };
            let saved = SavedForward { queries, keys, scale, normalizers };
            let [g_queries, g_keys, g_scale] = self.backward(&saved, &gradients[0].contiguous(), needed[1])?;
            let g_scale = g_scale.map(|g_scale| g_scale.to_kind(scale_kind).view(scale_size.as_slice()));
            Ok(needed.iter().zip([g_queries, g_keys, g_scale]).map(|(needed, g)| g.filter(|_| *needed)).collect())
        })?;
        Ok(outputs.into_iter().next().expect("one output"))
    }

    fn forward(self, queries: &Tensor, keys: &Tensor, scale: &Tensor) -> Result<ForwardOutput> {
        let queries = queries.contiguous();
        let keys = keys.contiguous();
        let scale = scale.to_kind(Kind::Float).contiguous();
        let batch = queries.size()[0];
        let losses = Tensor::empty([batch], (Kind::Float, queries.device()));
        let normalizers = Tensor::empty([batch], (Kind::Float, queries.device()));
        for (begin, rows) in self.ranges(batch) {
            let dots = product(&queries.narrow(0, begin, rows), &keys.transpose(0, 1));
            let strip = Strip { dots, scale: &scale, first: self.offset + begin, kind: queries.kind() };
            let losses = losses.narrow(0, begin, rows);
            self.backend.losses(&strip, &losses, &normalizers.narrow(0, begin, rows))?;
        }
        Ok(ForwardOutput { outputs: vec![losses.sum(Kind::Float)], saved: vec![queries, keys, scale, normalizers] })
    }

    /// Returns the gradients of queries, keys (if needed) and scale.
    fn backward(self, saved: &SavedForward, upstream: &Tensor, needs_keys: bool) -> Result<[Option<Tensor>; 3]> {
        let SavedForward { queries, keys, scale, normalizers } = saved;
        let batch = queries.size()[0];
        let g_scale_parts = Tensor::empty([batch], (Kind::Float, queries.device()));
        // Allocated before the strips: small tensors that outlive them would leave holes between their logits, which the
        // allocator cannot fill with the next strip's.
        let g_queries = Tensor::empty(queries.size(), (Kind::Float, queries.device()));
        let g_keys = needs_keys.then(|| keys.new_zeros(keys.size(), (Kind::Float, keys.device())));
        for (begin, rows) in self.ranges(batch) {
            let strip_queries = queries.narrow(0, begin, rows);
            let dots = product(&strip_queries, &keys.transpose(0, 1));
            let strip = Strip { dots, scale, first: self.offset + begin, kind: queries.kind() };
            let normalizers = normalizers.narrow(0, begin, rows);
            let g_scale_part = g_scale_parts.narrow(0, begin, rows);
            let g_dots = self.backend.gradients(strip, &normalizers, upstream, &g_scale_part)?;
            g_queries.narrow(0, begin, rows).copy_(&product(&g_dots, keys));
            if let Some(g_keys) = &g_keys {
                let _ = g_keys.shallow_clone().g_add_(&product(&g_dots.transpose(0, 1), &strip_queries));
            }
        }
        let g_queries = g_queries.to_kind(queries.kind());
        let g_keys = g_keys.map(|g_keys| g_keys.to_kind(keys.kind()));
        Ok([Some(g_queries), g_keys, Some(g_scale_parts.sum(Kind::Float))])
    }

    /// Returns begin and length of each strip of `batch` queries.
    fn ranges(self, batch: i64) -> impl Iterator<Item = (i64, i64)> {
        (0..batch).step_by(self.rows as usize).map(move |begin| (begin, self.rows.min(batch - begin)))
    }
}

/// One strip of logits.
struct Strip<'a> {
    /// Dot products of queries and keys, fp32 [rows, G].
    dots: Tensor,
    scale: &'a Tensor,
    /// The positive key of row r is column `first` + r.
    first: i64,
    /// Dtype of the features.
    kind: Kind,
}

/// The implementation of the steps between the matrix products.
#[derive(Clone, Copy)]
enum StripBackend {
    Kernels,
    Library,
}

impl StripBackend {
    /// Writes the losses and the log-sum-exps of logits, fp32 [rows].
    fn losses(self, strip: &Strip, losses: &Tensor, normalizers: &Tensor) -> Result<()> {
        let Strip { dots, scale, first, kind } = strip;
        match self {
            StripBackend::Kernels => launch("info_nce", *kind, dots).run(&[
                dots.into(),
                (*scale).into(),
                losses.into(),
                normalizers.into(),
                (dots.size()[1] as i32).into(),
                (*first as i32).into(),
            ]),
            StripBackend::Library => {
                let logits = dots * *scale;
                normalizers.shallow_clone().copy_(&logits.logsumexp([1i64].as_slice(), false));
                losses.shallow_clone().copy_(&(normalizers - logits.diagonal(*first, 0, 1)));
                Ok(())
            }
        }
    }

    /// Returns the gradient of the dot products, [rows, G] in the dtype of the features, given the log-sum-exps and the
    /// gradient of the loss, and writes each row's gradient of the scale.
    fn gradients(self, strip: Strip, normalizers: &Tensor, upstream: &Tensor, g_scale: &Tensor) -> Result<Tensor> {
        let Strip { dots, scale, first, kind } = strip;
        match self {
            StripBackend::Kernels => {
                let g_dots = Tensor::empty(dots.size(), (kind, dots.device()));
                launch("info_nce_backward", kind, &dots).run(&[
                    (&dots).into(),
                    scale.into(),
                    normalizers.into(),
                    upstream.into(),
                    (&g_dots).into(),
                    g_scale.into(),
                    (dots.size()[1] as i32).into(),
                    (first as i32).into(),
                ])?;
                Ok(g_dots)
            }
            StripBackend::Library => {
                let mut g_dots = (&dots * scale - normalizers.unsqueeze(1)).exp_();
                let _ = g_dots.diagonal(first, 0, 1).g_sub_scalar_(1.0);
                let _ = g_dots.g_mul_(upstream);
                g_scale.shallow_clone().copy_(&(dots * &g_dots).sum_dim_intlist([1i64].as_slice(), false, None));
                Ok(g_dots.g_mul_(scale).to_kind(kind))
            }
        }
    }
}

fn launch(entry: &'static str, kind: Kind, dots: &Tensor) -> Launch<'static> {
    let [rows, columns] = sizes(dots);
    let variant = variant(kind, columns);
    Launch { source: &SOURCE, variant, entry, grid: [rows as u32, 1, 1], threads: 256, shared_bytes: 8 * 4 }
}

/// Returns a · b in fp32, whatever the dtype of a and b.
fn product(a: &Tensor, b: &Tensor) -> Tensor {
    if a.device().is_cuda() && a.kind() != Kind::Float {
        a.mm_dtype(b, Kind::Float)
    } else {
        a.to_kind(Kind::Float).mm(&b.to_kind(Kind::Float))
    }
}
