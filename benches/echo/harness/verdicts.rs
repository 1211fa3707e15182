//! What a run says: ratios, how far chance goes, and which figures were reached. Computes; does not format.

use std::io;

use super::cells::{Cell, Family, Kind, Lineup};
use super::contenders::{AGAIN, EPOLLS, LIMITS, OUR_EPOLL, OUR_LEASES, OURS, OWN_BUFFERS};
use super::json::{CellResult, ContenderResult, Run};
use super::proxy;
use super::stats::{self, Ratio, Tolerance, Verdict, judge, median, minimum};

/// Two runs agree if no ratio differs by more than this share.
pub const AGREEMENT: f64 = 0.05;
/// A ratio to epoll is known well enough once its standard error is no larger share of it: the medians of two runs then differ by
/// [`AGREEMENT`] only where they are three such errors apart.
pub const PRECISION: f64 = 0.012;

/// Whether a cell of the main line-up compares what its contenders cost to what epoll costs.
pub fn compares(cell: &Cell) -> bool {
    compares_in(cell, Lineup::Main)
}

/// Whether a cell is of this line-up, and compares what its contenders cost to what epoll costs.
pub fn compares_in(cell: &Cell, lineup: Lineup) -> bool {
    cell.lineup == lineup && cell.takes_turns()
}

/// What `first` costs in a cell against what `second` does.
pub fn against(cell: &CellResult, first: &str, second: &str) -> Option<Ratio> {
    let of = |name| Some(cell.contender(name)?.slices());
    stats::ratio(&of(first)?, &of(second)?, &calm(cell))
}

/// The passes of a cell in which the machine was fastest.
fn calm(cell: &CellResult) -> Vec<usize> {
    let contenders = cell.contenders.iter().map(ContenderResult::slices);
    stats::calm(&contenders.collect::<Vec<_>>())
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
pub fn against_epoll(cell: &CellResult, name: &str) -> Option<Ratio> {
    let all = epolls(&cell.cell)
        .iter()
        .filter_map(|epoll| against(cell, name, epoll));
    let mut worst: Option<Ratio> = None;
    for ratio in all {
        let so_far = worst.get_or_insert(ratio);
        so_far.minimum = so_far.minimum.max(ratio.minimum);
        so_far.calm = so_far.calm.max(ratio.calm);
        if ratio.median > so_far.median {
            (so_far.median, so_far.error) = (ratio.median, ratio.error);
        }
    }
    worst
}

/// Which contenders of a cell have to play on for every ratio to epoll to be known to within [`PRECISION`]: those whose is not, and
/// if there are any, the epolls.
pub fn uncertain(cell: &CellResult) -> Vec<bool> {
    let epolls = epolls(&cell.cell);
    let error = |name: &str| {
        let errors = (epolls.iter().filter(|epoll| **epoll != name))
            .filter_map(|epoll| Some(against(cell, name, epoll)?.error));
        errors.fold(0.0, f64::max)
    };
    let open: Vec<bool> = (cell.contenders.iter())
        .map(|contender| error(&contender.name) > PRECISION)
        .collect();
    let any = open.contains(&true);
    (cell.contenders.iter().zip(open))
        .map(|(contender, open)| open || any && epolls.contains(&&*contender.name))
        .collect()
}

/// How far chance goes in each cell.
pub fn tolerances(run: &Run) -> Vec<Tolerance> {
    let again: Vec<Option<Ratio>> = (run.cells.iter())
        .map(|cell| against(cell, again(&cell.cell), epolls(&cell.cell)[0]))
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
    pub fn calm(&self) -> Verdict {
        judge(self.ratio.calm, self.limit, self.tolerance.calm)
    }

    pub fn median(&self) -> Verdict {
        judge(self.ratio.median, self.limit, self.tolerance.median)
    }

    /// Both statistics have to hold.
    pub fn verdict(&self) -> Verdict {
        match (self.calm(), self.median()) {
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
                let ratio = against_epoll(cell, OURS)?;
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
                let counted = stats::ratio(&instructions(OURS)?, &instructions("raw-single")?, &[]);
                let ratio = counted.or_else(|| against(cell, OURS, "raw-single"))?;
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
        calm: tolerance.calm * limit.min(1.0),
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
                let ratio = against(cell, OURS, rival)?;
                let tolerance = of_limit(tolerance, limit);
                Some(judged(cell, &tolerance, rival, ratio, limit))
            })
            .collect();
        figures.push(Figure::in_every(claim, all));
    }
    for rival in rivals(run) {
        let all = main()
            .filter_map(|(cell, tolerance)| {
                let ratio = against(cell, OURS, &rival)?;
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
                let ratio = against(cell, "ringsock timeout", OURS)?;
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
                let ratio = stats::ratio(&p50(contender)?, &p50("epoll")?, &[])?;
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
        !ours
            && ![AGAIN, OWN_BUFFERS].contains(&name)
            && !EPOLLS.contains(&name)
            && !LIMITS.contains(&name)
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
    /// The largest difference of a ratio by a statistic that judges, as a share.
    pub difference: f64,
    /// A sentence for each statistic.
    pub sentences: String,
}

/// Compares the ratios to epoll of every contender that both runs have.
pub fn agreement(run: &Run, earlier: &Run) -> io::Result<Agreement> {
    if run.measure != earlier.measure {
        return Err(io::Error::other("the two runs did not measure the same"));
    }
    let mut pairs = Vec::new();
    for cell in run.cells.iter().filter(|cell| compares(&cell.cell)) {
        let Some(before) = earlier.cells.iter().find(|before| before.cell == cell.cell) else {
            continue;
        };
        for contender in &cell.contenders {
            let now = against_epoll(cell, &contender.name);
            let then = against_epoll(before, &contender.name);
            if let (Some(now), Some(then)) = (now, then) {
                pairs.push((&cell.cell.name, &contender.name, then, now));
            }
        }
    }
    if pairs.is_empty() {
        return Err(io::Error::other("the two runs have nothing in common"));
    }
    let mut agreement = Agreement {
        difference: 0.0,
        sentences: format!("Of {} ratios to epoll, in the two runs:", pairs.len()),
    };
    type Statistic = (&'static str, bool, fn(&Ratio) -> f64);
    let statistics: [Statistic; 3] = [
        ("median", true, |ratio| ratio.median),
        ("calm", true, |ratio| ratio.calm),
        ("minimum", false, |ratio| ratio.minimum),
    ];
    for (name, judges, pick) in statistics {
        let of =
            |(_, _, then, now): &(_, _, Ratio, Ratio)| stats::deviation(pick(now) / pick(then));
        let shares: Vec<f64> = pairs.iter().map(of).collect();
        let (cell, contender, then, now) = (pairs.iter())
            .max_by(|a, b| of(a).total_cmp(&of(b)))
            .expect("there are some");
        let largest = shares.iter().copied().fold(0.0, f64::max);
        if judges {
            agreement.difference = agreement.difference.max(largest);
        }
        agreement.sentences += &format!(
            "\n* {name}: half differ by less than {:.1} %, {} by more than {:.0} %, the most by {:.1} % ({contender} in {cell}: \
             {:.3}, then {:.3}).",
            100.0 * median(&shares).unwrap_or_default(),
            shares.iter().filter(|share| **share > AGREEMENT).count(),
            100.0 * AGREEMENT,
            100.0 * largest,
            pick(then),
            pick(now),
        );
    }
    Ok(agreement)
}

/// The smallest and the middle of what a contender's slices cost.
pub fn cost(contender: &ContenderResult) -> Option<(f64, f64)> {
    let slices = contender.slices();
    Some((minimum(&slices)?, median(&slices)?))
}

#[cfg(test)]
mod tests {
    // A bench is built with cfg(test) but without its tests, which `tests/echo_bench.rs` runs.
    #[allow(unused_imports)]
    use super::super::json::Round;
    #[allow(unused_imports)]
    use super::*;

    #[test]
    fn those_whose_ratio_is_not_known_well_play_on_beside_the_epolls() {
        let contender = |name: &str, slices: [f64; 9]| ContenderResult {
            name: name.to_owned(),
            rounds: vec![Round {
                slices: slices.to_vec(),
                ..Round::default()
            }],
            ..ContenderResult::default()
        };
        let steady = [10.0, 10.1, 10.0, 10.1, 10.0, 10.1, 10.0, 10.1, 10.0];
        let wild = [10.0, 12.0, 8.0, 13.0, 9.0, 10.0, 11.0, 7.0, 14.0];
        let mut cell = CellResult {
            cell: Cell::echo(Family::Tcp, 64, 64, 1),
            offered: None,
            contenders: vec![
                contender(OURS, steady),
                contender(EPOLLS[0], steady),
                contender(AGAIN, steady),
                contender("threads", wild),
            ],
        };
        assert_eq!(uncertain(&cell), [false, true, false, true]);
        cell.contenders.pop();
        assert_eq!(uncertain(&cell), [false; 3]);
    }
}
