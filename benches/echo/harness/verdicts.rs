//! What a run says: ratios, how far chance goes, and which figures were reached. Computes; does not format.

use std::io;

use super::cells::{Cell, Family, Kind, Lineup};
use super::contenders::{AGAIN, EPOLLS, LIMITS, OUR_EPOLL, OUR_LEASES, OURS};
use super::json::{CellResult, ContenderResult, Run};
use super::proxy;
use super::stats::{self, Ratio, Tolerance, Verdict, judge, median, minimum};

/// Whether a cell of the main line-up compares what its contenders cost to what epoll costs.
pub fn compares(cell: &Cell) -> bool {
    compares_in(cell, Lineup::Main)
}

/// Whether a cell is of this line-up, and compares what its contenders cost to what epoll costs.
pub fn compares_in(cell: &Cell, lineup: Lineup) -> bool {
    cell.lineup == lineup && cell.kind != Kind::Idle
}

/// What `first` costs in a cell against what `second` does.
pub fn against(run: &Run, cell: &CellResult, first: &str, second: &str) -> Option<Ratio> {
    let costs = |name| Some(cell.contender(name)?.costs(run.measure));
    let cheapest = |name| minimum(&cell.contender(name)?.cheapest(run.measure));
    Some(Ratio {
        minimum: cheapest(first)? / cheapest(second)?,
        ..stats::ratio(&costs(first)?, &costs(second)?)?
    })
}

/// What a cell's contenders are compared to.
fn epolls(cell: &Cell) -> &'static [&'static str] {
    match cell.lineup {
        Lineup::Proxy => &[proxy::EPOLL],
        _ => &EPOLLS,
    }
}

/// The contender that is the first of those once more.
pub fn again(cell: &Cell) -> &'static str {
    match cell.lineup {
        Lineup::Proxy => proxy::EPOLL_AGAIN,
        _ => AGAIN,
    }
}

/// What a contender costs against epoll: the better of its two kinds in this cell, by each statistic.
pub fn against_epoll(run: &Run, cell: &CellResult, name: &str) -> Option<Ratio> {
    let all = epolls(&cell.cell)
        .iter()
        .filter_map(|epoll| against(run, cell, name, epoll));
    let mut worst: Option<Ratio> = None;
    for ratio in all {
        let so_far = worst.get_or_insert(ratio);
        so_far.minimum = so_far.minimum.max(ratio.minimum);
        so_far.median = so_far.median.max(ratio.median);
    }
    worst
}

/// How far chance goes in each cell.
pub fn tolerances(run: &Run) -> Vec<Tolerance> {
    let again: Vec<Option<Ratio>> = (run.cells.iter())
        .map(|cell| against(run, cell, again(&cell.cell), epolls(&cell.cell)[0]))
        .collect();
    stats::tolerances(&again)
}

/// A limit applied to one cell.
#[derive(Clone, Debug)]
pub struct Judged {
    pub cell: String,
    /// The contender ours is compared to.
    pub rival: String,
    pub ratio: Ratio,
    pub limit: f64,
    pub tolerance: Tolerance,
}

impl Judged {
    pub fn minimum(&self) -> Verdict {
        judge(self.ratio.minimum, self.limit, self.tolerance.minimum)
    }

    pub fn median(&self) -> Verdict {
        judge(self.ratio.median, self.limit, self.tolerance.median)
    }

    /// Both statistics have to hold.
    pub fn verdict(&self) -> Verdict {
        match (self.minimum(), self.median()) {
            (Verdict::Missed, _) | (_, Verdict::Missed) => Verdict::Missed,
            (Verdict::Within, _) | (_, Verdict::Within) => Verdict::Within,
            _ => Verdict::Reached,
        }
    }
}

/// A figure to reach, and what came of it cell by cell.
#[derive(Clone, Debug)]
pub struct Figure {
    pub claim: String,
    pub judged: Vec<Judged>,
    /// In how many of the cells it has to hold.
    pub wanted: usize,
}

impl Figure {
    pub fn in_every(claim: &str, judged: Vec<Judged>) -> Self {
        Self {
            claim: claim.to_owned(),
            wanted: judged.len(),
            judged,
        }
    }

    /// Cells in which it holds, chance allowed for.
    pub fn held(&self) -> usize {
        let holds = |judged: &&Judged| judged.verdict() != Verdict::Missed;
        self.judged.iter().filter(holds).count()
    }

    pub fn reached(&self) -> bool {
        self.held() >= self.wanted
    }
}

/// A cell's part of a figure.
pub fn judged(
    cell: &CellResult,
    tolerance: &Tolerance,
    rival: &str,
    ratio: Ratio,
    limit: f64,
) -> Judged {
    Judged {
        cell: cell.cell.name.clone(),
        rival: rival.to_owned(),
        ratio,
        limit,
        tolerance: *tolerance,
    }
}

/// The limit of ours against epoll in a cell.
fn epoll_limit(cell: &Cell) -> f64 {
    match (cell.kind, cell.family) {
        (Kind::Churn, _) => 0.95,
        // The ring's copy of a large message into a Unix socket costs what epoll's does, and its completion comes on top.
        (Kind::Echo, Family::Unix) if cell.size >= 64 << 10 => 1.05,
        _ => 1.0,
    }
}

/// All figures, in the order of the report. One whose cells or contenders did not run is left out.
pub fn figures(run: &Run) -> Vec<Figure> {
    let tolerances = tolerances(run);
    let cells = || run.cells.iter().zip(&tolerances);
    let main = || cells().filter(|(cell, _)| compares(&cell.cell));
    let mut figures = Vec::new();
    let by_epoll = |kinds: &[Kind]| -> Vec<Judged> {
        main()
            .filter(|(cell, _)| kinds.contains(&cell.cell.kind))
            .filter_map(|(cell, tolerance)| {
                let ratio = against_epoll(run, cell, OURS)?;
                Some(judged(
                    cell,
                    tolerance,
                    "epoll",
                    ratio,
                    epoll_limit(&cell.cell),
                ))
            })
            .collect()
    };
    figures.push(Figure::in_every(
        "against epoll: at most 1.00 × in every cell (Unix 64 KiB: 1.05)",
        by_epoll(&[Kind::Echo, Kind::Fanout]),
    ));
    figures.push(Figure::in_every(
        "churn against epoll: at most 0.95 ×",
        by_epoll(&[Kind::Churn]),
    ));
    // Instructions decide where the machine counts them, the kernel's included.
    let by_raw = |limit: f64| -> Vec<Judged> {
        main()
            .filter(|(cell, _)| cell.cell.kind == Kind::Echo)
            .filter_map(|(cell, tolerance)| {
                let instructions = |name| Some(cell.contender(name)?.instructions());
                let counted = stats::ratio(&instructions(OURS)?, &instructions("raw-single")?);
                let ratio = counted.or_else(|| against(run, cell, OURS, "raw-single"))?;
                Some(judged(cell, tolerance, "raw-single", ratio, limit))
            })
            .collect()
    };
    figures.push(Figure::in_every(
        "against raw-single: at most 1.05 × in every cell",
        by_raw(1.05),
    ));
    let half = by_raw(1.03);
    figures.push(Figure {
        claim: "against raw-single: at most 1.03 × in half of the cells".to_owned(),
        wanted: half.len().div_ceil(2),
        judged: half,
    });
    // The tolerance is a share of a ratio: at a tenth of epoll's cost it is a tenth as much.
    let of_limit = |tolerance: &Tolerance, limit: f64| Tolerance {
        minimum: tolerance.minimum * limit.min(1.0),
        median: tolerance.median * limit.min(1.0),
    };
    for (claim, segmented, rival, limit) in [
        (
            "datagrams, peers that do not segment: at most 0.85 × recvfrom and sendto with epoll",
            false,
            EPOLLS[0],
            0.85,
        ),
        (
            "datagrams, peers that do not segment: at most 1.05 × recvmmsg and sendmmsg with epoll",
            false,
            EPOLLS[2],
            1.05,
        ),
        (
            "datagrams, peers that segment: at most 0.1 × recvfrom and sendto with epoll",
            true,
            EPOLLS[0],
            0.1,
        ),
        (
            "datagrams, peers that segment: at most 1.1 × UDP_GRO and UDP_SEGMENT with epoll",
            true,
            EPOLLS[3],
            1.1,
        ),
    ] {
        let all = main()
            .filter(|(cell, _)| cell.cell.is_bursts() && cell.cell.segmented == segmented)
            .filter_map(|(cell, tolerance)| {
                let ratio = against(run, cell, OURS, rival)?;
                let tolerance = of_limit(tolerance, limit);
                Some(judged(cell, &tolerance, rival, ratio, limit))
            })
            .collect();
        figures.push(Figure::in_every(claim, all));
    }
    for rival in rivals(run) {
        let all = main()
            .filter_map(|(cell, tolerance)| {
                let ratio = against(run, cell, OURS, &rival)?;
                Some(judged(cell, tolerance, &rival, ratio, 1.0))
            })
            .collect();
        figures.push(Figure::in_every(
            &format!("against {rival}: under 1.00 × in every cell"),
            all,
        ));
    }
    for (family, limit) in [(Family::Tcp, 1.03), (Family::Unix, 1.06)] {
        let all = cells()
            .filter(|(cell, _)| cell.cell.lineup == Lineup::Timeouts && cell.cell.family == family)
            .filter_map(|(cell, tolerance)| {
                let ratio = against(run, cell, "ringsock timeout", OURS)?;
                Some(judged(cell, tolerance, "no timeout", ratio, limit))
            })
            .collect();
        let claim = format!(
            "a timeout on every operation, {}: at most {limit} × none",
            family.name()
        );
        figures.push(Figure::in_every(&claim, all));
    }
    let by_latency = |contender: &str, limit: f64| -> Vec<Judged> {
        cells()
            .filter(|(cell, _)| cell.cell.lineup == Lineup::Spin)
            .filter_map(|(cell, tolerance)| {
                let p50 = |name| Some(cell.contender(name)?.each(|round| round.p50_us));
                let ratio = stats::ratio(&p50(contender)?, &p50("epoll")?)?;
                Some(judged(cell, tolerance, "epoll", ratio, limit))
            })
            .collect()
    };
    figures.push(Figure::in_every(
        "latency with one connection: p50 at most epoll's",
        by_latency(OURS, 1.0),
    ));
    figures.push(Figure::in_every(
        "latency with one connection, spinning: p50 at most a quarter of epoll's, which sleeps",
        by_latency("ringsock spin", 0.25),
    ));
    figures.extend(proxy::figures(run, &tolerances));
    figures.retain(|figure| !figure.judged.is_empty());
    figures
}

/// Contenders that are to be beaten in every cell: neither ours, nor epoll, nor limits.
fn rivals(run: &Run) -> Vec<String> {
    let mut names = names(run, Lineup::Main);
    names.retain(|name| {
        let name = name.as_str();
        let ours = [OURS, OUR_LEASES, OUR_EPOLL].contains(&name);
        !ours && name != AGAIN && !EPOLLS.contains(&name) && !LIMITS.contains(&name)
    });
    names
}

/// The contenders of a line-up, in order.
pub fn names(run: &Run, lineup: Lineup) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for cell in run.cells.iter().filter(|cell| cell.cell.lineup == lineup) {
        for contender in &cell.contenders {
            if !names.contains(&contender.name) {
                names.push(contender.name.clone());
            }
        }
    }
    names
}

/// Half of what epoll did at full speed, to two digits: a rate that every contender is to keep up with.
pub fn offered(cell: &CellResult) -> Option<f64> {
    let reference = cell
        .contender(epolls(&cell.cell)[0])
        .or(cell.contenders.first())?;
    let rate = median(&reference.each(|round| round.messages_per_second))? / 2.0;
    let scale = 10f64.powf(rate.log10().floor() - 1.0);
    Some((rate / scale).floor() * scale)
}

/// Every contender that failed: its cell, its name and how.
pub fn broken(run: &Run) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    for cell in &run.cells {
        for contender in &cell.contenders {
            if let Some(how) = &contender.broken {
                found.push((cell.cell.name.clone(), contender.name.clone(), how.clone()));
            }
        }
    }
    found
}

/// How well two runs agree.
pub struct Agreement {
    /// The largest difference of a ratio, as a share.
    pub difference: f64,
    pub sentence: String,
}

/// Compares the ratios to epoll, by the minimum, of every contender that both runs have.
pub fn agreement(run: &Run, earlier: &Run) -> io::Result<Agreement> {
    if run.measure != earlier.measure {
        return Err(io::Error::other("the two runs did not measure the same"));
    }
    let mut differences = Vec::new();
    for cell in run.cells.iter().filter(|cell| compares(&cell.cell)) {
        let Some(before) = earlier.cells.iter().find(|before| before.cell == cell.cell) else {
            continue;
        };
        for contender in &cell.contenders {
            let now = against_epoll(run, cell, &contender.name);
            let then = against_epoll(earlier, before, &contender.name);
            if let (Some(now), Some(then)) = (now, then) {
                let difference = stats::deviation(now.minimum / then.minimum);
                differences.push((difference, &cell.cell.name, &contender.name, then, now));
            }
        }
    }
    let count = differences.len();
    let shares: Vec<f64> = differences.iter().map(|each| each.0).collect();
    let largest = differences.into_iter().max_by(|a, b| a.0.total_cmp(&b.0));
    let Some((difference, cell, contender, then, now)) = largest else {
        return Err(io::Error::other("the two runs have nothing in common"));
    };
    let sentence = format!(
        "Of {count} ratios to epoll (minimum), the largest difference to the earlier run is {:.1} % ({contender} in {cell}: \
         {:.3}, then {:.3}); the median difference is {:.1} %.",
        100.0 * difference,
        then.minimum,
        now.minimum,
        100.0 * median(&shares).unwrap_or_default(),
    );
    Ok(Agreement {
        difference,
        sentence,
    })
}

/// The smallest and the middle of a contender's costs.
pub fn cost(run: &Run, contender: &ContenderResult) -> Option<(f64, f64)> {
    let cheapest = contender.cheapest(run.measure);
    Some((minimum(&cheapest)?, median(&contender.costs(run.measure))?))
}
