//! What a process uses, as time goes by: memory, descriptors, and the line through them.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use plotters::prelude::*;

/// A moment.
#[derive(Clone, Copy)]
pub struct Sample {
    pub at_s: f64,
    pub rss_kib: u64,
    pub descriptors: usize,
}

pub fn sample(pid: u32, at: Duration) -> Sample {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    Sample {
        at_s: at.as_secs_f64(),
        rss_kib: kib.unwrap_or(0),
        descriptors: descriptors(pid, ""),
    }
}

/// How many descriptors a process has open whose name begins like this ("socket:", "pipe:").
pub fn descriptors(pid: u32, prefix: &str) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| {
        let names = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        names
            .filter(|name| name.to_string_lossy().starts_with(prefix))
            .count()
    })
}

/// The least-squares line through the samples' memory, in MiB an hour; `None` for fewer than three.
pub fn slope_mib_per_hour(samples: &[Sample]) -> Option<f64> {
    if samples.len() < 3 {
        return None;
    }
    let count = samples.len() as f64;
    let points = || {
        samples
            .iter()
            .map(|s| (s.at_s / 3600.0, s.rss_kib as f64 / 1024.0))
    };
    let (sum_x, sum_y) = points().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    let (mean_x, mean_y) = (sum_x / count, sum_y / count);
    let over = points().map(|(x, y)| (x - mean_x) * (y - mean_y));
    let under = points().map(|(x, _)| (x - mean_x).powi(2));
    Some(over.sum::<f64>() / under.sum::<f64>())
}

/// Draws memory and descriptors of the server as an SVG.
pub fn plot(samples: &[Sample], warm_s: f64, title: &str, path: &Path) -> io::Result<()> {
    const INK: RGBColor = RGBColor(34, 34, 34);
    const FAINT: RGBColor = RGBColor(200, 200, 200);
    const OWN: RGBColor = RGBColor(33, 102, 172);
    const FONT: (&str, i32) = ("DejaVu Sans, Verdana, sans-serif", 13);
    type Series<'a> = (&'a str, Box<dyn Fn(&Sample) -> f64>);
    let series: [Series<'_>; 2] = [
        ("RSS, MiB", Box::new(|s| s.rss_kib as f64 / 1024.0)),
        ("descriptors", Box::new(|s| s.descriptors as f64)),
    ];
    let end_min = samples.last().map_or(0.0, |s| s.at_s / 60.0).max(0.01);
    let root = SVGBackend::new(path, (900, 520)).into_drawing_area();
    root.fill(&WHITE).map_err(io::Error::other)?;
    let root = root
        .titled(title, (FONT.0, 16).into_font().color(&INK))
        .map_err(io::Error::other)?;
    for (area, (name, value)) in root.split_evenly((2, 1)).iter().zip(series) {
        let top = samples.iter().map(&value).fold(1.0, f64::max) * 1.1;
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..end_min, 0.0..top)
            .map_err(io::Error::other)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(WHITE)
            .bold_line_style(FAINT)
            .axis_style(INK)
            .label_style(FONT)
            .x_desc("minutes")
            .y_desc(name)
            .draw()
            .map_err(io::Error::other)?;
        let warm = [(warm_s / 60.0, 0.0), (warm_s / 60.0, top)];
        chart
            .draw_series([PathElement::new(warm.to_vec(), FAINT)])
            .map_err(io::Error::other)?;
        let points = samples.iter().map(|s| (s.at_s / 60.0, value(s)));
        chart
            .draw_series([PathElement::new(points.collect::<Vec<_>>(), OWN)])
            .map_err(io::Error::other)?;
    }
    root.present().map_err(io::Error::other)
}
