//! What a run ran on: figures mean nothing without it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

/// The machine and the programs, as lines of a name and a value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine(pub Vec<(String, String)>);

impl Machine {
    /// Describes this machine; `root` is the project's directory.
    pub fn here(root: &Path) -> Self {
        let mut lines = Vec::new();
        let mut say = |name: &str, value: Option<String>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                lines.push((name.to_owned(), value));
            }
        };
        say("Date", said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]));
        say("Commit", commit(root));
        say("Processor", cpu());
        say("Hypervisor", Some(hypervisor()));
        say("Memory", memory());
        say("Kernel", said("uname", &["-srm"]));
        say("Mitigations", Some(mitigations()));
        say("Rust", said("rustc", &["--version"]));
        say("Python", said("python3", &["--version"]));
        say("Peers", Some(peers(root)));
        Self(lines)
    }
}

/// The first line a program says.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn commit(root: &Path) -> Option<String> {
    let root = root.to_str()?;
    let commit = said("git", &["-C", root, "rev-parse", "--short=12", "HEAD"])?;
    let changed = said(
        "git",
        &[
            "-C",
            root,
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            "src",
            "benches/echo",
        ],
    );
    let with = if changed.is_some_and(|line| !line.is_empty()) {
        " and changes"
    } else {
        ""
    };
    Some(commit + with)
}

fn cpu() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let count = text
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let model = value("model name")?;
    let mhz = value("cpu MHz").unwrap_or_default();
    Some(format!("{model}, {count} cores, {mhz} MHz"))
}

fn hypervisor() -> String {
    let flagged = fs::read_to_string("/proc/cpuinfo")
        .is_ok_and(|text| text.split_whitespace().any(|word| word == "hypervisor"));
    if flagged {
        "yes, this is a virtual machine"
    } else {
        "none"
    }
    .to_owned()
}

fn memory() -> Option<String> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib: f64 = (text.lines().next()?.split_whitespace().nth(1)?)
        .parse()
        .ok()?;
    Some(format!("{:.1} GiB", kib / 1048576.0))
}

/// What the kernel does about the processor's weaknesses that makes system calls and switches dearer.
fn mitigations() -> String {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/devices/system/cpu/vulnerabilities")
        .into_iter()
        .flatten()
        .flatten()
    {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let name = entry.file_name().to_string_lossy().into_owned();
        let text = text.trim();
        if text != "Not affected" && !text.is_empty() {
            found.push(format!("{name}: {text}"));
        }
    }
    found.sort();
    if found.is_empty() {
        "none".to_owned()
    } else {
        found.join("; ")
    }
}

/// The versions of the peers' runtimes, from their lock file.
fn peers(root: &Path) -> String {
    let lock = fs::read_to_string(root.join("benches/peers/Cargo.lock")).unwrap_or_default();
    versions(
        &lock,
        &["tokio", "monoio", "compio", "glommio", "tokio-uring", "may"],
    )
    .join(", ")
}

fn versions(lock: &str, names: &[&str]) -> Vec<String> {
    let quoted = |line: &str, key: &str| {
        Some(
            (line
                .strip_prefix(key)?
                .strip_prefix(" = \"")?
                .strip_suffix('"')?)
            .to_owned(),
        )
    };
    let packages: Vec<(String, String)> = lock
        .split("[[package]]")
        .filter_map(|package| {
            let name = package.lines().find_map(|line| quoted(line, "name"))?;
            Some((
                name,
                package.lines().find_map(|line| quoted(line, "version"))?,
            ))
        })
        .collect();
    (names.iter())
        .filter_map(|name| packages.iter().find(|(package, _)| package == name))
        .map(|(name, version)| format!("{name} {version}"))
        .collect()
}

#[cfg(test)]
mod tests {
    // A bench is built with cfg(test) but without its tests, which `tests/echo_bench.rs` runs.
    #[allow(unused_imports)]
    use super::*;

    #[test]
    fn versions_come_from_the_lock_file() {
        let lock = "[[package]]\nname = \"may\"\nversion = \"0.3.5\"\n\n[[package]]\nname = \"maybe\"\nversion = \"2.0.0\"\n";
        assert_eq!(versions(lock, &["tokio", "may"]), ["may 0.3.5"]);
    }

    #[test]
    fn a_machine_is_described() {
        let machine = Machine::here(Path::new("."));
        assert!(
            machine
                .0
                .iter()
                .any(|(name, value)| name == "Kernel" && value.starts_with("Linux "))
        );
    }
}
