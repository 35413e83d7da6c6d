//! Draws charts as SVG or PNG: lines, dots and error bars on linear or logarithmic axes.

use std::ops::Range;
use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::register_font;

/// Width and height, pixels.
const SIZE: (u32, u32) = (900, 540);

/// Values on a linear axis are clamped to this: plotters never finishes its search for tick marks if the length of an axis, its end
/// minus its start, overflows to infinity.
const LIMIT: f64 = 1e300;

/// Curves with at most so many points mark each with a dot.
const MARKED_POINTS: usize = 50;

/// Length of the dashes and of the gaps between them, pixels.
const DASH: (i32, i32) = (7, 4);

/// Half the width of the ends of an error bar, pixels.
const CAP: i32 = 4;

/// An axis shorter than this has no room for ticks that differ: relative to its values if it is linear, in decades if not.
const FLAT: f64 = 1e-9;

/// matplotlib's default palette ("tab10"), whose colors are easy to distinguish.
const COLORS: [RGBColor; 10] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
    RGBColor(188, 189, 34),
    RGBColor(23, 190, 207),
];

/// The format of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Vector graphics.
    Svg,
    /// 8-bit RGB pixels.
    Png,
}

/// A figure with two axes. The same chart always gives the same bytes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chart {
    /// Above the figure.
    pub(crate) title: String,
    /// The horizontal axis.
    pub(crate) x: Axis,
    /// The vertical axis.
    pub(crate) y: Axis,
    /// Later ones are drawn over earlier ones.
    pub(crate) series: Vec<Series>,
}

/// An axis. Its range is that of the values, with a margin.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Axis {
    /// The name with its unit; empty for none.
    pub(crate) name: String,
    /// How values are mapped to positions.
    pub(crate) scale: Scale,
}

impl Axis {
    /// A linear axis.
    pub(crate) fn linear(name: impl Into<String>) -> Self {
        Self { name: name.into(), scale: Scale::Linear }
    }

    /// A logarithmic axis.
    pub(crate) fn log(name: impl Into<String>) -> Self {
        Self { name: name.into(), scale: Scale::Log }
    }
}

/// How values are mapped to positions. Non-finite values are left out, and cut a line in two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// Equal differences have equal lengths.
    Linear,
    /// Equal ratios have equal lengths. Values that are not positive are left out.
    Log,
}

impl Scale {
    /// The position on the axis, in the unit of the values or in decades; `None` for a value that is left out.
    fn position(self, value: f64) -> Option<f64> {
        match self {
            _ if !value.is_finite() => None,
            Self::Linear => Some(value.clamp(-LIMIT, LIMIT)),
            Self::Log => (value > 0.0).then(|| value.log10()),
        }
    }
}

/// What marks the points of a series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marks {
    /// A line through them.
    Line,
    /// A dot for each.
    Dots,
    /// Both.
    LineAndDots,
}

/// The points of one color and legend entry.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Series {
    /// The name in the legend; empty for no entry.
    pub(crate) name: String,
    /// `(x, y)`, in the order in which they are joined.
    pub(crate) points: Vec<(f64, f64)>,
    /// Vertical error bars, at the points or elsewhere.
    pub(crate) bars: Vec<ErrorBar>,
    /// Line or dots.
    pub(crate) marks: Marks,
    /// Whether the line is dashed.
    pub(crate) dashed: bool,
    /// The index of its color in the palette, which is repeated.
    pub(crate) color: usize,
    /// Whether it is drawn in full color and width; else pale and thin.
    pub(crate) strong: bool,
}

impl Series {
    /// A solid line.
    pub(crate) fn line(name: impl Into<String>, points: Vec<(f64, f64)>, color: usize) -> Self {
        Self { name: name.into(), points, bars: Vec::new(), marks: Marks::Line, dashed: false, color, strong: true }
    }

    /// Dots without a line.
    pub(crate) fn dots(name: impl Into<String>, points: Vec<(f64, f64)>, color: usize) -> Self {
        Self { marks: Marks::Dots, ..Self::line(name, points, color) }
    }

    /// The curve of a metric over a run, with dots if there are few points: a curve of one point has no line, and one of few points hides
    /// where they are.
    pub(crate) fn curve(name: impl Into<String>, points: Vec<(f64, f64)>, color: usize) -> Self {
        let marks = if points.len() <= MARKED_POINTS { Marks::LineAndDots } else { Marks::Line };
        Self { marks, ..Self::line(name, points, color) }
    }

    fn has_line(&self) -> bool {
        self.marks != Marks::Dots
    }

    fn has_dots(&self) -> bool {
        self.marks != Marks::Line
    }

    fn style(&self) -> ShapeStyle {
        let color = COLORS[self.color % COLORS.len()];
        if self.strong { color.stroke_width(2) } else { color.mix(0.35).stroke_width(1) }
    }
}

/// A vertical error bar. If `high` has a place on the axis and `low` has none, because it is not positive on a logarithmic axis, the bar
/// reaches to the edge of the figure and has no end there. A bar with a non-finite end is left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ErrorBar {
    /// Where it is on the horizontal axis.
    pub(crate) x: f64,
    /// Its low end.
    pub(crate) low: f64,
    /// Its high end.
    pub(crate) high: f64,
}

/// Draws a chart and returns the bytes of the file.
pub(crate) fn draw(chart: &Chart, format: Format) -> Result<Vec<u8>, String> {
    font()?;
    match format {
        Format::Svg => {
            let mut svg = String::new();
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            draw_on(&area, chart)?;
            drop(area);
            Ok(svg.into_bytes())
        }
        Format::Png => {
            let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
            let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
            draw_on(&area, chart)?;
            drop(area);
            png(&pixels).map_err(|error| error.to_string())
        }
    }
}

/// Registers the font that is compiled in: a server or container often has none.
fn font() -> Result<(), String> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered =
        REGISTERED.get_or_init(|| register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular()).is_ok());
    registered.then_some(()).ok_or_else(|| "the built-in font cannot be read".into())
}

fn png(pixels: &[u8]) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

fn draw_on<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Chart) -> Result<(), String> {
    draw_chart(area, chart).and_then(|()| area.present()).map_err(|error| error.to_string())
}

/// A series in positions on both axes.
struct Placed<'a> {
    series: &'a Series,
    /// `None` for a point that is left out.
    points: Vec<Option<(f64, f64)>>,
    /// Position across, low and high end; no low end for a bar that reaches to the edge.
    bars: Vec<(f64, Option<f64>, f64)>,
}

impl<'a> Placed<'a> {
    fn new(series: &'a Series, x: Scale, y: Scale) -> Self {
        let point = |&(across, up): &(f64, f64)| Some((x.position(across)?, y.position(up)?));
        let bar = |&ErrorBar { x: across, low, high }: &ErrorBar| {
            low.is_finite().then_some((x.position(across)?, y.position(low), y.position(high)?))
        };
        Self {
            series,
            points: series.points.iter().map(point).collect(),
            bars: series.bars.iter().filter_map(bar).collect(),
        }
    }

    /// The parts of the line between points that are left out.
    fn lines(&self) -> impl Iterator<Item = Vec<(f64, f64)>> {
        let parts = self.points.split(Option::is_none).map(|part| part.iter().flatten().copied().collect::<Vec<_>>());
        parts.filter(|part| self.series.has_line() && part.len() > 1)
    }
}

fn draw_chart<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    Chart { title, x, y, series }: &Chart,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    area.fill(&WHITE)?;
    let placed: Vec<Placed> = series.iter().map(|series| Placed::new(series, x.scale, y.scale)).collect();
    let points = || placed.iter().flat_map(|series| series.points.iter().flatten());
    let bars = || placed.iter().flat_map(|series| &series.bars);
    let across = AxisRange::new(x.scale, points().map(|point| point.0).chain(bars().map(|bar| bar.0)));
    let ends = bars().flat_map(|&(_, low, high)| [low, Some(high)]).flatten();
    let up = AxisRange::new(y.scale, points().map(|point| point.1).chain(ends));
    let bottom = up.range.start;

    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(76)
        .build_cartesian_2d(across.clone(), up.clone())?;
    let (x_label, y_label) = (|position: &f64| across.label(*position), |position: &f64| up.label(*position));
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(&x.name).x_label_formatter(&x_label).y_label_formatter(&y_label);
    if !y.name.is_empty() {
        mesh.y_desc(&y.name);
    }
    mesh.draw()?;

    // Lines first, then bars, then dots: what is smaller stays visible.
    for line in &placed {
        let Series { name, dashed, .. } = line.series;
        let style = line.series.style();
        let (dash, gap) = DASH;
        let drawn = if *dashed {
            chart.draw_series(line.lines().map(|part| DashedPathElement::new(part, dash, gap, style)))?
        } else {
            chart.draw_series(line.lines().map(|part| PathElement::new(part, style)))?
        };
        if name.is_empty() {
            continue;
        }
        drawn.label(name);
        match (line.series.has_line(), dashed) {
            (true, true) => drawn.legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 18, y)], dash, gap, style)),
            (true, false) => drawn.legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style)),
            (false, _) => drawn.legend(move |(x, y)| Circle::new((x + 9, y), 3, style.filled())),
        };
    }
    for Placed { series, bars, .. } in &placed {
        let style = series.style().stroke_width(1);
        let stem = |&(x, low, high): &(f64, Option<f64>, f64)| {
            PathElement::new([(x, low.unwrap_or(bottom)), (x, high)], style)
        };
        chart.draw_series(bars.iter().map(stem))?;
        let ends = bars.iter().flat_map(|&(x, low, high)| [low, Some(high)].into_iter().flatten().map(move |y| (x, y)));
        chart.draw_series(ends.map(|end| EmptyElement::at(end) + PathElement::new([(-CAP, 0), (CAP, 0)], style)))?;
    }
    for Placed { series, points, .. } in placed.iter().filter(|placed| placed.series.has_dots()) {
        let style = series.style().filled();
        chart.draw_series(points.iter().flatten().map(|&point| Circle::new(point, 3, style)))?;
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.8)).draw()
}

/// An axis with its range. plotters has a logarithmic one, but it marks only powers of ten, and the losses of a study often span none. It
/// also leaves out values below 2.2e-16.
#[derive(Clone)]
struct AxisRange {
    scale: Scale,
    /// Positions, see [`Scale::position`].
    range: Range<f64>,
}

impl AxisRange {
    /// The range of these positions, with a margin.
    fn new(scale: Scale, positions: impl Iterator<Item = f64>) -> Self {
        let (low, high) = positions.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        if low > high {
            return Self { scale, range: 0.0..1.0 };
        }
        let length = high - low;
        // A flat curve has a span of 0, which cannot be divided into ticks.
        let margin = match scale {
            Scale::Linear if length <= FLAT * high.abs().max(low.abs()) => high.abs().max(1e-9) * 0.1,
            Scale::Log if length <= FLAT => 0.5,
            _ => length * 0.04,
        };
        Self { scale, range: low - margin..high + margin }
    }

    fn linear(&self) -> RangedCoordf64 {
        self.range.clone().into()
    }

    /// The positions of multiples of all powers of ten in the range.
    fn multiples(&self, factors: Range<u32>, wanted: impl Fn(u32) -> bool) -> Vec<f64> {
        let decades = self.range.start.floor() as i32..=self.range.end.floor() as i32;
        let all = decades.flat_map(|decade| factors.clone().map(move |factor| (decade, factor)));
        all.filter(|&(_, factor)| wanted(factor))
            .map(|(decade, factor)| f64::from(decade) + f64::from(factor).log10())
            .filter(|position| self.range.contains(position))
            .collect()
    }

    /// 1, 2 and 5 times the powers of ten.
    fn round_values(&self) -> Vec<f64> {
        self.multiples(1..6, |factor| factor != 3 && factor != 4)
    }

    /// Whether a logarithmic axis is so short that round differences mark it better than multiples of powers of ten.
    fn is_short(&self) -> bool {
        self.round_values().len() < 3 && self.range.end - self.range.start < 2.0
    }

    /// The power of ten at or below the start of a logarithmic axis, and the range in units of it. With it the values of short axes are
    /// between 1 and 1000, where no tick overflows or is rounded to 0.
    fn in_units(&self) -> (f64, Range<f64>) {
        let unit = self.range.start.floor();
        (unit, 10f64.powf(self.range.start - unit)..10f64.powf(self.range.end - unit))
    }

    /// At most so many ticks of a logarithmic axis, or a few.
    fn log_ticks(&self, most: usize, light: bool) -> Vec<f64> {
        if self.is_short() {
            let (unit, range) = self.in_units();
            let ticks = RangedCoordf64::from(range).key_points(most);
            return ticks.into_iter().map(|tick| tick.log10() + unit).collect();
        }
        let round = if light { self.multiples(1..10, |_| true) } else { self.round_values() };
        if round.len() <= most {
            return round;
        }
        let powers = self.multiples(1..2, |_| true);
        let strides = [1, 2, 5, 10, 20, 50, 100, 200];
        let stride = strides.into_iter().find(|&stride| powers.len() / stride as usize <= most).unwrap_or(500);
        powers.into_iter().filter(|power| power.round() as i64 % stride == 0).collect()
    }

    fn label(&self, position: f64) -> String {
        if self.scale == Scale::Linear {
            return label(position, self.range.end - self.range.start);
        }
        // Only ticks that are labels of round numbers in a range that people read have no exponent.
        let plain = self.range.start > -4.0 && self.range.end < 6.0;
        // The position of a power of ten may be a rounding error below it.
        let exponent = (position + 1e-9).floor();
        let decimals = if self.is_short() {
            let (unit, range) = self.in_units();
            // Digits for a tenth of the range, after the point of the mantissa or of the value.
            let digits = 1.0 - (range.end - range.start).log10().floor();
            if plain { digits - unit } else { digits + exponent - unit }
        } else if plain {
            -exponent
        } else {
            0.0
        };
        let decimals = decimals.clamp(0.0, 17.0) as usize;
        if plain {
            format!("{:.decimals$}", 10f64.powf(position))
        } else {
            format!("{:.decimals$}e{exponent}", 10f64.powf(position - exponent))
        }
    }
}

impl Ranged for AxisRange {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, position: &f64, pixels: (i32, i32)) -> i32 {
        self.linear().map(position, pixels)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match self.scale {
            Scale::Linear => self.linear().key_points(hint),
            Scale::Log => self.log_ticks(hint.max_num_points(), hint.weight().allow_light_points()),
        }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// The label of a tick, with enough digits to distinguish it from the next one on an axis that spans `range`.
fn label(value: f64, range: f64) -> String {
    // The tick at 0 is often a rounding error away from it.
    let value = if value.abs() < range * 1e-9 { 0.0 } else { value };
    match range {
        range if range < 1e-2 => format!("{value:.1e}"),
        range if range < 20.0 => format!("{value:.2}"),
        _ if value.abs() >= 1e15 => format!("{value:.1e}"),
        _ if value.abs() >= 1e6 => format!("{}M", value / 1e6),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(x: Axis, y: Axis, series: Vec<Series>) -> Chart {
        Chart { title: "title".into(), x, y, series }
    }

    fn svg(chart: &Chart) -> String {
        String::from_utf8(draw(chart, Format::Svg).unwrap()).unwrap()
    }

    /// The elements of this name that are drawn in the first color.
    fn elements<'a>(svg: &'a str, name: &str) -> Vec<&'a str> {
        let start = format!("<{name} ");
        let parts = svg.split(start.as_str()).skip(1).filter_map(|part| part.split("/>").next());
        parts.filter(|part| part.contains("#1F77B4")).collect::<Vec<_>>()
    }

    /// The labels of an axis from these positions on.
    fn labels(scale: Scale, values: &[f64]) -> Vec<String> {
        let range = AxisRange::new(scale, values.iter().filter_map(|&value| scale.position(value)));
        range.log_ticks(11, false).into_iter().map(|tick| range.label(tick)).collect()
    }

    #[test]
    fn the_largest_and_smallest_floats_are_drawn() {
        let most = f64::MAX;
        for points in [
            vec![(1.0, -most), (2.0, most)],
            vec![(-most, 0.0), (most, 1.0)],
            vec![(1.0, most)],
            vec![(1.0, 1e308), (2.0, -1e308), (3.0, 0.5)],
            vec![(0.0, f64::MIN_POSITIVE), (5e-324, 0.0)],
            vec![(5e-324, 5e-324), (most, most)],
            vec![(5e-324, most), (5e-324, most)],
        ] {
            for axis in [Axis::linear, Axis::log] {
                let curve = Series::curve("x", points.clone(), 0);
                let chart = chart(axis("step"), axis(""), vec![curve]);
                for format in [Format::Svg, Format::Png] {
                    assert!(!draw(&chart, format).unwrap().is_empty());
                }
            }
        }
    }

    #[test]
    fn values_that_differ_by_a_rounding_error_are_drawn() {
        for value in [1e-300f64, 1e-7, 1.0, 1e6, 1e15, 1e299] {
            for second in [value, value.next_up(), value * (1.0 + 1e-12), value * (1.0 + 3e-9)] {
                for axis in [Axis::linear, Axis::log] {
                    let curve = Series::curve("x", vec![(value, value), (second, second)], 0);
                    assert_eq!(elements(&svg(&chart(axis("x"), axis("y"), vec![curve])), "circle").len(), 2);
                }
            }
        }
    }

    #[test]
    fn a_chart_without_points_has_axes() {
        for axis in [Axis::linear, Axis::log] {
            for points in [vec![], vec![(f64::NAN, 1.0), (1.0, f64::INFINITY)]] {
                let svg = svg(&chart(axis("x"), axis("loss"), vec![Series::curve("x", points, 0)]));
                assert!(svg.contains("loss") && elements(&svg, "circle").is_empty());
            }
        }
    }

    #[test]
    fn a_log_axis_of_one_point_or_of_equal_points_has_round_labels() {
        assert_eq!(labels(Scale::Log, &[100.0]), ["50", "100", "200"]);
        assert_eq!(labels(Scale::Log, &[3e18, 3e18, 3e18]), ["1e18", "2e18", "5e18"]);
    }

    #[test]
    fn a_log_axis_over_20_decades_is_labeled_by_powers_of_ten() {
        let found = labels(Scale::Log, &[1e-2, 1e18]);
        assert_eq!(found, ["1e-2", "1e0", "1e2", "1e4", "1e6", "1e8", "1e10", "1e12", "1e14", "1e16", "1e18"]);
        assert_eq!(labels(Scale::Log, &[1e-5, 1e-3]), ["1e-5", "2e-5", "5e-5", "1e-4", "2e-4", "5e-4", "1e-3"]);
        assert_eq!(labels(Scale::Log, &[0.001, 0.02]), ["0.001", "0.002", "0.005", "0.01", "0.02"]);
        assert!((3..=12).contains(&labels(Scale::Log, &[5e-324, f64::MAX]).len()));
    }

    #[test]
    fn a_log_axis_without_a_power_of_ten_is_labeled_by_round_differences() {
        assert_eq!(labels(Scale::Log, &[2.1, 3.4]), ["2.2", "2.4", "2.6", "2.8", "3.0", "3.2", "3.4"]);
        assert_eq!(labels(Scale::Log, &[2.101, 2.104])[..2], ["2.1010", "2.1015"]);
        assert_eq!(labels(Scale::Log, &[2.1e18, 3.4e18])[..2], ["2.2e18", "2.4e18"]);
        for (low, high) in [(1.0, 9.9), (2.0, 20.0), (7e-5, 8e-5), (9e-9, 2e-8), (0.9, 1.2), (1e-300, 1.5e-300)] {
            let labels = labels(Scale::Log, &[low, high]);
            assert!((3..=11).contains(&labels.len()), "{labels:?}");
            assert!(labels.windows(2).all(|pair| pair[0] != pair[1]), "{labels:?}");
        }
    }

    #[test]
    fn points_without_a_place_are_left_out_and_cut_the_line() {
        let points = vec![(1.0, 1.0), (2.0, 10.0), (3.0, 0.0), (4.0, 5.0), (5.0, f64::NAN), (6.0, 7.0), (7.0, 8.0)];
        let figure = |axis: Axis| {
            let svg = svg(&chart(Axis::linear("x"), axis, vec![Series::curve("", points.clone(), 0)]));
            (elements(&svg, "circle").len(), elements(&svg, "polyline").len())
        };
        assert_eq!(figure(Axis::linear("y")), (6, 2));
        assert_eq!(figure(Axis::log("y")), (5, 2), "one part has a single point");
    }

    #[test]
    fn equal_ratios_have_equal_lengths_on_a_log_axis() {
        let dots = Series::dots("", vec![(1.0, 1.0), (10.0, 2.0), (100.0, 4.0)], 0);
        let svg = svg(&chart(Axis::log("x"), Axis::log("y"), vec![dots]));
        let number = |circle: &str, name: &str| -> i32 {
            circle.split(&format!("{name}=\"")).nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        let places: Vec<_> =
            elements(&svg, "circle").iter().map(|dot| (number(dot, "cx"), number(dot, "cy"))).collect();
        assert_eq!(places.len(), 3);
        assert!((places[0].0 + places[2].0 - 2 * places[1].0).abs() <= 1, "{places:?}");
        assert!((places[0].1 + places[2].1 - 2 * places[1].1).abs() <= 1, "{places:?}");
        assert!(elements(&svg, "polyline").is_empty(), "dots have no line");
    }

    #[test]
    fn error_bars_have_a_stem_and_two_ends() {
        let bar = |low, high| {
            let bars = vec![ErrorBar { x: 1.0, low, high }];
            let series = Series { bars, ..Series::dots("", vec![(1.0, 2.0), (2.0, 1.0)], 0) };
            let svg = svg(&chart(Axis::linear("x"), Axis::log("y"), vec![series]));
            elements(&svg, "polyline").len()
        };
        assert_eq!(bar(1.5, 2.5), 3);
        assert_eq!(bar(-0.5, 2.5), 2, "the bar reaches to the edge");
        assert_eq!(bar(f64::NAN, 2.5), 0);
        assert_eq!(bar(-2.0, -1.0), 0);
    }

    #[test]
    fn a_dashed_line_has_gaps_and_each_series_a_legend() {
        let points = vec![(1.0, 1.0), (100.0, 2.0)];
        let solid = Series::line("measured", points.clone(), 0);
        let dashed = Series { dashed: true, ..Series::line("fit", points.clone(), 0) };
        let count = |series| elements(&svg(&chart(Axis::log("x"), Axis::linear("y"), vec![series])), "polyline").len();
        assert_eq!(count(solid.clone()), 2, "the line and its legend");
        assert!(count(dashed.clone()) > 20);
        let dots = Series::dots("seeds", points, 0);
        let figure = chart(Axis::log("FLOPs"), Axis::linear("loss"), vec![solid, dashed, dots]);
        let drawn = svg(&figure);
        for text in ["measured", "fit", "seeds", "FLOPs", "loss", "title"] {
            assert!(drawn.contains(text), "{text}");
        }
        assert_eq!(elements(&drawn, "circle").len(), 3, "two dots and their legend");
        assert_eq!(drawn, svg(&figure));
    }
}
