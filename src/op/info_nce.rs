//! The contrastive loss (van den Oord et al., 2018, equation 4): each query is to find its own key among all keys.
//!
//! Queries are taken in strips, so that never more than one strip of logits exists: 128 MB of them on a GPU, 8 MB on a CPU,
//! with the slopes in the features' dtype beside them in backward, whatever the batch; of 65,536 queries and keys all
//! logits would take 17 GB. The products are the library's; our kernels do what lies between them, each in one pass over the
//! strip. Tiles of our own that never leave the chip would spare the strip's 22 bytes a logit (written and read as fp32 in
//! both passes, as slopes written once and read twice), which at 4.3 TB/s is as long as the four products of 2·D
//! operations take at 788 TFLOP/s for D = 512; but a row's gradient of that width does not fit beside the tiles, so that
//! each logit would be computed five times instead of twice. And the whole loss, strips and all, is about a hundredth of
//! FLIP-L's step (199 GFLOP a pair; 8·D·G a direction is 0.4 of them at D = 768 and G = 65,536). Everything is in fp32;
//! features in half precision enter the products as they are and are summed in fp32.

use super::launch::{Launch, Source, Variant, type_name};
use super::sizes;
use crate::bridge::{Forward, node};
use crate::fault::{Fault, Result};
use tch::{Kind, Tensor};

/// queries [B, D], keys [G, D] of one dtype, both normalised; `scale` [] multiplies their dot products; query i's own key
/// is key `offset` + i (a rank's place among all that were gathered) → the cross entropies' sum, fp32 [].
pub fn info_nce(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64) -> Result<Tensor> {
    match (queries.device().is_cuda(), KINDS.contains(&queries.kind())) {
        (_, false) => check(queries, keys, offset).map(|()| formula(queries, keys, scale, offset)),
        (true, _) => kernel(queries, keys, scale, offset, strip(keys, 1 << 25)),
        (false, _) => in_strips(queries, keys, scale, offset, strip(keys, 1 << 21), By::Library),
    }
}

/// Both directions, summed: this rank's images against the texts of all ranks, its texts against all images.
pub fn symmetric(
    [image, text]: [&Tensor; 2],
    [images, texts]: [&Tensor; 2],
    scale: &Tensor,
    offset: i64,
) -> Result<Tensor> {
    Ok(info_nce(image, texts, scale, offset)? + info_nce(text, images, scale, offset)?)
}

fn check(queries: &Tensor, keys: &Tensor, offset: i64) -> Result<()> {
    let ([rows, width], [columns, of_keys]) = (sizes(queries), sizes(keys));
    if width != of_keys || offset < 0 || offset + rows > columns || columns > i64::from(i32::MAX) {
        return Err(Fault::failed(format!(
            "a contrastive loss of queries [{rows}, {width}] whose own keys begin at {offset} of [{columns}, {of_keys}]: \
             one width and a key for each query are wanted"
        )));
    }
    Ok(())
}

/// The reference, in fp32, or fp64 where the queries are.
pub fn formula(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64) -> Tensor {
    let kind = if queries.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let logits = queries.to_kind(kind).matmul(&keys.to_kind(kind).transpose(0, 1)) * scale.to_kind(kind);
    let own = Tensor::arange_start(offset, offset + queries.size()[0], (Kind::Int64, queries.device())).unsqueeze(1);
    (logits.logsumexp([1i64].as_slice(), true) - logits.gather(1, &own, false)).sum(kind)
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

pub const SOURCE: Source = Source {
    name: "info_nce",
    built_in: include_str!("../../kernels/info_nce.cu"),
    variants: || KINDS.iter().flat_map(|kind| [1, 4].map(|columns| variant(*kind, columns))).collect(),
};

fn variant(kind: Kind, columns: i64) -> Variant {
    let wide = if columns % 4 == 0 { 4 } else { 1 };
    vec![("ELEMENT", type_name(kind).into()), ("WIDE", wide.to_string())]
}

/// Queries of a strip of so many logits.
fn strip(keys: &Tensor, logits: i64) -> i64 {
    (logits / keys.size()[0].max(1)).max(1)
}

/// What does the work between the products.
#[derive(Clone, Copy)]
enum By {
    Kernels,
    Library,
}

/// The same by our kernels, `strip` queries at a time.
pub fn kernel(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64, strip: i64) -> Result<Tensor> {
    in_strips(queries, keys, scale, offset, strip, By::Kernels)
}

fn in_strips(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64, strip: i64, by: By) -> Result<Tensor> {
    check(queries, keys, offset)?;
    let shape = scale.size();
    let scale_kind = scale.kind();
    let forward = |given: &[Tensor]| {
        let (queries, keys) = (given[0].contiguous(), given[1].contiguous());
        let scale = given[2].to_kind(Kind::Float).contiguous();
        let empty = || Tensor::empty([queries.size()[0]], (Kind::Float, queries.device()));
        let (losses, normals) = (empty(), empty());
        for (begin, rows) in strips(queries.size()[0], strip) {
            let part = |of: &Tensor| of.narrow(0, begin, rows);
            let dots = product(&part(&queries), &keys.transpose(0, 1));
            by.losses(&dots, &scale, offset + begin, queries.kind(), [&part(&losses), &part(&normals)])?;
        }
        Ok(Forward { outputs: vec![losses.sum(Kind::Float)], saved: vec![queries, keys, scale, normals] })
    };
    let outputs = node(&[queries, keys, scale], forward, move |saved, gradients, wanted| {
        let [queries, keys, scale, normals] = saved else { unreachable!("four were saved") };
        let upstream = gradients[0].contiguous();
        let all = backward([queries, keys, scale, normals], &upstream, (offset, strip, by), wanted[1])?;
        let [by_query, by_key, by_scale] = all;
        let by_scale = by_scale.map(|by_scale| by_scale.to_kind(scale_kind).view(shape.as_slice()));
        Ok(wanted.iter().zip([by_query, by_key, by_scale]).map(|(wanted, g)| g.filter(|_| *wanted)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}

/// Gradients of queries, keys (where they are wanted) and scale.
fn backward(
    [queries, keys, scale, normals]: [&Tensor; 4],
    upstream: &Tensor,
    (offset, strip, by): (i64, i64, By),
    wants_keys: bool,
) -> Result<[Option<Tensor>; 3]> {
    let batch = queries.size()[0];
    let parts = Tensor::empty([batch], (Kind::Float, queries.device()));
    let (mut by_query, mut by_key) = (Vec::new(), None::<Tensor>);
    for (begin, rows) in strips(batch, strip) {
        let part = |of: &Tensor| of.narrow(0, begin, rows);
        let dots = product(&part(queries), &keys.transpose(0, 1));
        let given = [scale, &part(normals), upstream];
        let slopes = by.slopes(dots, given, offset + begin, queries.kind(), &part(&parts))?;
        by_query.push(product(&slopes, keys));
        if wants_keys {
            let share = product(&slopes.transpose(0, 1), &part(queries));
            by_key = Some(by_key.map_or_else(|| share.shallow_clone(), |mut sum| sum.g_add_(&share)));
        }
    }
    let by_query = Tensor::cat(&by_query, 0).to_kind(queries.kind());
    let by_key = by_key.map(|by_key| by_key.to_kind(keys.kind()));
    Ok([Some(by_query), by_key, Some(parts.sum(Kind::Float))])
}

impl By {
    /// Of dots [rows, G], row r's own key being column first + r, → losses and log-sum-exps of logits, fp32 [rows].
    fn losses(self, dots: &Tensor, scale: &Tensor, first: i64, kind: Kind, into: [&Tensor; 2]) -> Result<()> {
        let [losses, normals] = into;
        match self {
            By::Kernels => {
                let tensors = [dots, scale, losses, normals].map(Into::into);
                let numbers = [dots.size()[1], first].map(|n| (n as i32).into());
                launch("info_nce", kind, dots).run(&[&tensors[..], &numbers].concat())
            }
            By::Library => {
                let logits = dots * scale;
                normals.shallow_clone().copy_(&logits.logsumexp([1i64].as_slice(), false));
                losses.shallow_clone().copy_(&(normals - logits.diagonal(first, 0, 1)));
                Ok(())
            }
        }
    }

    /// Given scale, log-sum-exps and the loss's gradient → the slope by each of dots, [rows, G] in `kind`, and that by the
    /// scale, of each row.
    fn slopes(
        self,
        dots: Tensor,
        [scale, normals, upstream]: [&Tensor; 3],
        first: i64,
        kind: Kind,
        by_scale: &Tensor,
    ) -> Result<Tensor> {
        match self {
            By::Kernels => {
                let slopes = Tensor::empty(dots.size(), (kind, dots.device()));
                let tensors = [&dots, scale, normals, upstream, &slopes, by_scale].map(Into::into);
                let numbers = [dots.size()[1], first].map(|n| (n as i32).into());
                launch("info_nce_backward", kind, &dots).run(&[&tensors[..], &numbers].concat())?;
                Ok(slopes)
            }
            By::Library => {
                let mut slopes = (&dots * scale - normals.unsqueeze(1)).exp_();
                let _ = slopes.diagonal(first, 0, 1).g_sub_scalar_(1.0);
                let _ = slopes.g_mul_(upstream);
                by_scale.shallow_clone().copy_(&(dots * &slopes).sum_dim_intlist([1i64].as_slice(), false, None));
                Ok(slopes.g_mul_(scale).to_kind(kind))
            }
        }
    }
}

fn launch(entry: &'static str, kind: Kind, dots: &Tensor) -> Launch<'static> {
    let [rows, columns] = sizes(dots);
    let variant = variant(kind, columns);
    Launch { source: &SOURCE, variant, entry, grid: [rows as u32, 1, 1], threads: 256, shared: 8 * 4 }
}

/// Begin and length of each strip.
fn strips(rows: i64, strip: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..rows).step_by(strip as usize).map(move |begin| (begin, strip.min(rows - begin)))
}

/// a · b in fp32, whatever they are in.
fn product(a: &Tensor, b: &Tensor) -> Tensor {
    match a.device().is_cuda() && a.kind() != Kind::Float {
        true => a.mm_dtype(b, Kind::Float),
        false => a.to_kind(Kind::Float).mm(&b.to_kind(Kind::Float)),
    }
}
