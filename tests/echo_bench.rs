//! The echo benchmark's harness: its own unit tests, and that it finds out a contender whose echo is wrong.

// The bench target has no test harness, so that its modules' tests run here.
#[allow(dead_code)]
#[path = "../benches/echo/harness/mod.rs"]
mod harness;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The bench program, built as the tests were. `cargo test` does not build benches.
fn program() -> PathBuf {
    let mut build = Command::new(env!("CARGO"));
    build.args([
        "build",
        "--quiet",
        "--bench",
        "echo",
        "--message-format=json",
    ]);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    let output = build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let messages = String::from_utf8(output.stdout).expect("cargo speaks UTF-8");
    let program = messages.lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == "echo")
            .then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    program.expect("cargo names the program")
}

/// Runs one short round of one cell.
fn compare(contenders: &str, out: &Path) -> Output {
    Command::new(program())
        .args([
            "--quick",
            "--cells",
            "unix-1x16K",
            "--rounds",
            "1",
            "--peers",
            "none",
            "--contenders",
            contenders,
        ])
        .arg("--out")
        .arg(out)
        .output()
        .expect("the bench program runs")
}

#[test]
fn a_contender_whose_echo_is_wrong_fails_the_run_and_leaves_the_others_their_figures() {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("echo-corrupt");
    let output = compare("epoll,corrupt", &out);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("corrupt failed in unix-1x16K"), "{stderr}");
    assert!(stderr.contains("echoed wrong bytes"), "{stderr}");
    let text = std::fs::read_to_string(out.join("echo.json")).expect("written even so");
    let run: Value = serde_json::from_str(&text).expect("it parses");
    let contenders = &run["cells"][0]["contenders"];
    assert_eq!(contenders[0]["name"], "epoll");
    assert!(contenders[0]["broken"].is_null());
    let cost = contenders[0]["rounds"][0]["cpu_ns"]
        .as_f64()
        .expect("a number");
    assert!(cost > 0.0, "an echo costs {cost} ns");
    assert_eq!(contenders[1]["name"], "corrupt");
    assert!(
        contenders[1]["rounds"]
            .as_array()
            .expect("a list")
            .is_empty()
    );
}

#[test]
fn a_run_is_read_back_as_it_was_written_and_agrees_with_itself() {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("echo-again");
    let first = compare("epoll,epoll again,ringsock", &out);
    assert!(
        first.status.success(),
        "{}",
        String::from_utf8_lossy(&first.stderr)
    );
    let json = out.join("echo.json");
    let before = std::fs::read(&json).expect("written");
    let again = Command::new(program())
        .arg("--from")
        .arg(&json)
        .arg("--agree")
        .arg(&json)
        .arg("--out")
        .arg(&out)
        .output()
        .expect("the bench program runs");
    assert!(
        again.status.success(),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
    assert_eq!(std::fs::read(&json).expect("written again"), before);
    let stdout = String::from_utf8_lossy(&again.stdout);
    for statistic in ["median", "calm", "minimum"] {
        let none = format!(
            "* {statistic}: half differ by less than 0.0 %, 0 by more than 5 %, the most by 0.0 %"
        );
        assert!(stdout.contains(&none), "{stdout}");
    }
}
