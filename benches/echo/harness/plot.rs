//! Plots, as SVG: cost against epoll at a glance, latency, memory.
//!
//! Losses and wins have one scale of colours, symmetric in the ratio's logarithm: twice the cost is as red as half the cost is blue.

use std::io;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::cells::{Kind, Lineup};
use super::contenders::OURS;
use super::json::{CellResult, Run};
use super::proxy;
use super::stats::median;
use super::verdicts;

/// A plot that was written.
pub struct Plot {
    pub title: String,
    pub file: &'static str,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

const FONT: &str = "DejaVu Sans, Verdana, sans-serif";
const INK: RGBColor = RGBColor(34, 34, 34);
const FAINT: RGBColor = RGBColor(120, 120, 120);
const RULE: RGBColor = RGBColor(222, 222, 222);
const EMPTY: RGBColor = RGBColor(238, 238, 238);
/// Ours, among the others' grey.
const OWN: RGBColor = RGBColor(33, 102, 172);
const OTHER: RGBColor = RGBColor(120, 120, 120);

/// The ratio at which the scale ends, on either side.
const SCALE_END: f64 = 1.6;
const WIN: [f64; 3] = [33.0, 102.0, 172.0];
const EVEN: [f64; 3] = [250.0, 250.0, 250.0];
const LOSS: [f64; 3] = [178.0, 24.0, 43.0];

/// Whether a contender is ours.
fn is_ours(name: &str) -> bool {
    name == OURS || name == proxy::OURS
}

/// Writes every plot that the run has something for.
pub fn all(run: &Run, directory: &Path) -> io::Result<Vec<Plot>> {
    let mut plots = Vec::new();
    for (file, plot) in [
        (
            "ratios.svg",
            ratios as fn(&Run, &Path) -> io::Result<Option<String>>,
        ),
        ("proxies.svg", proxies),
        ("latency.svg", latency),
        ("memory.svg", memory),
    ] {
        if let Some(title) = plot(run, &directory.join(file))? {
            plots.push(Plot { title, file });
        }
    }
    Ok(plots)
}

/// The colour of a ratio.
fn colour(ratio: f64) -> RGBColor {
    let place = (ratio.ln() / SCALE_END.ln()).clamp(-1.0, 1.0);
    let end = if place < 0.0 { WIN } else { LOSS };
    let mix = |even: f64, end: f64| (even + (end - even) * place.abs()).round() as u8;
    RGBColor(
        mix(EVEN[0], end[0]),
        mix(EVEN[1], end[1]),
        mix(EVEN[2], end[2]),
    )
}

/// Ink that can be read on a colour.
fn ink_on(colour: RGBColor) -> RGBColor {
    let RGBColor(red, green, blue) = colour;
    let luminance = 0.299 * f64::from(red) + 0.587 * f64::from(green) + 0.114 * f64::from(blue);
    if luminance < 140.0 { WHITE } else { INK }
}

struct Words<'a> {
    size: f64,
    colour: RGBColor,
    h: HPos,
    bold: bool,
    text: &'a str,
}

impl<'a> Words<'a> {
    fn new(text: &'a str, size: f64) -> Self {
        Self {
            size,
            colour: INK,
            h: HPos::Left,
            bold: false,
            text,
        }
    }

    fn at(self, h: HPos) -> Self {
        Self { h, ..self }
    }

    fn ink(self, colour: RGBColor) -> Self {
        Self { colour, ..self }
    }

    fn bold(self, bold: bool) -> Self {
        Self { bold, ..self }
    }

    /// Draws it with its vertical middle at `y`.
    fn draw(self, area: &Area<'_>, x: i32, y: i32) -> io::Result<()> {
        let style = if self.bold {
            FontStyle::Bold
        } else {
            FontStyle::Normal
        };
        let font = FontDesc::new(FontFamily::Name(FONT), self.size, style);
        let style = font.color(&self.colour).pos(Pos::new(self.h, VPos::Center));
        area.draw(&Text::new(self.text.to_owned(), (x, y), style))
            .map_err(io::Error::other)
    }
}

fn rectangle(
    area: &Area<'_>,
    from: (i32, i32),
    to: (i32, i32),
    colour: RGBColor,
) -> io::Result<()> {
    area.draw(&Rectangle::new([from, to], colour.filled()))
        .map_err(io::Error::other)
}

fn line(
    area: &Area<'_>,
    from: (i32, i32),
    to: (i32, i32),
    colour: RGBColor,
    width: u32,
) -> io::Result<()> {
    let style = colour.stroke_width(width);
    area.draw(&PathElement::new(vec![from, to], style))
        .map_err(io::Error::other)
}

fn canvas(path: &Path, width: i32, height: i32) -> io::Result<Area<'_>> {
    let area = SVGBackend::new(path, (width as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE).map_err(io::Error::other)?;
    Ok(area)
}

fn ratios(run: &Run, path: &Path) -> io::Result<Option<String>> {
    let title = "Cost of a message against epoll (median)";
    let how = "epoll's is the better of level- and edge-triggered; connections × bytes × messages in flight on each";
    heat_map(run, path, Lineup::Main, title, how)
}

fn proxies(run: &Run, path: &Path) -> io::Result<Option<String>> {
    let title = "Cost of a message through a proxy against the epoll proxy's (median)";
    let how = "the proxy stands between an epoll server and its clients; connections × bytes";
    heat_map(run, path, Lineup::Proxy, title, how)
}

fn heat_map(
    run: &Run,
    path: &Path,
    lineup: Lineup,
    title: &str,
    how: &str,
) -> io::Result<Option<String>> {
    const NAMES: i32 = 150;
    const TOP: i32 = 112;
    const TILE: (i32, i32) = (78, 32);
    let cells: Vec<&CellResult> = run
        .cells
        .iter()
        .filter(|cell| verdicts::compares_in(&cell.cell, lineup))
        .collect();
    let names = verdicts::names(run, lineup);
    let known = |cell: &&CellResult| {
        names
            .iter()
            .any(|name| verdicts::against_epoll(cell, name).is_some())
    };
    let cells: Vec<&CellResult> = cells.into_iter().filter(known).collect();
    if cells.is_empty() {
        return Ok(None);
    }
    let (columns, rows) = (cells.len() as i32, names.len() as i32);
    let width = (NAMES + columns * TILE.0 + 24).max(820);
    let height = TOP + rows * TILE.1 + 92;
    let area = canvas(path, width, height)?;
    Words::new(title, 19.0).bold(true).draw(&area, 16, 24)?;
    let unit = format!(
        "{}; {how}",
        match run.measure {
            super::counters::Measure::Cycles => "Hardware cycles of the server process",
            super::counters::Measure::CpuTime => "Processor time of the server process",
        }
    );
    Words::new(&unit, 13.0).ink(FAINT).draw(&area, 16, 48)?;
    let mut group: Option<String> = None;
    for (column, cell) in cells.iter().enumerate() {
        let left = NAMES + column as i32 * TILE.0;
        let (family, load) = cell.cell.head();
        if group.as_ref() != Some(&family) {
            Words::new(&family, 14.0)
                .bold(true)
                .draw(&area, left + 4, TOP - 34)?;
            line(
                &area,
                (left + 1, TOP - 44),
                (left + 1, TOP + rows * TILE.1),
                FAINT,
                1,
            )?;
            group = Some(family);
        }
        Words::new(&load, 12.0)
            .at(HPos::Center)
            .draw(&area, left + TILE.0 / 2, TOP - 13)?;
    }
    for (row, name) in names.iter().enumerate() {
        let top = TOP + row as i32 * TILE.1;
        let middle = top + TILE.1 / 2;
        Words::new(name, 14.0)
            .at(HPos::Right)
            .bold(is_ours(name))
            .draw(&area, NAMES - 10, middle)?;
        for (column, cell) in cells.iter().enumerate() {
            let left = NAMES + column as i32 * TILE.0;
            let ratio = verdicts::against_epoll(cell, name);
            let broken = cell
                .contender(name)
                .is_some_and(|each| each.broken.is_some());
            let (fill, text) = match ratio {
                _ if broken => (EMPTY, "failed".to_owned()),
                Some(ratio) => (colour(ratio.median), format!("{:.2}", ratio.median)),
                None => (EMPTY, "–".to_owned()),
            };
            rectangle(
                &area,
                (left + 2, top + 1),
                (left + TILE.0 - 1, top + TILE.1 - 1),
                fill,
            )?;
            Words::new(&text, 14.0)
                .at(HPos::Center)
                .bold(is_ours(name))
                .ink(ink_on(fill))
                .draw(&area, left + TILE.0 / 2, middle)?;
        }
    }
    legend(&area, NAMES, TOP + rows * TILE.1 + 28)?;
    area.present().map_err(io::Error::other)?;
    Ok(Some(title.to_owned()))
}

/// The scale of colours, and what its ends mean.
fn legend(area: &Area<'_>, left: i32, top: i32) -> io::Result<()> {
    const WIDTH: i32 = 420;
    let ratio_at = |x: i32| SCALE_END.powf(2.0 * f64::from(x) / f64::from(WIDTH) - 1.0);
    for x in 0..WIDTH {
        rectangle(
            area,
            (left + x, top),
            (left + x + 1, top + 14),
            colour(ratio_at(x)),
        )?;
    }
    for ratio in [1.0 / SCALE_END, 0.8, 1.0, 1.25, SCALE_END] {
        let place = (ratio.ln() / SCALE_END.ln() + 1.0) / 2.0;
        let x = left + (place * f64::from(WIDTH)).round() as i32;
        line(area, (x, top + 14), (x, top + 19), INK, 1)?;
        Words::new(&format!("{ratio:.2}"), 12.0)
            .at(HPos::Center)
            .draw(area, x, top + 28)?;
    }
    Words::new("cheaper than epoll", 12.0)
        .ink(FAINT)
        .draw(area, left, top + 46)?;
    let right = left + WIDTH;
    Words::new("dearer", 12.0)
        .ink(FAINT)
        .at(HPos::Right)
        .draw(area, right, top + 46)?;
    Words::new("–  cannot do it", 12.0)
        .ink(FAINT)
        .draw(area, right + 40, top + 8)
}

fn latency(run: &Run, path: &Path) -> io::Result<Option<String>> {
    const PANELS_MAX: usize = 6;
    const NAMES: i32 = 120;
    const PANEL: i32 = 560;
    const ROW: i32 = 19;
    const TOP: i32 = 96;
    let has = |cell: &&CellResult| {
        cell.cell.paced() && cell.contenders.iter().any(|each| !each.paced.is_empty())
    };
    let mut cells: Vec<&CellResult> = run.cells.iter().filter(has).collect();
    if cells.is_empty() {
        return Ok(None);
    }
    // Small messages first: a large one's latency is its copying.
    cells.sort_by_key(|cell| cell.cell.size);
    cells.truncate(PANELS_MAX);
    let rows = cells
        .iter()
        .map(|cell| cell.contenders.len())
        .max()
        .unwrap_or(0) as i32;
    let panel_height = 34 + rows * ROW + 44;
    let lines = (cells.len() as i32 + 1) / 2;
    let width = if cells.len() > 1 {
        2 * PANEL + 24
    } else {
        PANEL + 24
    };
    let area = canvas(path, width, TOP + lines * panel_height)?;
    let title = "Latency at half of epoll's full speed".to_owned();
    Words::new(&title, 19.0).bold(true).draw(&area, 16, 24)?;
    let what = "µs from when a message should have been sent; the same rate for every contender";
    Words::new(what, 13.0).ink(FAINT).draw(&area, 16, 48)?;
    let mut x = 16;
    for (rank, name) in ["p50", "p99", "p99.9"].into_iter().enumerate() {
        dot(&area, x + 8, 74, rank, OTHER)?;
        Words::new(name, 13.0).draw(&area, x + 20, 74)?;
        x += 80;
    }
    for (index, cell) in cells.iter().enumerate() {
        let left = 12 + (index as i32 % 2) * PANEL;
        let top = TOP + (index as i32 / 2) * panel_height;
        let offered = cell.offered.unwrap_or_default();
        let head = format!("{}, {offered:.0} messages/s", cell.cell.title());
        Words::new(&head, 14.0)
            .bold(true)
            .draw(&area, left + 8, top + 14)?;
        let quantiles: Vec<[Option<f64>; 3]> = (cell.contenders.iter())
            .map(|each| {
                [
                    median(&each.each_paced(|paced| paced.p50_us)),
                    median(&each.each_paced(|paced| paced.p99_us)),
                    median(&each.each_paced(|paced| paced.p999_us)),
                ]
            })
            .collect();
        let values = || quantiles.iter().flatten().flatten().copied();
        let low = 10f64.powf(
            (values().fold(f64::INFINITY, f64::min) * 0.95)
                .max(1.0)
                .log10()
                .floor(),
        );
        let high = 10f64.powf(
            (values().fold(0.0, f64::max).max(low) * 1.05)
                .log10()
                .ceil(),
        );
        let (axis_left, axis_right) = (left + NAMES, left + PANEL - 30);
        let place = |value: f64| {
            let share = (value / low).ln() / (high / low).ln();
            axis_left + (share * f64::from(axis_right - axis_left)).round() as i32
        };
        let bottom = top + 30 + cell.contenders.len() as i32 * ROW;
        let mut tick = low;
        while tick <= high * 1.001 {
            line(
                &area,
                (place(tick), top + 28),
                (place(tick), bottom + 4),
                RULE,
                1,
            )?;
            let label = if tick >= 1000.0 {
                format!("{:.0} ms", tick / 1000.0)
            } else {
                format!("{tick:.0} µs")
            };
            Words::new(&label, 12.0).ink(FAINT).at(HPos::Center).draw(
                &area,
                place(tick),
                bottom + 14,
            )?;
            tick *= 10.0;
        }
        for (row, (contender, quantiles)) in cell.contenders.iter().zip(&quantiles).enumerate() {
            let y = top + 30 + row as i32 * ROW + ROW / 2;
            let own = is_ours(&contender.name);
            let tone = if own { OWN } else { OTHER };
            Words::new(&contender.name, 13.0)
                .at(HPos::Right)
                .bold(own)
                .draw(&area, axis_left - 10, y)?;
            let [Some(p50), Some(_), Some(p999)] = *quantiles else {
                Words::new("–", 13.0)
                    .ink(FAINT)
                    .draw(&area, axis_left + 4, y)?;
                continue;
            };
            line(&area, (place(p50), y), (place(p999), y), tone, 1)?;
            for (rank, value) in quantiles.iter().flatten().enumerate() {
                dot(&area, place(*value), y, rank, tone)?;
            }
        }
    }
    area.present().map_err(io::Error::other)?;
    Ok(Some(title))
}

/// The mark of a quantile: a full circle, an empty one, a bar.
fn dot(area: &Area<'_>, x: i32, y: i32, rank: usize, colour: RGBColor) -> io::Result<()> {
    match rank {
        0 => area
            .draw(&Circle::new((x, y), 5, colour.filled()))
            .map_err(io::Error::other),
        1 => {
            area.draw(&Circle::new((x, y), 5, WHITE.filled()))
                .map_err(io::Error::other)?;
            area.draw(&Circle::new((x, y), 5, colour.stroke_width(2)))
                .map_err(io::Error::other)
        }
        _ => rectangle(area, (x - 1, y - 6), (x + 2, y + 6), colour),
    }
}

fn memory(run: &Run, path: &Path) -> io::Result<Option<String>> {
    const NAMES: i32 = 120;
    const PANEL: i32 = 400;
    const ROW: i32 = 24;
    const TOP: i32 = 92;
    let Some(cell) = run
        .cells
        .iter()
        .find(|cell| cell.cell.kind == Kind::Idle && cell.cell.lineup == Lineup::Main)
    else {
        return Ok(None);
    };
    let memory: Vec<_> = (cell.contenders.iter())
        .map(|contender| {
            (
                &contender.name,
                contender.rounds.first().and_then(|round| round.idle),
            )
        })
        .collect();
    if memory.iter().all(|(_, memory)| memory.is_none()) {
        return Ok(None);
    }
    let title = format!("Memory of an idle connection, of {}", cell.cell.connections);
    let area = canvas(
        path,
        NAMES + 2 * PANEL + 24,
        TOP + memory.len() as i32 * ROW + 20,
    )?;
    Words::new(&title, 19.0).bold(true).draw(&area, 16, 24)?;
    let bars = [
        ("Resident in the server, bytes", false),
        (
            "Of the whole machine, both ends and the kernel, bytes",
            true,
        ),
    ];
    for (panel, (head, machine)) in bars.into_iter().enumerate() {
        let left = NAMES + 12 + panel as i32 * PANEL;
        Words::new(head, 13.0)
            .ink(FAINT)
            .draw(&area, left, TOP - 22)?;
        let values: Vec<Option<f64>> = (memory.iter())
            .map(|(_, memory)| {
                memory.map(|memory| {
                    if machine {
                        memory.machine
                    } else {
                        memory.server
                    }
                })
            })
            .collect();
        let largest = values.iter().flatten().copied().fold(1.0, f64::max);
        for (row, ((name, _), value)) in memory.iter().zip(values).enumerate() {
            let y = TOP + row as i32 * ROW;
            let own = *name == OURS;
            if panel == 0 {
                Words::new(name, 13.0).at(HPos::Right).bold(own).draw(
                    &area,
                    left - 10,
                    y + ROW / 2,
                )?;
            }
            let Some(value) = value else {
                Words::new("–", 13.0)
                    .ink(FAINT)
                    .draw(&area, left, y + ROW / 2)?;
                continue;
            };
            let length = (value.max(0.0) / largest * f64::from(PANEL - 90)).round() as i32;
            let tone = if own { OWN } else { OTHER };
            rectangle(
                &area,
                (left, y + 4),
                (left + length.max(1), y + ROW - 4),
                tone,
            )?;
            let text = format!("{value:.0}");
            Words::new(&text, 13.0)
                .bold(own)
                .draw(&area, left + length + 7, y + ROW / 2)?;
        }
    }
    area.present().map_err(io::Error::other)?;
    Ok(Some(title))
}

#[cfg(test)]
mod tests {
    // A bench is built with cfg(test) but without its tests, which `tests/echo_bench.rs` runs.
    #[allow(unused_imports)]
    use super::*;

    #[test]
    fn a_loss_is_as_strong_a_colour_as_the_same_win() {
        let strength = |RGBColor(red, green, blue): RGBColor, end: [f64; 3]| {
            (EVEN[0] - f64::from(red)) / (EVEN[0] - end[0])
                + (EVEN[1] - f64::from(green)) / (EVEN[1] - end[1])
                + (EVEN[2] - f64::from(blue)) / (EVEN[2] - end[2])
        };
        for ratio in [1.05, 1.2, 1.5, 3.0] {
            let (loss, win) = (
                strength(colour(ratio), LOSS),
                strength(colour(1.0 / ratio), WIN),
            );
            assert!((loss - win).abs() < 0.05, "{ratio}: {loss} and {win}");
        }
        assert_eq!(colour(1.0), RGBColor(250, 250, 250));
        assert_eq!(colour(SCALE_END), colour(100.0));
    }
}
