#!/usr/bin/env bash
# Counts the user-space instructions an echo server spends per echo.
#
#   benches/instructions.sh [--connections 64] [--size 64] [--depth 1]
#                           [--first 20000] [--second 60000] [--keep DIRECTORY]
#                           [--with callgrind|perf] [--] SERVER_COMMAND…
#
# Runs the server twice under callgrind, with --first and with --second messages
# from the load generator, and divides the difference in instructions by the
# difference in messages, so that start-up and connections cancel out. The
# server is any program that prints "listening on ADDRESS" once it listens;
# {echo} and {target} stand for the bench program and Cargo's target
# directory. Under callgrind a server is slow beside the load generator, so that
# it finds as many events at once as the connections and depth allow: counts
# are of large batches unless there is one connection.
#
# Without valgrind, or if a server does not run under it, `perf stat` counts
# instead where it can. --keep keeps callgrind's files, for callgrind_annotate.
#
# Environment: ECHO_BENCH names a bench program to use, and then nothing is built;
# CARGO_TARGET_DIR as for Cargo.
set -u -o pipefail
export LC_ALL=C
shopt -s nullglob

connections=64 size=64 depth=1 first=20000 second=60000 keep='' with=''
die() { echo "instructions.sh: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --connections|--size|--depth|--first|--second|--keep|--with)
            [ $# -ge 2 ] || die "$1 wants a value"
            printf -v "${1#--}" %s "$2"; shift 2 ;;
        --) shift; break ;;
        -*) die "unknown argument $1 (see --help)" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || die "no server command (see --help)"
[ "$second" -gt "$first" ] || die "--second must be more than --first"
if [ -n "$keep" ]; then
    mkdir -p "$keep" || exit 1
    keep=$(cd "$keep" && pwd)
fi

cd "$(dirname "$0")/.." || exit 1
target=${CARGO_TARGET_DIR:-target}
if [ -z "${ECHO_BENCH:-}" ]; then
    cargo build --quiet --release --benches --examples || die "the build failed"
    for file in "$target"/release/deps/echo-*; do
        [ -f "$file" ] && [ -x "$file" ] || continue
        if [ -z "${ECHO_BENCH:-}" ] || [ "$file" -nt "$ECHO_BENCH" ]; then ECHO_BENCH=$file; fi
    done
    [ -n "${ECHO_BENCH:-}" ] || die "no $target/release/deps/echo-*"
fi
command=()
for word in "$@"; do
    word=${word//'{echo}'/$ECHO_BENCH}
    command+=("${word//'{target}'/$target}")
done

scratch=$(mktemp -d) || exit 1
server=''
# The server is killed outright: callgrind has written its totals by then, and
# valgrind does not see a SIGTERM while a server waits in io_uring_enter.
stop() {
    [ -n "$server" ] || return 0
    kill -KILL "$server" 2>/dev/null
    wait "$server" 2>/dev/null
    server=''
}
trap 'stop; rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Starts the server (behind the given words); sets server and where.
start() {
    local i address=''
    : >"$scratch/out"
    "$@" "${command[@]}" >"$scratch/out" 2>"$scratch/err" &
    server=$!
    for ((i = 0; i < 300; i++)); do
        address=$(sed -n 's/^listening on //p;/^listening on /q' "$scratch/out")
        [ -n "$address" ] && break
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    [ -n "$address" ] || return 1
    # An address that does not end in a port is the path of a Unix socket.
    if [[ $address =~ :[0-9]+$ ]]; then where=(--connect "$address"); else where=(--unix "$address"); fi
}

load() { # $1 messages
    "$ECHO_BENCH" load echo "${where[@]}" --connections "$connections" --size "$size" --depth "$depth" \
        --messages "$1" --warmup 0 >"$scratch/load"
}

# Both of these set total to the instructions spent on $1 messages, or fail.
by_callgrind() {
    local file="$scratch/callgrind.$1" i
    start valgrind --tool=callgrind --callgrind-out-file="$file" \
        --vgdb=yes --vgdb-prefix="$scratch/vgdb" || return 1
    load "$1" || return 1
    sleep 0.3 # for the connections to be closed
    # The dump comes in a file of its own, with the suffix .1.
    timeout 60 vgdb --vgdb-prefix="$scratch/vgdb" --pid="$server" dump >/dev/null 2>&1
    for ((i = 0; i < 100; i++)); do
        total=$(awk '$1 == "totals:" { print $2 }' "$file.1" 2>/dev/null)
        [ -n "$total" ] && break
        sleep 0.1
    done
    stop
    [ -n "$total" ] || return 1
    if [ -n "$keep" ]; then cp "$file.1" "$keep/callgrind.$1"; fi
}

by_perf() {
    start env || return 1
    # perf runs the load, and counts the server for as long.
    perf stat -x, -e instructions:u -p "$server" -o "$scratch/perf" -- \
        "$ECHO_BENCH" load echo "${where[@]}" --connections "$connections" --size "$size" \
        --depth "$depth" --messages "$1" --warmup 0 >"$scratch/load" || return 1
    stop
    total=$(awk -F, '/instructions/ { print $1 }' "$scratch/perf")
    [[ $total =~ ^[0-9]+$ ]]
}

ways=(callgrind perf)
[ -n "$with" ] && ways=("$with")
for way in "${ways[@]}"; do
    case $way in
        callgrind) command -v valgrind >/dev/null && command -v vgdb >/dev/null || continue ;;
        perf) command -v perf >/dev/null || continue ;;
        *) die "--with is callgrind or perf" ;;
    esac
    total=''
    if "by_$way" "$first"; then
        less=$total total=''
        if "by_$way" "$second"; then
            awk -v less="$less" -v more="$total" -v first="$first" -v second="$second" -v way="$way" \
                -v what="$connections connections, $size bytes, depth $depth" 'BEGIN {
                printf "%.1f user instructions per echo (%s; %s; %d for %d messages, %d for %d)\n",
                    (more - less) / (second - first), what, way, less, first, more, second
            }'
            exit 0
        fi
    fi
    stop
    echo "instructions.sh: $way did not work out:" >&2
    tail -n 20 "$scratch/err" >&2
done
die "no way to count instructions here"
