//! Draws curves as SVG or PNG.

use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

/// Width and height, pixels.
const SIZE: (u32, u32) = (900, 540);

/// Values are clamped to this, because the length of an axis, its end minus its start, must be finite.
const LIMIT: f64 = 1e300;

/// Curves with at most so many points mark each with a dot.
const MARKED_POINTS: usize = 50;

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
pub(super) enum Format {
    /// Vector graphics.
    Svg,
    /// 8-bit RGB pixels.
    Png,
}

/// One line of the figure.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Curve {
    /// The name in the legend; empty for no entry.
    pub(super) name: String,
    /// `(x, y)`, in the order in which they are joined.
    pub(super) points: Vec<(f64, f64)>,
    /// The index of its color in the palette, which is repeated.
    pub(super) color: usize,
    /// Whether it is drawn in full color and width; else pale and thin.
    pub(super) strong: bool,
}

/// Draws curves and returns the bytes of the file.
pub(super) fn draw(title: &str, x_name: &str, curves: &[Curve], format: Format) -> Result<Vec<u8>, String> {
    font()?;
    match format {
        Format::Svg => {
            let mut svg = String::new();
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            draw_on(&area, title, x_name, curves)?;
            drop(area);
            Ok(svg.into_bytes())
        }
        Format::Png => {
            let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
            let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
            draw_on(&area, title, x_name, curves)?;
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

fn draw_on<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    x_name: &str,
    curves: &[Curve],
) -> Result<(), String> {
    chart(area, title, x_name, curves).and_then(|()| area.present()).map_err(|error| error.to_string())
}

fn chart<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    x_name: &str,
    curves: &[Curve],
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    area.fill(&WHITE)?;
    // plotters never finishes its search for tick marks if the span of an axis overflows to infinity.
    let within = |&(x, y): &(f64, f64)| (x.clamp(-LIMIT, LIMIT), y.clamp(-LIMIT, LIMIT));
    let all = || curves.iter().flat_map(|curve| curve.points.iter().map(within));
    let range = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) =
            all().map(|point| of(&point)).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        // A flat curve has a span of 0, which cannot be divided into ticks.
        let margin = if high > low { (high - low) * 0.04 } else { high.abs().max(1e-9) * 0.1 };
        low - margin..high + margin
    };
    let (width, height) = (range(|point| point.0), range(|point| point.1));
    let (across, up) = (width.end - width.start, height.end - height.start);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(76)
        .build_cartesian_2d(width, height)?;
    chart
        .configure_mesh()
        .x_desc(x_name)
        .x_label_formatter(&|value| label(*value, across))
        .y_label_formatter(&|value| label(*value, up))
        .draw()?;
    for Curve { name, points, color, strong } in curves {
        let color = COLORS[color % COLORS.len()];
        let line = if *strong { color.stroke_width(2) } else { color.mix(0.35).stroke_width(1) };
        let series = chart.draw_series(LineSeries::new(points.iter().map(within), line))?;
        if !name.is_empty() {
            series.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], line));
        }
    }
    // A curve of one point has no line, and one of few points hides where they are.
    for curve in curves.iter().filter(|curve| curve.strong && curve.points.len() <= MARKED_POINTS) {
        let color = COLORS[curve.color % COLORS.len()];
        chart.draw_series(curve.points.iter().map(|point| Circle::new(within(point), 3, color.filled())))?;
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.8)).draw()
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

    #[test]
    fn the_largest_and_smallest_floats_are_drawn() {
        let most = f64::MAX;
        for points in [
            vec![(1.0, -most), (2.0, most)],
            vec![(-most, 0.0), (most, 1.0)],
            vec![(1.0, most)],
            vec![(1.0, 1e308), (2.0, -1e308), (3.0, 0.5)],
            vec![(0.0, f64::MIN_POSITIVE), (5e-324, 0.0)],
        ] {
            let curve = Curve { name: "x".into(), points, color: 0, strong: true };
            for format in [Format::Svg, Format::Png] {
                assert!(!draw("t", "step", std::slice::from_ref(&curve), format).unwrap().is_empty());
            }
        }
    }
}
