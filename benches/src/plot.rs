//! Pictures (SVG) of what was measured: bars and curves with the span from least to most.

use std::fmt::Debug;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::pingpong::State;
use crate::report::{Beside, Cell, Figure, name};
use crate::ring::Layout;
use crate::{bound, growth, hold, idle, latency, testpmd};

const WIDTH: u32 = 960;
const PANEL: u32 = 340;
/// The horizontal axis is so many times as long as what is shown: on the right there is room for the legend.
const LEGEND: f64 = 1.28;
/// Told apart by the colour-blind too (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Bars side by side: one for each category, or none.
#[derive(Debug, Clone)]
pub struct Bars {
    /// For the legend.
    pub name: String,
    /// In the order of the categories.
    pub values: Vec<Option<Figure>>,
}

/// A line through points.
#[derive(Debug, Clone)]
pub struct Curve {
    /// For the legend.
    pub name: String,
    /// Horizontal and vertical.
    pub points: Vec<(f64, Figure)>,
}

/// A part of a picture.
#[derive(Debug, Clone)]
pub enum Panel {
    /// Categories with bars.
    Bars {
        /// What it shows, and the unit.
        title: String,
        /// Below the bars.
        categories: Vec<String>,
        /// The bars.
        series: Vec<Bars>,
    },
    /// Curves over a logarithmic axis.
    Curves {
        /// What it shows, and the unit.
        title: String,
        /// Below the horizontal axis.
        x: String,
        /// The vertical axis is logarithmic too.
        log_y: bool,
        /// The curves.
        series: Vec<Curve>,
    },
}

/// A picture of panels, one below the other.
pub fn draw(panels: &[Panel]) -> Result<String> {
    let mut svg = String::new();
    {
        let height = PANEL * panels.len().max(1) as u32;
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE).map_err(drawing)?;
        for (area, panel) in root
            .split_evenly((panels.len().max(1), 1))
            .iter()
            .zip(panels)
        {
            match panel {
                Panel::Bars {
                    title,
                    categories,
                    series,
                } => bars(area, title, categories, series)?,
                Panel::Curves {
                    title,
                    x,
                    log_y,
                    series,
                } => curves(area, title, x, *log_y, series)?,
            }
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}

/// The library's errors borrow what is drawn.
fn drawing(e: impl Debug) -> anyhow::Error {
    anyhow!("the picture: {e:?}")
}

fn top(figures: impl Iterator<Item = Figure>) -> f64 {
    let most = figures.map(|f| f.max).fold(0.0, f64::max);
    if most > 0.0 { most * 1.08 } else { 1.0 }
}

fn bars(area: &Area<'_>, title: &str, categories: &[String], series: &[Bars]) -> Result<()> {
    let all = series
        .iter()
        .flat_map(|s| s.values.iter().flatten().copied());
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(title, ("sans-serif", 17))
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..LEGEND * categories.len().max(1) as f64, 0.0..top(all))
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .label_style(("sans-serif", 13))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(drawing)?;
    let width = 0.8 / series.len().max(1) as f64;
    for (i, s) in series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let at = |category: usize| category as f64 + 0.1 + width * i as f64;
        let known = || {
            s.values
                .iter()
                .enumerate()
                .filter_map(|(c, v)| Some((c, (*v)?)))
        };
        let boxes = known().map(|(c, v)| {
            let corners = [(at(c), 0.0), (at(c) + 0.92 * width, v.median)];
            Rectangle::new(corners, colour.filled())
        });
        chart
            .draw_series(boxes)
            .map_err(drawing)?
            .label(&s.name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        let spans = known().map(|(c, v)| {
            let x = at(c) + 0.46 * width;
            PathElement::new(vec![(x, v.min), (x, v.max)], BLACK.stroke_width(1))
        });
        chart.draw_series(spans).map_err(drawing)?;
    }
    for (c, category) in categories.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(c as f64 + 0.5, 0.0));
        let (left, up) = area.get_base_pixel();
        let style = ("sans-serif", 13)
            .into_text_style(area)
            .pos(Pos::new(HPos::Center, VPos::Top));
        area.draw_text(category, &style, (x - left, y - up + 6))
            .map_err(drawing)?;
    }
    legend(&mut chart)
}

fn curves(area: &Area<'_>, title: &str, x: &str, log_y: bool, series: &[Curve]) -> Result<()> {
    let points = || series.iter().flat_map(|s| s.points.iter());
    let least = |v: f64, w: f64| if w > 0.0 { v.min(w) } else { v };
    let (left, right) = points().fold((f64::INFINITY, 1.0), |(l, r): (f64, f64), p| {
        (least(l, p.0), r.max(p.0))
    });
    let left = if left.is_finite() { left } else { 1.0 };
    let right = right.max(left * 2.0);
    let across = (left..right * (right / left).powf(LEGEND - 1.0)).log_scale();
    let high = top(points().map(|p| p.1));
    if log_y {
        let low = points().fold(high, |l, p| least(l, p.1.min)) * 0.9;
        curves_over(
            area,
            title,
            x,
            across,
            (low..high * 1.3).log_scale(),
            series,
        )
    } else {
        curves_over(area, title, x, across, 0.0..high, series)
    }
}

fn curves_over<X, Y>(
    area: &Area<'_>,
    title: &str,
    x: &str,
    across: X,
    up: Y,
    series: &[Curve],
) -> Result<()>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(title, ("sans-serif", 17))
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(across, up)
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(x)
        .label_style(("sans-serif", 13))
        .x_label_formatter(&|v| short(*v))
        .y_label_formatter(&|v| short(*v))
        .draw()
        .map_err(drawing)?;
    for (i, s) in series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let line = s.points.iter().map(|(x, f)| (*x, f.median));
        chart
            .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)).point_size(3))
            .map_err(drawing)?
            .label(&s.name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        let spans = s
            .points
            .iter()
            .map(|(x, f)| PathElement::new(vec![(*x, f.min), (*x, f.max)], colour.stroke_width(1)));
        chart.draw_series(spans).map_err(drawing)?;
    }
    legend(&mut chart)
}

fn legend<'a, X, Y>(chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>) -> Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .label_font(("sans-serif", 13))
        .draw()
        .map_err(drawing)
}

/// A number for an axis.
fn short(v: f64) -> String {
    match v {
        v if v >= 999_500.0 => format!("{:.3}M", v / 1e6).replace(".000", ""),
        v if v >= 1000.0 => format!("{:.3}k", v / 1e3).replace(".000", ""),
        v if v.fract().abs() < 1e-9 => format!("{v:.0}"),
        v => format!("{v:.2}").trim_end_matches('0').to_owned(),
    }
}

/// Rates by frame size and ring, and ratios.
pub fn pvp(cells: &[Cell]) -> Result<String> {
    let mut frames: Vec<usize> = cells.iter().map(|c| c.frame).collect();
    frames.sort_unstable();
    frames.dedup();
    let categories: Vec<String> = frames.iter().map(|f| format!("{f} bytes")).collect();
    let of =
        |ring: Layout, state: State, get: fn(&Cell) -> Option<Figure>| -> Vec<Option<Figure>> {
            let cell = |f: &usize| {
                cells
                    .iter()
                    .find(|c| (c.ring, c.beside.state, c.frame) == (ring, state, *f))
            };
            frames.iter().map(|f| get(cell(f)?)).collect()
        };
    let is_known = |s: &Bars| s.values.iter().any(Option::is_some);
    let rings = [Layout::Split, Layout::Packed];
    let mut panels = Vec::new();
    for state in [State::Near, State::Far] {
        let series = rings.iter().flat_map(|&ring| {
            let bars = |who: &str, get| Bars {
                name: format!("{who}, {}", name(ring)),
                values: of(ring, state, get),
            };
            [
                bars("Gangway", |c| c.beside.mpps),
                bars("OVS-DPDK", |c| c.beside.ovs_mpps),
            ]
        });
        let series: Vec<Bars> = series.filter(is_known).collect();
        if !series.is_empty() {
            panels.push(Panel::Bars {
                title: format!("Million frames per second, CPUs {}", name(state)),
                categories: categories.clone(),
                series,
            });
        }
    }
    let series = rings.iter().flat_map(|&ring| {
        [State::Near, State::Far].map(|state| Bars {
            name: format!("{}, {}", name(ring), name(state)),
            values: of(ring, state, |c| c.beside.ratio),
        })
    });
    panels.push(Panel::Bars {
        title: "Gangway to OVS-DPDK with an in_port rule, in the same round".to_owned(),
        categories,
        series: series.filter(is_known).collect(),
    });
    draw(&panels)
}

/// Rates by ring shape, a panel for each frame size and state.
pub fn testpmd(cells: &[testpmd::Cell]) -> Result<String> {
    let mut frames: Vec<usize> = cells.iter().map(|c| c.frame).collect();
    frames.sort_unstable();
    frames.dedup();
    let mut panels = Vec::new();
    for frame in frames {
        for state in [State::Near, State::Far] {
            let of_panel = cells.iter().filter(|c| c.frame == frame);
            let known: Vec<_> = of_panel
                .filter_map(|c| Some((c.shape, c.beside.as_ref()?)))
                .filter(|(_, b)| b.state == state)
                .collect();
            if known.is_empty() {
                continue;
            }
            let letter = |yes: bool, letter: &'static str| if yes { letter } else { "-" };
            let categories = known.iter().map(|(s, _)| {
                let ring = if s.ring == Layout::Split { "S" } else { "P" };
                let (o, m) = (letter(s.in_order, "o"), letter(s.mrg_rxbuf, "m"));
                format!("{ring} {o}{m}{}", letter(s.vectorized, "v"))
            });
            let bars = |name: &str, get: fn(&Beside) -> Option<Figure>| Bars {
                name: name.to_owned(),
                values: known.iter().map(|(_, b)| get(b)).collect(),
            };
            panels.push(Panel::Bars {
                title: format!(
                    "testpmd, {frame} bytes, CPUs {}: Mpps (Split, Packed; in order, mergeable, vectorized)",
                    name(state)
                ),
                categories: categories.collect(),
                series: vec![
                    bars("Gangway", |b| b.mpps),
                    bars("OVS-DPDK", |b| b.ovs_mpps),
                ],
            });
        }
    }
    draw(&panels)
}

/// Rates over ports, flows, addresses: a panel for each, of the state that has more points.
pub fn growth(cells: &[growth::Cell]) -> Result<String> {
    let mut panels = Vec::new();
    for axis in growth::Axis::ALL {
        let of_axis: Vec<_> = cells.iter().filter(|c| c.axis == axis).collect();
        let mut all: Vec<State> = of_axis.iter().map(|c| c.beside.state).collect();
        all.sort_unstable();
        all.dedup();
        for state in all {
            let of_state = of_axis.iter().filter(|c| c.beside.state == state);
            let curve = |name: &str, get: fn(&growth::Cell) -> Option<Figure>| Curve {
                name: name.to_owned(),
                points: of_state
                    .clone()
                    .filter_map(|c| Some((c.n as f64, get(c)?)))
                    .collect(),
            };
            let series = [
                curve("Gangway", |c| c.beside.mpps),
                curve("OVS-DPDK, in_port", |c| c.beside.ovs_mpps),
                curve("OVS-DPDK, NORMAL", |c| c.beside.ovs_normal_mpps),
                curve("the guest's bound", |c| c.guest_bound_mpps),
            ];
            panels.push(Panel::Curves {
                title: format!("Mpps over {}, CPUs {}", axis.title(), name(state)),
                x: name(axis),
                log_y: true,
                series: series
                    .into_iter()
                    .filter(|c| !c.points.is_empty())
                    .collect(),
            });
        }
    }
    draw(&panels)
}

/// Rates of forwarding, freezing and flushing, a panel for each state.
pub fn hold(cells: &hold::Cells) -> Result<String> {
    let mut panels = Vec::new();
    for state in [State::Near, State::Far] {
        let of_state: Vec<_> = cells.holds.iter().filter(|c| c.state == state).collect();
        let category = |c: &&hold::Cell| format!("{} bytes, {}", c.frame, name(c.segments));
        let bars = |name: &str, get: fn(&hold::Cell) -> Option<Figure>| Bars {
            name: name.to_owned(),
            values: of_state.iter().map(|c| get(c)).collect(),
        };
        if !of_state.is_empty() {
            panels.push(Panel::Bars {
                title: format!("Mpps of one worker, CPUs {}, by segments", name(state)),
                categories: of_state.iter().map(category).collect(),
                series: vec![
                    bars("forward", |c| c.forward[0]),
                    bars("freeze", |c| c.freeze[0]),
                    bars("flush", |c| c.flush[0]),
                ],
            });
        }
    }
    draw(&panels)
}

/// Round trips, a panel for each frame size and state.
pub fn latency(cells: &[latency::Cell]) -> Result<String> {
    let mut all: Vec<(usize, State)> = cells.iter().map(|c| (c.frame, c.state)).collect();
    all.dedup();
    let mut panels = Vec::new();
    for (frame, state) in all {
        let of_panel = cells
            .iter()
            .filter(|c| (c.frame, c.state) == (frame, state));
        let of_panel: Vec<&latency::Cell> = of_panel.collect();
        type Times = fn(&latency::Cell) -> Option<latency::Times>;
        type Share = fn(latency::Times) -> Figure;
        let switches: [(&str, Times); 2] = [("Gangway", |c| c.gangway), ("OVS-DPDK", |c| c.ovs)];
        let shares: [(&str, Share); 3] = [
            ("median", |t| t.median_us),
            ("99 %", |t| t.p99_us),
            ("99.9 %", |t| t.p999_us),
        ];
        let of_panel = &of_panel;
        let series = switches.into_iter().flat_map(|(switch, times)| {
            shares.map(|(share, of)| Bars {
                name: format!("{switch}, {share}"),
                values: of_panel.iter().map(|c| times(c).map(of)).collect(),
            })
        });
        panels.push(Panel::Bars {
            title: format!(
                "Round trips in microseconds, {frame} bytes, CPUs {}, by load",
                name(state)
            ),
            categories: of_panel
                .iter()
                .map(|c| format!("{:.0} %", 100.0 * c.load))
                .collect(),
            series: series.collect(),
        });
    }
    draw(&panels)
}

/// What no switch can be faster than.
pub fn bound(cells: &[bound::Cell]) -> Result<String> {
    let name = |c: &bound::Cell| {
        format!(
            "{} {} {}",
            c.what,
            c.frame,
            format!("{:?}", c.state).to_lowercase()
        )
    };
    draw(&[Panel::Bars {
        title: "Cycles per frame".to_owned(),
        categories: cells.iter().map(name).collect(),
        series: vec![Bars {
            name: "a device that only moves frames".to_owned(),
            values: cells.iter().map(|c| Some(c.cycles)).collect(),
        }],
    }])
}

/// CPU time with idle ports.
pub fn idle(cells: &[idle::Cell]) -> Result<String> {
    let ports = cells.first().map_or(0, |c| c.ports);
    draw(&[Panel::Bars {
        title: format!("Per cent of a CPU, {ports} idle ports"),
        categories: cells.iter().map(|c| c.switch.clone()).collect(),
        series: vec![Bars {
            name: "process".to_owned(),
            values: cells.iter().map(|c| Some(c.cpu_percent)).collect(),
        }],
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(median: f64) -> Figure {
        Figure {
            min: median * 0.9,
            median,
            max: median * 1.1,
        }
    }

    #[test]
    fn a_picture_has_its_titles_and_names_and_copes_with_nothing() {
        let svg = draw(&[
            Panel::Bars {
                title: "Rates".to_owned(),
                categories: vec!["64 bytes".to_owned(), "1514 bytes".to_owned()],
                series: vec![Bars {
                    name: "ours".to_owned(),
                    values: vec![Some(figure(20.0)), None],
                }],
            },
            Panel::Curves {
                title: "Growth".to_owned(),
                x: "flows".to_owned(),
                log_y: true,
                series: vec![Curve {
                    name: "theirs".to_owned(),
                    points: vec![(1.0, figure(10.0)), (1e6, figure(1.0))],
                }],
            },
        ])
        .unwrap();
        for text in ["Rates", "1514 bytes", "ours", "Growth", "flows", "theirs"] {
            assert!(svg.contains(text), "{text}");
        }
        let empty = Panel::Curves {
            title: String::new(),
            x: String::new(),
            log_y: false,
            series: Vec::new(),
        };
        assert!(draw(&[empty]).unwrap().ends_with("</svg>\n"));
        assert!(draw(&[]).is_ok());
    }

    #[test]
    fn numbers_on_an_axis_are_short() {
        let all = [1.0, 0.25, 1500.0, 1e6, 2.5].map(short);
        assert_eq!(all, ["1", "0.25", "1.500k", "1M", "2.5"]);
    }
}
