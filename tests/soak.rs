//! A short run of the soak (`examples/soak`): traffic through faults, every byte checked, nothing left behind.
#![allow(unsafe_code)]

mod support;

use support::{Process, TempDir};

#[test]
fn a_short_soak_passes_and_draws_its_plot() {
    let dir = TempDir::new();
    let plot = dir.path().join("soak.svg");
    let plot_arg = plot.to_str().expect("a path of letters");
    let args = ["--minutes", "0.2", "--sessions", "48", "--plot", plot_arg];
    let finished = Process::example("soak", args).wait();
    let said = String::from_utf8_lossy(&finished.stdout);
    assert!(finished.status.success(), "{finished:?}");
    assert!(said.ends_with("soak: passed\n"), "{finished:?}");
    println!("{said}");
    let drawn = std::fs::read_to_string(&plot).expect("the plot was written");
    assert!(drawn.contains("<svg") && drawn.contains("descriptors"));
}
