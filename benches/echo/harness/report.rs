//! What a person reads: tables for the terminal and for Markdown, which are the same, since Markdown's tables read well as they are.

use std::fmt::Write;

use super::cells::{Kind, Lineup};
use super::counters::Measure;
use super::json::{CellResult, ContenderResult, Run};
use super::plot::Plot;
use super::proxy;
use super::stats::{Ratio, Verdict, median, minimum};
use super::verdicts::{self, Figure, Judged};

/// What stands for nothing.
const NOTHING: &str = "–";

/// A table: aligned in plain text, and Markdown as it stands.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|&each| each.to_owned()).collect()],
        }
    }

    fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// The first column to the left, the others to the right.
    fn render(&self) -> String {
        let columns = self.rows[0].len();
        let width = |column: usize| {
            let widths = self.rows.iter().map(|row| row[column].chars().count());
            widths.max().unwrap_or(0).max(3)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let fill = " ".repeat(width - cell.chars().count());
                if column == 0 {
                    write!(out, "| {cell}{fill} ").expect("to a string");
                } else {
                    write!(out, "| {fill}{cell} ").expect("to a string");
                }
            }
            out.push_str("|\n");
            if index == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let (dashes, colon) = if column == 0 {
                        (width + 2, "")
                    } else {
                        (width + 1, ":")
                    };
                    write!(out, "|{}{colon}", "-".repeat(dashes)).expect("to a string");
                }
                out.push_str("|\n");
            }
        }
        out
    }
}

/// The whole report, for the terminal.
pub fn terminal(run: &Run) -> String {
    let mut out = format!("\n{}\n\n{}", conditions(run), ratios(run));
    for cell in &run.cells {
        write!(
            out,
            "\n{}: {}\n\n{}",
            cell.cell.name,
            cell.cell.title(),
            details(run, cell)
        )
        .expect("to a string");
    }
    let costs = costs(run);
    if !costs.is_empty() {
        write!(out, "\nSpawn, switch and the like\n\n{costs}").expect("to a string");
    }
    write!(out, "\n{}\n{}", judgement(run), notes(run)).expect("to a string");
    out
}

/// The whole report, in Markdown. `prefix` leads from it to the plots.
pub fn markdown(run: &Run, plots: &[Plot], prefix: &str) -> String {
    let mut out = String::from(
        "# Results of the echo benchmark\n\n\
         Made by `cargo bench --bench echo -- --record`; [how it measures and how to read it](README.md), \
         [what brought each gain](GAINS.md), [every raw round](",
    );
    write!(out, "{prefix}echo.json).\n\n{}\n", conditions(run)).expect("to a string");
    for plot in plots {
        write!(out, "\n![{}]({prefix}{})\n", plot.title, plot.file).expect("to a string");
    }
    write!(out, "\n## Figures to reach\n\n{}", judgement(run)).expect("to a string");
    write!(
        out,
        "\n## Cost against epoll\n\n{}\n{}",
        ratios(run),
        notes(run)
    )
    .expect("to a string");
    out.push_str("\n## Cell by cell\n");
    for cell in &run.cells {
        write!(
            out,
            "\n### `{}`: {}\n\n{}",
            cell.cell.name,
            cell.cell.title(),
            details(run, cell)
        )
        .expect("to a string");
    }
    let costs = costs(run);
    if !costs.is_empty() {
        write!(out, "\n## Spawn, switch and the like\n\n{costs}").expect("to a string");
    }
    out.push_str("\n## The machine\n\n");
    let mut table = Table::new(&["", ""]);
    for (name, value) in &run.machine.0 {
        table.push(vec![name.clone(), value.replace('|', "\\|")]);
    }
    out.push_str(&table.render());
    out
}

/// A sentence or two about what was measured and how well.
fn conditions(run: &Run) -> String {
    let stolen: Vec<f64> = all_rounds(run).map(|round| round.stolen).collect();
    let most = stolen.iter().copied().fold(0.0, f64::max);
    let slices = all_rounds(run).map(|round| round.slices.len()).max();
    let contenders = run.cells.iter().flat_map(|cell| &cell.contenders);
    let rounds = contenders.map(|contender| contender.rounds.len()).max();
    let further = rounds.unwrap_or_default().saturating_sub(run.rounds);
    let further = match further {
        0 => String::new(),
        further => format!(
            " (and up to {further} more where a ratio to epoll was not known to ± {:.1} %)",
            100.0 * verdicts::PRECISION
        ),
    };
    let mut out = format!(
        "{} {} round{} of at most {} slices for each{further}, in {:.0} min; of a round the hypervisor took {:.1} % in the middle and {:.1} % at \
         most.",
        run.measure.sentence(),
        run.rounds,
        if run.rounds == 1 { "" } else { "s" },
        slices.unwrap_or_default(),
        run.seconds / 60.0,
        100.0 * median(&stolen).unwrap_or_default(),
        100.0 * most,
    );
    let tolerances = verdicts::tolerances(run);
    let compared: Vec<_> = (run.cells.iter().zip(&tolerances))
        .filter(|(cell, _)| {
            cell.contender(verdicts::again(&cell.cell))
                .is_some_and(|again| !again.rounds.is_empty())
        })
        .collect();
    if !compared.is_empty() {
        let of = |pick: fn(&super::stats::Tolerance) -> f64| {
            let values: Vec<f64> = compared
                .iter()
                .map(|(_, tolerance)| 100.0 * pick(tolerance))
                .collect();
            let largest = values.iter().copied().fold(0.0, f64::max);
            format!(
                "{:.1} % ({largest:.1} % in the noisiest cell)",
                median(&values).unwrap_or_default()
            )
        };
        write!(
            out,
            " Epoll against itself differs by ε = {} in the calm passes and {} in all: verdicts allow for each cell's own ε.",
            of(|tolerance| tolerance.calm),
            of(|tolerance| tolerance.median),
        )
        .expect("to a string");
    }
    if let Some(why) = &run.uncounted {
        write!(out, " {why}").expect("to a string");
    }
    out
}

fn all_rounds(run: &Run) -> impl Iterator<Item = &super::json::Round> {
    let contenders = run.cells.iter().flat_map(|cell| &cell.contenders);
    contenders.flat_map(|contender| &contender.rounds)
}

/// Cells by contenders: the median ratio to epoll.
fn ratios(run: &Run) -> String {
    let tables = [Lineup::Main, Lineup::Proxy].map(|lineup| ratios_in(run, lineup));
    let tables: Vec<String> = (tables.into_iter())
        .filter(|table| !table.is_empty())
        .collect();
    tables.join("\n")
}

fn ratios_in(run: &Run, lineup: Lineup) -> String {
    let names = verdicts::names(run, lineup);
    let mut head = vec!["median / epoll's"];
    head.extend(names.iter().map(String::as_str));
    head.push("ε");
    let mut table = Table::new(&head);
    let tolerances = verdicts::tolerances(run);
    for (cell, tolerance) in run
        .cells
        .iter()
        .zip(&tolerances)
        .filter(|(cell, _)| verdicts::compares_in(&cell.cell, lineup))
    {
        let mut row = vec![cell.cell.name.clone()];
        for name in &names {
            let ratio = verdicts::against_epoll(cell, name);
            row.push(match (cell.contender(name), ratio) {
                (Some(contender), _) if contender.broken.is_some() => "FAILED".to_owned(),
                (_, Some(ratio)) => format!("{:.2}", ratio.median),
                _ => NOTHING.to_owned(),
            });
        }
        row.push(format!("{:.3}", tolerance.median));
        table.push(row);
    }
    if table.rows.len() == 1 {
        String::new()
    } else {
        table.render()
    }
}

/// Everything about a cell.
fn details(run: &Run, cell: &CellResult) -> String {
    if cell.cell.kind == Kind::Idle {
        return idle(cell);
    }
    let unit = run.measure.unit();
    let (cheapest, middle) = (format!("{unit}/msg min"), format!("{unit}/msg median"));
    let mut head = vec![
        "",
        &cheapest,
        &middle,
        "min/epoll",
        "calm/epoll",
        "med/epoll",
        "± %",
        "messages/s",
    ];
    let hard = run.measure == Measure::Cycles;
    if hard {
        head.extend(["instr user", "instr kernel"]);
    } else if cell
        .contenders
        .iter()
        .any(|each| each.instructions_user.is_some())
    {
        head.push("instr user");
    }
    let instructions = head.contains(&"instr user");
    head.extend(["calls/msg", "switches/msg", "p50 µs", "p99 µs", "p99.9 µs"]);
    let lossy = all_lost(cell) > 0.0;
    if lossy {
        head.push("lost");
    }
    let disturbed = cell.cell.kind == Kind::Stalled;
    if disturbed {
        head.push("p99 / before");
    }
    head.push("peak MiB");
    let mut table = Table::new(&head);
    for contender in &cell.contenders {
        let mut row = vec![contender.name.clone()];
        if contender.rounds.is_empty() && why_not(contender).is_some() {
            row.push(mark(contender).to_owned());
            row.resize(head.len(), String::new());
            table.push(row);
            continue;
        }
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| NOTHING.to_owned(), |value| format!("{value:.digits$}"))
        };
        let cost = verdicts::cost(contender);
        row.push(number(cost.map(|cost| cost.0), 0));
        row.push(number(cost.map(|cost| cost.1), 0));
        let ratio = verdicts::against_epoll(cell, &contender.name);
        row.push(number(ratio.map(|ratio| ratio.minimum), 3));
        row.push(number(ratio.map(|ratio| ratio.calm), 3));
        row.push(number(ratio.map(|ratio| ratio.median), 3));
        row.push(number(ratio.map(|ratio| 100.0 * ratio.error), 1));
        row.push(number(
            median(&contender.each(|round| round.messages_per_second)),
            0,
        ));
        if hard {
            let of = |pick: fn(&super::counters::Hard) -> f64| {
                let values: Vec<f64> = (contender.rounds.iter())
                    .filter_map(|round| round.hardware.as_ref().map(pick))
                    .collect();
                median(&values)
            };
            row.push(number(of(|hard| hard.instructions_user), 0));
            row.push(number(of(|hard| hard.instructions_kernel), 0));
        } else if instructions {
            row.push(number(contender.instructions_user, 0));
        }
        row.push(number(contender.calls, 3));
        row.push(number(contender.switches, 3));
        // A rate that all can keep up with says more about latency than each at its own full speed.
        let [p50, p99, p999] = if cell.cell.paced() {
            [
                contender.each_paced(|paced| paced.p50_us),
                contender.each_paced(|paced| paced.p99_us),
                contender.each_paced(|paced| paced.p999_us),
            ]
        } else {
            [
                contender.each(|round| round.p50_us),
                contender.each(|round| round.p99_us),
                contender.each(|round| round.p999_us),
            ]
        };
        for quantile in [p50, p99, p999] {
            row.push(number(median(&quantile), 0));
        }
        if lossy {
            row.push(number(median(&contender.each(|round| round.lost)), 0));
        }
        if disturbed {
            let slowdowns = proxy::slowdowns(cell, &contender.name);
            let most = slowdowns.iter().copied().reduce(f64::max);
            let [least, middle, most] =
                [minimum(&slowdowns), median(&slowdowns), most].map(|value| number(value, 2));
            row.push(format!("{middle} ({least}–{most})"));
        }
        row.push(number(
            minimum(&contender.each(|round| round.peak_rss_kib / 1024.0)),
            1,
        ));
        table.push(row);
    }
    let mut out = table.render() + &reasons(cell);
    if let Some(rate) = cell.offered {
        write!(out, "\nLatency at {rate:.0} messages/s offered to each, from when a message should have been sent.\n").expect("to a string");
        for contender in &cell.contenders {
            let kept = median(&contender.each_paced(|paced| paced.messages_per_second));
            if let Some(kept) = kept.filter(|kept| *kept < 0.95 * rate) {
                writeln!(
                    out,
                    "{} did not keep up: {kept:.0} messages/s.",
                    contender.name
                )
                .expect("to a string");
            }
        }
    }
    out
}

fn all_lost(cell: &CellResult) -> f64 {
    let rounds = cell
        .contenders
        .iter()
        .flat_map(|contender| &contender.rounds);
    rounds.map(|round| round.lost).sum()
}

/// Why a contender has no figures.
fn why_not(contender: &ContenderResult) -> Option<String> {
    match (&contender.broken, &contender.cannot) {
        (Some(how), _) => Some(format!("FAILED: {how}")),
        (None, Some(reason)) => Some(reason.clone()),
        _ => None,
    }
}

/// What stands for the figures of a contender that has none.
fn mark(contender: &ContenderResult) -> &'static str {
    if contender.broken.is_some() {
        "FAILED"
    } else {
        NOTHING
    }
}

/// Under a table: why contenders have no figures.
fn reasons(cell: &CellResult) -> String {
    let mut out = String::new();
    for contender in &cell.contenders {
        if let Some(reason) = why_not(contender) {
            let first = if out.is_empty() { "\n" } else { "" };
            writeln!(out, "{first}* {}: {reason}", contender.name).expect("to a string");
        }
    }
    out
}

fn idle(cell: &CellResult) -> String {
    let mut table = Table::new(&["", "server, B/connection", "whole machine, B/connection"]);
    for contender in &cell.contenders {
        let memory = contender.rounds.first().and_then(|round| round.idle);
        table.push(match (why_not(contender), memory) {
            (Some(_), _) => vec![
                contender.name.clone(),
                mark(contender).to_owned(),
                String::new(),
            ],
            (None, Some(memory)) => {
                let bytes = |value: f64| format!("{value:.0}");
                vec![
                    contender.name.clone(),
                    bytes(memory.server),
                    bytes(memory.machine),
                ]
            }
            (None, None) => vec![
                contender.name.clone(),
                NOTHING.to_owned(),
                NOTHING.to_owned(),
            ],
        });
    }
    table.render() + &reasons(cell)
}

fn costs(run: &Run) -> String {
    if run.costs.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["", "ns"]);
    for (name, ns) in &run.costs {
        table.push(vec![name.trim().to_owned(), format!("{ns:.1}")]);
    }
    table.render()
}

/// The figures to reach, each as reached or not, and then every cell that missed.
fn judgement(run: &Run) -> String {
    let figures = verdicts::figures(run);
    if figures.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["figure", "holds in", "", "worst, calm and median"]);
    for figure in &figures {
        table.push(vec![
            figure.claim.clone(),
            format!("{} of {}", figure.held(), figure.judged.len()),
            if figure.reached() {
                "reached"
            } else {
                "**NOT reached**"
            }
            .to_owned(),
            worst(figure),
        ]);
    }
    let mut out = table.render();
    let mut missed = Table::new(&[
        "limit + ε exceeded",
        "against",
        "calm",
        "median",
        "limit",
        "ε calm",
        "ε median",
    ]);
    let mut seen: Vec<&Judged> = Vec::new();
    for judged in figures.iter().flat_map(|figure| &figure.judged) {
        let told = seen
            .iter()
            .any(|each| (&each.cell, &each.rival) == (&judged.cell, &judged.rival));
        if judged.verdict() == Verdict::Missed && !told {
            seen.push(judged);
            let marked = |value: f64, verdict: Verdict| match verdict {
                Verdict::Missed => format!("**{value:.3}**"),
                _ => format!("{value:.3}"),
            };
            missed.push(vec![
                judged.cell.clone(),
                judged.rival.clone(),
                marked(judged.ratio.calm, judged.calm()),
                marked(judged.ratio.median, judged.median()),
                format!("{:.2}", judged.limit),
                format!("{:.3}", judged.tolerance.calm),
                format!("{:.3}", judged.tolerance.median),
            ]);
        }
    }
    if !seen.is_empty() {
        write!(out, "\n{}", missed.render()).expect("to a string");
    }
    out
}

fn worst(figure: &Figure) -> String {
    let worse = |judged: &Judged| judged.ratio.calm.max(judged.ratio.median) / judged.limit;
    let worst = figure
        .judged
        .iter()
        .max_by(|a, b| worse(a).total_cmp(&worse(b)));
    worst.map_or_else(String::new, |worst| {
        let Ratio { calm, median, .. } = worst.ratio;
        format!("{calm:.3}, {median:.3} in {}", worst.cell)
    })
}

/// Who could not do what, each reason once.
fn notes(run: &Run) -> String {
    let mut reasons: Vec<(String, Vec<&str>)> = Vec::new();
    for cell in &run.cells {
        for contender in &cell.contenders {
            if let Some(reason) = why_not(contender) {
                let note = format!("{}: {reason}", contender.name);
                match reasons.iter_mut().find(|(known, _)| *known == note) {
                    Some((_, cells)) => cells.push(&cell.cell.name),
                    None => reasons.push((note, vec![&cell.cell.name])),
                }
            }
        }
    }
    let mut out = String::new();
    for (reason, cells) in reasons {
        writeln!(out, "* {reason} ({})", cells.join(", ")).expect("to a string");
    }
    out
}
