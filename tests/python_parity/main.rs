//! ringsock beside CPython 3.11: the same steps, the same outcomes.
//!
//! ```text
//!  cases.txt ──▶ record.py, on CPython ──▶ recorded.json ─┐
//!      │                                                  ├──▶ equal, but for deviations.txt
//!      └───────▶ interpreter.rs, on ringsock ─────────────┘
//! ```
//!
//! What CPython answers is never written by hand: record.py records it (how: see there), and where CPython 3.11 is installed a
//! test records anew and compares. What ringsock does otherwise, on purpose, stands in deviations.txt with the reason and must
//! happen exactly as it stands there. sequences.rs compares random steps with a Python that runs beside.
#![allow(unsafe_code)]

#[path = "../support/mod.rs"]
mod support;

mod interpreter;
mod language;
mod sequences;
mod table;

use std::collections::HashMap;
use std::fs;
use std::process::Command;

use interpreter::Environment;
use support::{TempDir, checked};
use table::{Case, cases, deviations, recorded};

/// CPython 3.11, with which outcomes are recorded; `None`, said on a line, where it is not installed.
fn python() -> Option<&'static str> {
    let script = "import sys; sys.exit(sys.implementation.name != 'cpython' or sys.version_info[:2] != (3, 11))";
    let fits = |program: &&str| {
        let status = Command::new(program).args(["-c", script]).status();
        status.is_ok_and(|status| status.success())
    };
    let found = ["python3.11", "python3"].into_iter().find(fits);
    if found.is_none() {
        println!("skipped: there is no CPython 3.11");
    }
    found
}

const RECORDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python_parity/record.py");

/// Runs every case on ringsock: what differs from the record, and from the list of deviations.
fn differences(cases: &[Case]) -> Vec<String> {
    let recorded = recorded();
    let mut deviations = deviations();
    let mut found = Vec::new();
    for case in cases {
        let outcomes = &recorded[&case.name];
        let mut environment = Environment::new();
        for (index, (step, expected)) in case.steps.iter().zip(outcomes).enumerate() {
            let outcome = environment.outcome(step);
            let deviation = deviations.remove(&(case.name.clone(), index + 1));
            let is_as_told = match &deviation {
                Some(listed) => *listed == outcome && outcome != *expected,
                None => outcome == *expected,
            };
            if !is_as_told {
                let listed =
                    deviation.map_or(String::new(), |listed| format!("\n  listed:   {listed}"));
                let (name, number) = (&case.name, index + 1);
                found.push(format!(
                    "{step}\n  CPython:  {expected}{listed}\n  ringsock, as a line of the list:\n{name} ~ {number} ~ {outcome}"
                ));
            }
        }
    }
    let unused = deviations.keys().map(|(case, step)| {
        format!("{case} ~ {step}: there is no such step, or it is listed for nothing")
    });
    found.extend(unused);
    found
}

fn assert_as_recorded(cases: &[Case]) {
    let found = differences(cases);
    assert!(
        found.is_empty(),
        "{} differences:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn the_record_is_of_this_table() {
    let mut recorded = recorded();
    let mut recorded_steps = table::recorded_steps();
    for case in cases() {
        let steps = recorded_steps.remove(&case.name);
        // A case may have ended early, by an assignment that failed.
        let steps = steps.unwrap_or_default();
        let kept = case.steps.starts_with(&steps) && !steps.is_empty();
        let ended = steps.last().is_some_and(|step| step.contains(" = "));
        assert!(
            kept && (ended || steps.len() == case.steps.len()),
            "record again: {}",
            case.name
        );
        let outcomes = recorded.remove(&case.name).unwrap_or_default();
        assert_eq!(outcomes.len(), steps.len());
    }
    assert!(recorded.is_empty(), "record again: {:?}", recorded.keys());
}

#[test]
fn on_a_thread_as_cpython() {
    checked(|| assert_as_recorded(&cases()));
}

#[test]
fn in_a_fiber_as_cpython() {
    checked(|| ringsock::run(|| assert_as_recorded(&cases())));
}

#[test]
fn the_record_is_what_cpython_answers() {
    let Some(python) = python() else { return };
    let dir = TempDir::new();
    let path = dir.path().join("recorded.json");
    let output = Command::new(python)
        .arg(RECORDER)
        .arg(&path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let fresh = fs::read_to_string(path).unwrap();
    let kept: Vec<_> = table::RECORDED.lines().collect();
    let fresh: Vec<_> = fresh.lines().collect();
    for (number, (kept, fresh)) in kept.iter().zip(&fresh).enumerate() {
        assert_eq!(kept, fresh, "line {} of recorded.json", number + 1);
    }
    assert_eq!(kept.len(), fresh.len());
}

#[test]
fn the_table_is_large() {
    let mut groups: Vec<(String, usize)> = Vec::new();
    let mut seen = HashMap::new();
    for case in cases() {
        let group = case.name.split(':').next().unwrap().to_string();
        let index = *seen.entry(group.clone()).or_insert_with(|| {
            groups.push((group, 0));
            groups.len() - 1
        });
        groups[index].1 += 1;
    }
    let total: usize = groups.iter().map(|(_, count)| count).sum();
    println!("{total} cases: {groups:?}");
    assert!(total >= 400);
}
