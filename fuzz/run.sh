#!/usr/bin/env bash
# Runs the fuzz targets, one after the other: so many executions each, from the seeds and what earlier runs have found.
#
#     fuzz/run.sh [RUNS] [TARGET...]        20,000,000 executions, all targets
#     fuzz/run.sh 60s [TARGET...]           a minute each
#
# Needs `cargo install cargo-fuzz`. RUSTC_BOOTSTRAP lets the stable compiler pass the sanitizer's flags. Corpora that grow stay in
# fuzz/corpus, a failing input is written to fuzz/artifacts and named at the end.
#
# Not among "all": socket_calls_live, which makes its calls on real sockets, with timeouts of 50 microseconds, and so does 100 to
# 2,000 executions a second. `fuzz/run.sh 60s socket_calls_live` plays it for a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-20000000}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(cqe_sequences control_messages addresses proxy_header socket_calls)
case $runs in
    *s) limit="-max_total_time=${runs%s}" ;;
    *) limit="-runs=$runs" ;;
esac
export RUSTC_BOOTSTRAP=1
for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target"
    printf '\n== %s\n' "$target"
    build=() options=(-max_len=512)
    if [ "$target" = socket_calls ]; then
        # Its bytes choose what happens, so there is nothing in comparisons to learn from; and how often each piece of code ran, which
        # differs with every choice, would fill the corpus and take half the time.
        build=(--no-trace-compares) options=(-max_len=256 -entropic=0 -use_counters=0)
    fi
    # Stacks of fibers that hold no pointers to what they leaked would look like leaks; what is counted is in the targets.
    cargo fuzz run ${build[@]+"${build[@]}"} "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        "$limit" "${options[@]}" -timeout=20 -detect_leaks=0 -print_final_stats=1 2>&1 |
        grep -vE '^#|NEW_FUNC|INFO:' || exit 1
done
