//! Curves on a canvas, as SVG or PNG.

use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

const SIZE: (u32, u32) = (900, 540);

/// Values beyond are drawn here.
const FARTHEST: f64 = 1e300;

/// So many points are marked.
const FEW: usize = 50;

/// The default palette of matplotlib since 2.0 ("tab10"), which is made to be told apart.
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

/// What kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Text, sharp at every size.
    Svg,
    /// Pixels.
    Png,
}

/// A curve.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Curve {
    /// Its name in the legend; empty for none.
    pub(super) name: String,
    /// Where it passes.
    pub(super) points: Vec<(f64, f64)>,
    /// Its place in the palette.
    pub(super) color: usize,
    /// Whether it is drawn in full, or pale behind another of its color.
    pub(super) strong: bool,
}

/// Draws curves, and gives the bytes of the file.
pub(super) fn draw(title: &str, x_name: &str, curves: &[Curve], format: Format) -> Result<Vec<u8>, String> {
    font()?;
    match format {
        Format::Svg => {
            let mut svg = String::new();
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            on(&area, title, x_name, curves)?;
            drop(area);
            Ok(svg.into_bytes())
        }
        Format::Png => {
            let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
            let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
            on(&area, title, x_name, curves)?;
            drop(area);
            png(&pixels).map_err(|error| error.to_string())
        }
    }
}

/// The letters come with the program: a bare machine has none that could be relied on.
fn font() -> Result<(), String> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered =
        REGISTERED.get_or_init(|| register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular()).is_ok());
    registered.then_some(()).ok_or_else(|| "the font cannot be read".into())
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

fn on<B: DrawingBackend>(
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
    // The span of an axis has to be a number as well, or the ticks on it are never found.
    let within = |&(x, y): &(f64, f64)| (x.clamp(-FARTHEST, FARTHEST), y.clamp(-FARTHEST, FARTHEST));
    let all = || curves.iter().flat_map(|curve| curve.points.iter().map(within));
    let range = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) =
            all().map(|point| of(&point)).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        // A flat curve still wants a height.
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
    // A curve of few points is little without them, and one of a single point is nothing.
    for curve in curves.iter().filter(|curve| curve.strong && curve.points.len() <= FEW) {
        let color = COLORS[curve.color % COLORS.len()];
        chart.draw_series(curve.points.iter().map(|point| Circle::new(within(point), 3, color.filled())))?;
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.8)).draw()
}

/// A number on an axis that spans `range`, with as many digits as tell its neighbours apart.
fn label(value: f64, range: f64) -> String {
    // What is nothing but the rounding of a zero.
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
    fn values_as_far_apart_as_numbers_can_be_are_drawn() {
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
