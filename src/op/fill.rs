//! A transformer's input: class token, visible tokens, mask tokens and positions in one sequence.

use super::launch::{Argument, Launch, Source, blocks, by_width, wide};
use super::{fold, patch::gather, sizes};
use crate::bridge::{Forward, node};
use crate::fault::Result;
use tch::{Kind, Tensor};

/// Which tokens stand where.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// [N, D], fixed: no gradient reaches it. The class token has none.
    pub positions: &'a Tensor,
    /// int64 [B, K]: the places of the visible tokens.
    pub keep: &'a Tensor,
    /// The mask token [D], and int64 [B, M]: the places where it stands. None where nothing is filled in.
    pub hidden: Option<(&'a Tensor, &'a Tensor)>,
}

impl Places<'_> {
    fn dropped(&self) -> i64 {
        self.hidden.map_or(0, |(_, drop)| drop.size()[1])
    }
}

/// seen [B, K, D] and the class token [D], or seen [B, 1+K, D] with the class tokens first → [B, 1+K+M, D]: class,
/// visible, hidden; seen [B, K, D] and no class token → [B, K+M, D]. Attention does not know order, so nothing is unshuffled: every token carries the position that it
/// stands for. On a GPU in one pass, positions added in fp32.
pub fn fill(seen: &Tensor, class: Option<&Tensor>, places: Places) -> Result<Tensor> {
    if seen.device().is_cuda() && KINDS.contains(&seen.kind()) {
        return kernel(seen, class, places);
    }
    Ok(formula(seen, class, places))
}

/// The reference; positions are rounded to the kind of what they are added to.
pub fn formula(seen: &Tensor, class: Option<&Tensor>, places: Places) -> Tensor {
    let ([batch, _, width], kept) = (sizes(seen), places.keep.size()[1]);
    let positions = places.positions.to_kind(seen.kind());
    let at = positions.unsqueeze(0).expand([batch, positions.size()[0], width], false);
    let front = seen.size()[1] - kept;
    let (class, visible) = match class {
        Some(class) => (class.view([1, 1, width]).expand([batch, 1, width], false), seen.shallow_clone()),
        None => (seen.narrow(1, 0, front), seen.narrow(1, front, kept)),
    };
    let visible = visible + gather(&at, places.keep);
    let hidden = places.hidden.map(|(token, drop)| gather(&at, drop) + token);
    Tensor::cat(&[class, visible].into_iter().chain(hidden).collect::<Vec<_>>(), 1)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

pub const SOURCE: Source = Source {
    name: "fill",
    built_in: include_str!("../../kernels/fill.cu"),
    variants: || KINDS.iter().flat_map(|&kind| [1, 8].map(|width| by_width(kind, width))).collect(),
};

/// How many rows there are of what.
#[derive(Clone, Copy)]
struct Shape {
    batch: i64,
    width: i64,
    kept: i64,
    hidden: i64,
    /// Class tokens: one or none.
    front: i64,
    /// They ride in front of what was seen.
    rides: bool,
}

impl Shape {
    fn seen(&self) -> [i64; 3] {
        [self.batch, self.kept + i64::from(self.rides), self.width]
    }

    fn all(&self) -> [i64; 3] {
        [self.batch, self.front + self.kept + self.hidden, self.width]
    }

    fn launch(&self, entry: &'static str, kind: Kind, of_block: i64, shared: usize) -> Launch<'static> {
        let columns = blocks(self.width, 32 * wide(kind, self.width));
        let grid = [blocks(self.batch * self.all()[1], of_block), columns, 1];
        Launch { source: &SOURCE, variant: by_width(kind, self.width), entry, grid, threads: 256, shared }
    }

    fn numbers(&self) -> [Argument<'static>; 5] {
        [self.batch * self.all()[1], self.width, self.kept, self.hidden, self.front].map(|n| (n as i32).into())
    }
}

/// The same by our kernels; tokens are made contiguous.
pub fn kernel(seen: &Tensor, class: Option<&Tensor>, places: Places) -> Result<Tensor> {
    let [batch, tokens, width] = sizes(seen);
    let [kept, hidden] = [places.keep.size()[1], places.dropped()];
    let (front, rides) = if class.is_some() { (1, false) } else { (tokens - kept, tokens > kept) };
    let shape = Shape { batch, width, kept, hidden, front, rides };
    let token = places.hidden.map(|(token, _)| token);
    let inputs: Vec<&Tensor> = std::iter::once(seen).chain(class).chain(token).collect();
    let positions = places.positions.to_kind(Kind::Float).contiguous();
    let [keep, drop] = [Some(places.keep), places.hidden.map(|(_, drop)| drop)].map(|i| i.map(Tensor::contiguous));
    let run = |given: &[Tensor]| {
        let given: Vec<Tensor> = given.iter().map(Tensor::contiguous).collect();
        let class = class.map(|_| &given[1]);
        let token = token.and(given.last());
        let out = Tensor::empty(shape.all(), (seen.kind(), seen.device()));
        let tensors =
            [Argument::from(&given[0]), class.into(), token.into(), (&positions).into(), keep.as_ref().into()];
        let more = [drop.as_ref().into(), (&out).into()];
        let of_block = 32i64;
        let launch = shape.launch("fill", seen.kind(), of_block, 0);
        launch.run(&[&tensors[..], &more, &shape.numbers(), &[(of_block as i32).into()]].concat())?;
        Ok(Forward { outputs: vec![out], saved: vec![] })
    };
    let (has_class, has_token) = (class.is_some(), token.is_some());
    let outputs = node(&inputs, run, move |_, gradients, wanted| {
        let (seen, [of_token, of_class]) = backward(&gradients[0].contiguous(), shape, wanted)?;
        let class = has_class.then_some(of_class).into_iter();
        let all = std::iter::once(seen).chain(class).chain(has_token.then_some(of_token));
        Ok(all.zip(wanted).map(|(gradient, wanted)| gradient.filter(|_| *wanted)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}

/// The gradients of seen, and of the mask and the class token [D].
fn backward(gy: &Tensor, shape: Shape, wanted: &[bool]) -> Result<(Option<Tensor>, [Option<Tensor>; 2])> {
    if (shape.rides || shape.front == 0) && shape.hidden == 0 {
        return Ok((Some(gy.shallow_clone()), [None, None])); // Positions were added, no more.
    }
    let of_block = 64i64;
    let seen = wanted[0].then(|| Tensor::empty(shape.seen(), (gy.kind(), gy.device())));
    let wide = wide(gy.kind(), shape.width) as usize;
    let launch = shape.launch("fill_backward", gy.kind(), of_block, 4 * 8 * 32 * wide);
    let runs = i64::from(launch.grid[0]);
    let vectors = wanted[1..].contains(&true);
    let parts = vectors.then(|| Tensor::empty([runs, 2 * shape.width], (Kind::Float, gy.device())));
    let tensors = [gy.into(), seen.as_ref().into(), parts.as_ref().into()];
    let last = [i32::from(shape.rides), of_block as i32].map(Argument::from);
    launch.run(&[&tensors[..], &shape.numbers(), &last].concat())?;
    let Some(parts) = parts else { return Ok((seen, [None, None])) };
    let both = fold::kernel(&parts, gy.kind())?;
    Ok((seen, [0, 1].map(|i| Some(both.narrow(0, i * shape.width, shape.width)))))
}
