//! Line charts as SVG text. Text and grid lines have placeholder colors, which the page's style sheet replaces for
//! light and dark mode.

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// Drawing style of a series.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LineStyle {
    /// A faint line, for raw values.
    Thin,
    Thick,
    /// A line with a dot at every point, for few values.
    Dots,
}

/// One line of a chart.
pub struct Series {
    /// Points in ascending order of x. A y that is not finite is a gap.
    pub points: Vec<(f64, f64)>,
    /// Index of its color in [`PALETTE`], which repeats.
    pub color: usize,
    pub style: LineStyle,
}

/// Colors of the series: of medium lightness, so that they are visible on white and on near-black, and distinguishable
/// for color-blind readers.
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

/// Placeholder that `style.css` replaces by the page's text color.
const INK: RGBColor = RGBColor(1, 1, 1);
/// Placeholder that `style.css` replaces by the page's color of thin lines.
const HAIRLINE: RGBColor = RGBColor(2, 2, 2);

/// Minimum number of points for which a moving average is drawn.
pub const MIN_POINTS_TO_SMOOTH: usize = 20;
/// Maximum number of points of a series in a chart.
const MAX_POINTS: usize = 2000;

/// Reduces a series to at most 2,000 points: the minimum and the maximum of each of 1,000 sections, so that no spike is
/// lost.
pub fn downsample(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let sections = MAX_POINTS / 2;
    let section = |index: usize| &points[index * points.len() / sections..(index + 1) * points.len() / sections];
    (0..sections).flat_map(|index| extremes(section(index))).collect()
}

/// Returns the points with the lowest and the highest finite y, in order of x.
fn extremes(points: &[(f64, f64)]) -> [(f64, f64); 2] {
    let finite = || (0..points.len()).filter(|&index| points[index].1.is_finite());
    let low = finite().min_by(|&a, &b| points[a].1.total_cmp(&points[b].1)).unwrap_or(0);
    let high = finite().max_by(|&a, &b| points[a].1.total_cmp(&points[b].1)).unwrap_or(0);
    [points[low.min(high)], points[low.max(high)]]
}

/// Computes a centered moving average over finite values. The window reaches to either side by 1 % of the points, at
/// least 2, and is narrower at the ends, so that the average has no lag.
pub fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let max_reach = (points.len() / 100).max(2);
    // Prefix sums: the sum and the count of a window are two differences.
    let mut prefix = vec![(0.0, 0u32)];
    for &(_, y) in points {
        let (sum, count) = prefix[prefix.len() - 1];
        prefix.push(if y.is_finite() { (sum + y, count + 1) } else { (sum, count) });
    }
    let mean = |index: usize| {
        let reach = max_reach.min(index).min(points.len() - 1 - index);
        let low = prefix[index - reach];
        let high = prefix[index + reach + 1];
        (high.0 - low.0) / f64::from(high.1 - low.1)
    };
    points.iter().enumerate().map(|(index, &(x, _))| (x, mean(index))).collect()
}

/// Size of a chart in pixels: twice the displayed size, because the backend draws at whole pixels, which would be
/// visible as steps.
const SIZE: (u32, u32) = (1520, 520);

/// Draws the series as an SVG. If `from_zero` is set, the y axis begins at zero. A spike (the highest 0.5 % of the
/// values, where they are far above the rest) is cut off at the upper edge, so that it does not flatten the curve.
pub fn line_chart(series: &[Series], from_zero: bool) -> String {
    let x = x_range(series);
    let y = y_range(series, from_zero);
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    draw(&root, series, x, y).expect("drawing an SVG in memory does not fail");
    drop(root);
    svg
}

type AxisRange = std::ops::Range<f64>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type DrawResult = Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn draw(root: &Area, series: &[Series], x: AxisRange, y: AxisRange) -> DrawResult {
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
        .x_label_formatter(&|value| format_tick(*value))
        .y_label_formatter(&|value| format_tick(*value))
        .draw()?;
    // Thick lines come last, so that they are above every thin one.
    let (thin, thick): (Vec<&Series>, Vec<&Series>) = series.iter().partition(|series| series.style == LineStyle::Thin);
    thin.into_iter().chain(thick).try_for_each(|series| draw_series(&mut chart, series, &y))?;
    root.present()
}

fn draw_series(chart: &mut Chart, series: &Series, y: &AxisRange) -> DrawResult {
    let color = PALETTE[series.color % PALETTE.len()];
    let style = match series.style {
        LineStyle::Thin => color.mix(0.35).stroke_width(2),
        LineStyle::Thick | LineStyle::Dots => color.stroke_width(4),
    };
    for segment in series.points.split(|point| !point.1.is_finite()).filter(|segment| !segment.is_empty()) {
        let clamped: Vec<_> = segment.iter().map(|point| (point.0, point.1.clamp(y.start, y.end))).collect();
        // A single point between gaps makes no line, so it is drawn as a dot.
        if series.style == LineStyle::Dots || clamped.len() == 1 {
            chart.draw_series(clamped.iter().map(|&point| Circle::new(point, 7, color.filled())))?;
        }
        chart.draw_series(LineSeries::new(clamped, style))?;
    }
    Ok(())
}

fn x_range(series: &[Series]) -> AxisRange {
    let points = series.iter().flat_map(|series| &series.points);
    let (low, high) = points.fold((f64::MAX, f64::MIN), |(low, high), point| (low.min(point.0), high.max(point.0)));
    if low > high { with_margin(0.0, 1.0, 0.0) } else { with_margin(low, high, 0.0) }
}

fn y_range(series: &[Series], from_zero: bool) -> AxisRange {
    let points = series.iter().flat_map(|series| &series.points);
    let mut values: Vec<f64> = points.map(|point| point.1).filter(|y| y.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = match values.as_slice() {
        [] => (0.0, 1.0),
        values => (values[0], values[values.len() - 1]),
    };
    let low = if from_zero { low.min(0.0) } else { low };
    let percentile = (values.len() * 199).div_ceil(200).saturating_sub(1);
    let usual = values.get(percentile).copied().unwrap_or(high);
    let high = if high - low > 3.0 * (usual - low) && usual > low { usual } else { high };
    let mut range = with_margin(low, high, 0.05);
    if from_zero && low == 0.0 {
        range.start = 0.0;
    }
    range
}

/// Widens a range by `margin` times its length at both ends. A range of length zero is widened by a little.
fn with_margin(low: f64, high: f64, margin: f64) -> AxisRange {
    let margin = if high > low { (high - low) * margin } else { (low.abs() * 0.05).max(1e-9) };
    (low - margin)..(high + margin)
}

/// Formats an axis label: `0`, `0.75`, `12`, `20k`, `1.5e-4`.
fn format_tick(value: f64) -> String {
    match value.abs() {
        size if size < 1e-12 => "0".into(),
        size if size >= 1e9 => format!("{value:.1e}"),
        size if size >= 1e6 => format!("{}M", without_trailing_zeros(value / 1e6, 2)),
        size if size >= 1e4 => format!("{}k", without_trailing_zeros(value / 1e3, 1)),
        size if size < 1e-2 => format!("{value:.1e}").replace(".0e", "e"),
        size => without_trailing_zeros(value, if size < 1.0 { 3 } else { 2 }),
    }
}

fn without_trailing_zeros(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}
