//! Proxies: their cells, their contenders and the figures they are to reach.
//!
//! A proxy stands between the load and an epoll echo server, both on the load's processor, so that the proxy has one to itself. What
//! is counted is the proxy's alone (and its child's, where the contender is other people's program).

use std::io;

use super::cells::{Cell, Family, Kind, Lineup};
use super::contenders::Contender;
use super::json::{CellResult, Run};
use super::stats::{self, Ratio, Tolerance, median};
use super::verdicts::{Figure, Judged, against, judged};

/// Ours, as it is by default; copying; splicing.
pub const OURS: &str = "ringsock proxy";
const OUR_COPY: &str = "ringsock proxy copy";
const OUR_SPLICE: &str = "ringsock proxy splice";
/// What the others are compared to: epoll, copying through 64 KiB. The first once more shows how far chance goes.
pub const EPOLL: &str = "epoll proxy";
pub const EPOLL_AGAIN: &str = "epoll proxy again";
const EPOLL_SPLICE: &str = "epoll proxy splice";
/// With their own buffers, with such of 64 KiB, and where it can be had by splice(2).
const NGINX: [&str; 2] = ["nginx", "nginx 64K"];
const HAPROXY: [&str; 3] = ["haproxy", "haproxy 64K", "haproxy splice"];

/// Bytes of every proxy's buffer, but for those with a choice of their own.
pub const BUFFER: u32 = 64 << 10;

pub fn cells() -> Vec<Cell> {
    vec![
        Cell::echo(Family::Tcp, 64, 64, 1).in_lineup(Lineup::Proxy, "proxy"),
        Cell::echo(Family::Tcp, 16, BUFFER, 1).in_lineup(Lineup::Proxy, "proxy"),
        Cell {
            name: "proxy-stalled-tcp-64x64B".to_owned(),
            kind: Kind::Stalled,
            // Few, since the load says nothing until it has sent them once, and has filled the others.
            messages: 12_000,
            ..Cell::echo(Family::Tcp, 64, 64, 1).in_lineup(Lineup::Proxy, "proxy")
        },
    ]
}

pub fn contenders() -> io::Result<Vec<Contender>> {
    let proxy = |name: &str, command: &[&str]| Contender::new(Lineup::Proxy, name, command);
    Ok(vec![
        proxy(OURS, &["ringsock-proxy"])?,
        proxy(OUR_COPY, &["ringsock-proxy", "--mode", "copy"])?,
        proxy(OUR_SPLICE, &["ringsock-proxy", "--mode", "splice"])?,
        proxy(EPOLL, &["epoll-proxy"])?,
        proxy(EPOLL_AGAIN, &["epoll-proxy"])?,
        proxy(EPOLL_SPLICE, &["epoll-proxy", "--splice"])?,
        proxy(NGINX[0], &["other-proxy", "nginx"])?,
        proxy(NGINX[1], &["other-proxy", "nginx", "--large"])?,
        proxy(HAPROXY[0], &["other-proxy", "haproxy"])?,
        proxy(HAPROXY[1], &["other-proxy", "haproxy", "--large"])?,
        proxy(HAPROXY[2], &["other-proxy", "haproxy", "--splice"])?,
    ])
}

/// Whether a contender has something to show in a proxy cell: by splice(2) only what is large.
pub fn takes_part(name: &str, cell: &Cell) -> bool {
    let splices = [OUR_SPLICE, EPOLL_SPLICE, HAPROXY[2]].contains(&name);
    let stalled = cell.kind == Kind::Stalled;
    let one_of_a_kind = [OURS, EPOLL, NGINX[0], HAPROXY[0]].contains(&name);
    (cell.size >= BUFFER || !splices) && (!stalled || one_of_a_kind)
}

/// Whether callgrind can count a contender: it runs in this program.
pub fn is_ours_to_count(name: &str) -> bool {
    name != EPOLL_AGAIN && !NGINX.contains(&name) && !HAPROXY.contains(&name)
}

/// One figure's cell, ours, the rivals of which the best counts, and the limit.
struct Target {
    large: bool,
    ours: &'static str,
    rivals: &'static [&'static str],
    limit: f64,
}

/// The figures, in the order of the report.
pub fn figures(run: &Run, tolerances: &[Tolerance]) -> Vec<Figure> {
    let target = |large, ours, rivals, limit| Target {
        large,
        ours,
        rivals,
        limit,
    };
    let mut figures = Vec::new();
    for (claim, target) in [
        (
            "64 B: at most 0.88 × epoll",
            target(false, OURS, &[EPOLL], 0.88),
        ),
        (
            "64 B: at most 0.80 × nginx",
            target(false, OURS, &NGINX, 0.80),
        ),
        (
            "64 B: at most 0.76 × HAProxy",
            target(false, OURS, &HAPROXY, 0.76),
        ),
        (
            "64 KiB, copying: at most 1.00 × epoll",
            target(true, OUR_COPY, &[EPOLL], 1.0),
        ),
        (
            "64 KiB, copying: at most 0.50 × nginx as it comes",
            target(true, OUR_COPY, &NGINX[..1], 0.5),
        ),
        (
            "64 KiB, copying: at most 0.50 × HAProxy as it comes",
            target(true, OUR_COPY, &HAPROXY[..1], 0.5),
        ),
        (
            "64 KiB, splicing: at most 0.78 × the copying epoll",
            target(true, OUR_SPLICE, &[EPOLL], 0.78),
        ),
        (
            "64 KiB, splicing: at most 1.00 × the splicing epoll",
            target(true, OUR_SPLICE, &[EPOLL_SPLICE], 1.0),
        ),
    ] {
        let all = (run.cells.iter().zip(tolerances))
            .filter(|(cell, _)| is_of(cell, target.large))
            .filter_map(|(cell, tolerance)| {
                let (rival, ratio) = against_best(cell, target.ours, target.rivals)?;
                Some(judged(cell, tolerance, rival, ratio, target.limit))
            })
            .collect();
        figures.push(figure(claim, all));
    }
    figures.push(figure(
        "p99 no worse than the best of the others",
        by_p99(run),
    ));
    figures.push(figure(
        "1,000 stalled readers: the others' p99 under 2 × what it was before",
        by_stall(run),
    ));
    figures
}

fn figure(claim: &str, judged: Vec<Judged>) -> Figure {
    Figure::in_every(&format!("proxy, {claim}"), judged)
}

/// Whether it is the cell of large messages, or that of small ones.
fn is_of(cell: &CellResult, large: bool) -> bool {
    let cell = &cell.cell;
    cell.lineup == Lineup::Proxy && cell.kind == Kind::Echo && (cell.size >= BUFFER) == large
}

/// Against whichever of the rivals ours is worst against.
fn against_best(
    cell: &CellResult,
    ours: &str,
    rivals: &[&'static str],
) -> Option<(&'static str, Ratio)> {
    let ratios = (rivals.iter()).filter_map(|rival| Some((*rival, against(cell, ours, rival)?)));
    ratios.max_by(|a, b| a.1.calm.total_cmp(&b.1.calm))
}

/// The ratio of two latencies at a rate that all keep up with, each the median over the paced runs.
fn by_p99(run: &Run) -> Vec<Judged> {
    let mut all = Vec::new();
    for cell in (run.cells.iter()).filter(|cell| cell.cell.lineup == Lineup::Proxy) {
        let p99 = |name: &str| median(&cell.contender(name)?.each_paced(|paced| paced.p99_us));
        let rivals = [EPOLL, EPOLL_SPLICE]
            .into_iter()
            .chain(NGINX)
            .chain(HAPROXY);
        let best =
            (rivals.filter_map(|name| Some((name, p99(name)?)))).min_by(|a, b| a.1.total_cmp(&b.1));
        let (Some(ours), Some((rival, best))) = (p99(OURS), best) else {
            continue;
        };
        let again = p99(EPOLL_AGAIN)
            .zip(p99(EPOLL))
            .map_or(0.0, |(again, once)| stats::deviation(again / once));
        all.push(once(cell, rival, ours / best, 1.0, again));
    }
    all
}

/// The ratio of ours with stalled readers to ours without, in the same run.
fn by_stall(run: &Run) -> Vec<Judged> {
    let cells = (run.cells.iter()).filter(|cell| cell.cell.kind == Kind::Stalled);
    cells
        .filter_map(|cell| {
            let ratio = median(&slowdowns(cell, OURS))?;
            Some(once(cell, "itself", ratio, 2.0, 0.0))
        })
        .collect()
}

/// How many times longer a contender's p99 is with stalled readers than before they came, round by round.
pub fn slowdowns(cell: &CellResult, name: &str) -> Vec<f64> {
    let rounds = cell.contender(name).map(|contender| &contender.rounds);
    (rounds.into_iter().flatten())
        .filter_map(|round| Some(round.p99_us / round.calm_p99_us?))
        .collect()
}

/// A ratio that there is but one of.
fn once(cell: &CellResult, rival: &str, ratio: f64, limit: f64, tolerance: f64) -> Judged {
    let ratio = Ratio {
        minimum: ratio,
        calm: ratio,
        median: ratio,
        error: 0.0,
    };
    let tolerance = Tolerance {
        calm: tolerance,
        median: tolerance,
    };
    judged(cell, &tolerance, rival, ratio, limit)
}
