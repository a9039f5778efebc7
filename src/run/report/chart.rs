//! Curves as SVG text, in colours that the page's styles turn for light and dark.

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// How a curve is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pen {
    /// A faint line: every reading.
    Thin,
    Thick,
    /// A line with a dot at every point: few readings.
    Dots,
}

/// One curve of a chart.
pub struct Curve {
    /// In rising order of x. A y that is not finite is a gap.
    pub points: Vec<(f64, f64)>,
    /// Its place in [`PALETTE`], which begins anew at the end.
    pub colour: usize,
    pub pen: Pen,
}

/// Curves' colours, mid-toned so that they stand on white and on near-black, and apart for colour-blind eyes.
pub const PALETTE: [RGBColor; 8] = [
    RGBColor(0x3b, 0x7d, 0xd8),
    RGBColor(0xd9, 0x72, 0x2e),
    RGBColor(0x2e, 0x9e, 0x6b),
    RGBColor(0xb5, 0x50, 0x8f),
    RGBColor(0xb8, 0x92, 0x1e),
    RGBColor(0x4f, 0xa3, 0xb8),
    RGBColor(0x8f, 0x6b, 0x4a),
    RGBColor(0x80, 0x80, 0x88),
];

/// Stand-ins that `style.css` replaces by the page's ink and its hairlines.
const INK: RGBColor = RGBColor(1, 1, 1);
const HAIRLINE: RGBColor = RGBColor(2, 2, 2);

/// A curve of fewer points is not smoothed.
pub const SMOOTHED_FROM: usize = 20;
/// A chart holds no more points of a curve than this.
const MOST: usize = 2000;

/// At most 2,000 of the points: of each stretch the lowest and the highest, so that no spike is lost.
pub fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST {
        return points.to_vec();
    }
    let stretches = MOST / 2;
    let stretch = |number: usize| &points[number * points.len() / stretches..(number + 1) * points.len() / stretches];
    let ends = |stretch: &[(f64, f64)]| -> [(f64, f64); 2] {
        let finite = || (0..stretch.len()).filter(|&at| stretch[at].1.is_finite());
        let low = finite().min_by(|&a, &b| stretch[a].1.total_cmp(&stretch[b].1)).unwrap_or(0);
        let high = finite().max_by(|&a, &b| stretch[a].1.total_cmp(&stretch[b].1)).unwrap_or(0);
        [stretch[low.min(high)], stretch[low.max(high)]]
    };
    (0..stretches).flat_map(|number| ends(stretch(number))).collect()
}

/// Each point replaced by the mean of its finite neighbours, 1 % of the points and at least 2 to either side: no lag.
pub fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = (points.len() / 100).max(2);
    // Sums of all before: (sum, count) of a window are two differences.
    let mut before = vec![(0.0, 0u32)];
    for &(_, y) in points {
        let (sum, count) = before[before.len() - 1];
        before.push(if y.is_finite() { (sum + y, count + 1) } else { (sum, count) });
    }
    let mean = |at: usize| {
        let reach = reach.min(at).min(points.len() - 1 - at);
        let (low, high) = (before[at - reach], before[at + reach + 1]);
        (high.0 - low.0) / f64::from(high.1 - low.1)
    };
    points.iter().enumerate().map(|(at, &(x, _))| (x, mean(at))).collect()
}

/// Twice the size at which it is shown: the backend draws at whole pixels, which would show as steps.
const SIZE: (u32, u32) = (1520, 520);

/// An SVG of the curves. The y axis begins at zero where asked. Where the highest reading in 200 towers over the rest it
/// is cut off at the upper edge, so that a spike does not flatten the curve.
pub fn lines(curves: &[Curve], from_zero: bool) -> String {
    let (x, y) = ranges(curves, from_zero);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    draw(&root, curves, x, y).expect("an SVG in memory takes every element");
    drop(root);
    svg
}

type Range = std::ops::Range<f64>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn draw(root: &Area, curves: &[Curve], x: Range, y: Range) -> Drawn {
    let mut chart = ChartBuilder::on(root)
        .margin(16)
        .margin_right(32)
        .x_label_area_size(52)
        .y_label_area_size(116)
        .build_cartesian_2d(x, y.clone())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(HAIRLINE.stroke_width(2))
        .axis_style(HAIRLINE.stroke_width(2))
        .label_style(("sans-serif", 30).into_font().color(&INK))
        .x_labels(7)
        .y_labels(5)
        .x_label_formatter(&|value| tick(*value))
        .y_label_formatter(&|value| tick(*value))
        .draw()?;
    // Thick lines last, over every thin one.
    let (thin, thick): (Vec<&Curve>, Vec<&Curve>) = curves.iter().partition(|curve| curve.pen == Pen::Thin);
    thin.into_iter().chain(thick).try_for_each(|curve| trace(&mut chart, curve, &y))?;
    root.present()
}

fn trace(chart: &mut Chart, curve: &Curve, y: &Range) -> Drawn {
    let colour = PALETTE[curve.colour % PALETTE.len()];
    let style = match curve.pen {
        Pen::Thin => colour.mix(0.35).stroke_width(2),
        Pen::Thick | Pen::Dots => colour.stroke_width(4),
    };
    for whole in curve.points.split(|point| !point.1.is_finite()).filter(|whole| !whole.is_empty()) {
        let inside: Vec<_> = whole.iter().map(|point| (point.0, point.1.clamp(y.start, y.end))).collect();
        // A lone point between gaps has no line: it shows as a dot.
        if curve.pen == Pen::Dots || inside.len() == 1 {
            chart.draw_series(inside.iter().map(|&point| Circle::new(point, 7, colour.filled())))?;
        }
        chart.draw_series(LineSeries::new(inside, style))?;
    }
    Ok(())
}

fn ranges(curves: &[Curve], from_zero: bool) -> (Range, Range) {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let mut ys: Vec<f64> = points().map(|point| point.1).filter(|y| y.is_finite()).collect();
    ys.sort_by(f64::total_cmp);
    let (low, high) = match ys.as_slice() {
        [] => (0.0, 1.0),
        ys => (ys[0], ys[ys.len() - 1]),
    };
    let low = if from_zero { low.min(0.0) } else { low };
    let usual = ys.get((ys.len() * 199).div_ceil(200).saturating_sub(1)).copied().unwrap_or(high);
    let high = if high - low > 3.0 * (usual - low) && usual > low { usual } else { high };
    let x = points().fold((f64::MAX, f64::MIN), |(low, high), point| (low.min(point.0), high.max(point.0)));
    let x = if x.0 > x.1 { (0.0, 1.0) } else { x };
    let roomy = |(low, high): (f64, f64), share: f64| {
        let air = if high > low { (high - low) * share } else { (low.abs() * 0.05).max(1e-9) };
        (low - air)..(high + air)
    };
    let mut y = roomy((low, high), 0.05);
    if from_zero && low == 0.0 {
        y.start = 0.0;
    }
    (roomy(x, 0.0).start..roomy(x, 0.0).end, y)
}

/// An axis label: `0`, `0.75`, `12`, `20k`, `1.5e-4`.
fn tick(value: f64) -> String {
    let size = value.abs();
    let short = |value: f64, digits: usize| {
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    };
    match size {
        _ if size < 1e-12 => "0".into(),
        _ if size >= 1e9 => format!("{value:.1e}"),
        _ if size >= 1e6 => format!("{}M", short(value / 1e6, 2)),
        _ if size >= 1e4 => format!("{}k", short(value / 1e3, 1)),
        _ if size < 1e-2 => {
            let text = format!("{value:.1e}");
            text.replace(".0e", "e")
        }
        _ => short(value, if size < 1.0 { 3 } else { 2 }),
    }
}
