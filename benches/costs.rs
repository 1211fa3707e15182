//! Prints what the fibers' own tools cost: one figure a line, the minimum over rounds that take turns.
//!
//! `cargo bench --bench costs [ROUNDS]` (7 rounds if not said, at least 5). The harness of the echo benchmark reports the same figures.

#[path = "echo/harness/costs.rs"]
mod figures;

fn main() {
    // Cargo passes `--bench`.
    let rounds = std::env::args().find_map(|argument| argument.parse().ok());
    for (name, ns) in figures::figures(rounds.unwrap_or(7).max(5)) {
        println!("{ns:10.1} ns  {name}");
    }
}
