//! The table of cases, the record of what CPython answers, and the list of deviations.

use std::collections::HashMap;

const CASES: &str = include_str!("cases.txt");
const DEVIATIONS: &str = include_str!("deviations.txt");
pub const RECORDED: &str = include_str!("recorded.json");

pub struct Case {
    pub name: String,
    pub steps: Vec<String>,
}

/// The cases, with their placeholders filled in: as `cases` of record.py does it.
pub fn cases() -> Vec<Case> {
    let mut lists: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut found: Vec<Case> = Vec::new();
    let mut list = None;
    for line in CASES.lines() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('@') {
            list = Some(lists.entry(name.trim()).or_default());
        } else if let Some(name) = line.strip_prefix("= ") {
            list = None;
            found.push(Case {
                name: name.trim().to_string(),
                steps: Vec::new(),
            });
        } else if let Some(items) = &mut list {
            items.push(line.trim());
        } else {
            let case = found.last_mut().expect("a step belongs to a case");
            case.steps.push(line.trim().to_string());
        }
    }
    found
        .into_iter()
        .flat_map(|case| expanded(case, &lists))
        .collect()
}

fn expanded(case: Case, lists: &HashMap<&str, Vec<&str>>) -> Vec<Case> {
    let Some((_, rest)) = case.name.split_once('{') else {
        return vec![case];
    };
    let list = rest.split_once('}').expect("a placeholder ends").0;
    let placeholder = format!("{{{list}}}");
    let with = |item: &&str| Case {
        name: case.name.replacen(&placeholder, item, 1),
        steps: case
            .steps
            .iter()
            .map(|step| step.replace(&placeholder, item))
            .collect(),
    };
    let cases = lists[list].iter().map(with);
    cases.flat_map(|case| expanded(case, lists)).collect()
}

fn record() -> serde_json::Map<String, serde_json::Value> {
    serde_json::from_str(RECORDED).expect("recorded.json is as record.py writes it")
}

fn column(column: usize) -> HashMap<String, Vec<String>> {
    let texts = |steps: serde_json::Value| -> Vec<String> {
        let steps = steps.as_array().expect("a list of steps").iter();
        steps
            .map(|step| step[column].as_str().expect("a text").to_string())
            .collect()
    };
    record()
        .into_iter()
        .map(|(name, steps)| (name, texts(steps)))
        .collect()
}

/// The outcomes of each case.
pub fn recorded() -> HashMap<String, Vec<String>> {
    column(1)
}

/// The steps of each case when it was recorded.
pub fn recorded_steps() -> HashMap<String, Vec<String>> {
    column(0)
}

/// What ringsock answers instead, by case and number of the step.
///
/// The list is a line `! name: reason` for each deviation, and below it, for each step, `case ~ number of the step ~ outcome`.
pub fn deviations() -> HashMap<(String, usize), String> {
    let mut found = HashMap::new();
    let mut used = true;
    for line in DEVIATIONS.lines() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(deviation) = line.strip_prefix("! ") {
            assert!(used, "the deviation before this one has no case: {line}");
            assert!(deviation.contains(": "), "a deviation has a reason: {line}");
            used = false;
            continue;
        }
        let parts: Vec<_> = line.splitn(3, " ~ ").collect();
        let [case, step, outcome] = parts[..] else {
            panic!("deviations.txt: {line}");
        };
        let key = (
            case.trim().to_string(),
            step.trim().parse().expect("a number"),
        );
        let outcome = outcome.trim().to_string();
        assert!(found.insert(key, outcome).is_none(), "listed twice: {line}");
        used = true;
    }
    assert!(used, "the last deviation has no case");
    found
}
