//! The contrastive loss (van den Oord et al., 2018, equation 4): each query is to find its own key among all keys.
//!
//! Queries are taken in strips, so that never more than one strip of logits exists. The products are the library's: with
//! a feature width of 512 and more a kernel of ours could not hold a row's gradient on chip and would compute every logit
//! several times over. Our kernels do what lies between the products, each in one pass over the strip. Everything is in
//! fp32; features in half precision enter the products as they are and are summed in fp32.

mod strips; // the same on a CPU, where the matrix is large

pub use strips::by_strips;

use super::launch::{Launch, Source, Variant, type_name};
use super::sizes;
use crate::bridge::{Forward, node};
use crate::fault::{Fault, Result};
use tch::{Kind, Tensor};

/// queries [B, D], keys [G, D] of one dtype, both normalised; `scale` [] multiplies their dot products; query i's own key
/// is key `offset` + i (a rank's place among all that were gathered) → the cross entropies' sum, fp32 [].
pub fn info_nce(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64) -> Result<Tensor> {
    if queries.device().is_cuda() && KINDS.contains(&queries.kind()) {
        return kernel(queries, keys, scale, offset, strip(keys));
    }
    check(queries, keys, offset)?;
    match strip(keys) {
        strip if strip < queries.size()[0] => by_strips(queries, keys, scale, offset, strip),
        _ => Ok(formula(queries, keys, scale, offset)),
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

/// Queries of a strip of 128 MB of logits.
fn strip(keys: &Tensor) -> i64 {
    ((1 << 25) / keys.size()[0].max(1)).max(1)
}

/// The same by our kernels, `strip` queries at a time.
pub fn kernel(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64, strip: i64) -> Result<Tensor> {
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
            let (losses, normals) = (part(&losses), part(&normals));
            let tensors = [&dots, &scale, &losses, &normals].map(Into::into);
            let numbers = [keys.size()[0], offset + begin].map(|n| (n as i32).into());
            launch("info_nce", queries.kind(), &dots).run(&[&tensors[..], &numbers].concat())?;
        }
        Ok(Forward { outputs: vec![losses.sum(Kind::Float)], saved: vec![queries, keys, scale, normals] })
    };
    let outputs = node(&[queries, keys, scale], forward, move |saved, gradients, wanted| {
        let [queries, keys, scale, normals] = saved else { unreachable!("four were saved") };
        let all = backward([queries, keys, scale, normals], &gradients[0].contiguous(), offset, strip, wanted[1])?;
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
    offset: i64,
    strip: i64,
    wants_keys: bool,
) -> Result<[Option<Tensor>; 3]> {
    let ([batch, _], [columns, _]) = (sizes(queries), sizes(keys));
    let parts = Tensor::empty([batch], (Kind::Float, queries.device()));
    let mut by_query = Vec::new();
    let mut by_key = wants_keys.then(|| Tensor::zeros(keys.size(), (Kind::Float, keys.device())));
    for (begin, rows) in strips(batch, strip) {
        let part = |of: &Tensor| of.narrow(0, begin, rows);
        let dots = product(&part(queries), &keys.transpose(0, 1));
        let slopes = Tensor::empty([rows, columns], (queries.kind(), queries.device()));
        let (normals, parts) = (part(normals), part(&parts));
        let tensors = [&dots, scale, &normals, upstream, &slopes, &parts].map(Into::into);
        let numbers = [columns, offset + begin].map(|n| (n as i32).into());
        launch("info_nce_backward", queries.kind(), &dots).run(&[&tensors[..], &numbers].concat())?;
        by_query.push(product(&slopes, keys));
        if let Some(by_key) = &mut by_key {
            *by_key += product(&slopes.transpose(0, 1), &part(queries));
        }
    }
    let by_query = Tensor::cat(&by_query, 0).to_kind(queries.kind());
    let by_key = by_key.map(|by_key| by_key.to_kind(keys.kind()));
    Ok([Some(by_query), by_key, Some(parts.sum(Kind::Float))])
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
