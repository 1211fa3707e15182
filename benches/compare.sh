#!/usr/bin/env bash
# Compares echo servers: rate, processor time and context switches per message.
#
#   benches/compare.sh [--family tcp|unix] [--connections 64] [--size 64] [--depth 1]
#                      [--messages 400000] [--rounds 5] [--buffer 4096]
#                      [--server-cpu 0] [--load-cpu 1] [--servers "name=command;name=command…"]
#
# Every round starts each server afresh on one processor, runs the load on
# another, and takes the differences of the server's counters around the load
# (which echoes a tenth more messages as warm-up, counted here too). The order
# rotates from round to round. The first contender is the one that the ratios at
# the end refer to; "epoll-again" is "epoll" once more, to show how far two
# rows can differ by chance.
#
# In a command, {yardstick} is the bench program, {target} Cargo's target
# directory, {buffer} the value of --buffer, and {listen} the options that say
# where to listen (--bind 127.0.0.1:0 or --unix PATH), added at the end if absent.
# A server must print "listening on ADDRESS" once it listens. One whose program
# does not exist is left out.
#
# Processor time is the time of all threads of the server, from schedstat; its
# split into user and system time is the kernel's, to clock ticks. Instructions
# and cycles are added where `perf stat` can count them.
#
# Environment: YARDSTICK names a bench program to use, and then nothing is built;
# CARGO_TARGET_DIR as for Cargo; PERF_EVENTS replaces the events counted.
set -u -o pipefail
export LC_ALL=C
shopt -s nullglob

family=tcp connections=64 size=64 depth=1 messages=400000 rounds=5 buffer=4096
server_cpu=0 load_cpu=1
servers='raw-single={yardstick} raw-single --size {buffer}'
servers+=';raw-multi={yardstick} raw-multi --size {buffer}'
servers+=';epoll={yardstick} epoll --size {buffer}'
servers+=';epoll-again={yardstick} epoll --size {buffer}'
servers+=';ringsock={target}/release/examples/echo_server'

die() { echo "compare.sh: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --family|--connections|--size|--depth|--messages|--rounds|--buffer|--server-cpu|--load-cpu|--servers)
            [ $# -ge 2 ] || die "$1 wants a value"
            name=${1#--}; printf -v "${name//-/_}" %s "$2"; shift 2 ;;
        *) die "unknown argument $1 (see --help)" ;;
    esac
done
case $family in tcp|unix) ;; *) die "--family is tcp or unix" ;; esac

cd "$(dirname "$0")/.." || exit 1
target=${CARGO_TARGET_DIR:-target}
if [ -z "${YARDSTICK:-}" ]; then
    cargo build --quiet --release --benches --examples || die "the build failed"
    for file in "$target"/release/deps/yardstick-*; do
        [ -f "$file" ] && [ -x "$file" ] || continue
        if [ -z "${YARDSTICK:-}" ] || [ "$file" -nt "$YARDSTICK" ]; then YARDSTICK=$file; fi
    done
    [ -n "${YARDSTICK:-}" ] || die "no $target/release/deps/yardstick-*"
fi

scratch=$(mktemp -d) || exit 1
server='' load=''
stop() { # ends the server, if one runs
    [ -n "$server" ] || return 0
    kill "$server" 2>/dev/null
    local i
    for ((i = 0; i < 100; i++)); do
        kill -0 "$server" 2>/dev/null || break
        sleep 0.02
    done
    kill -KILL "$server" 2>/dev/null
    wait "$server" 2>/dev/null
    server=''
}
cleanup() {
    [ -n "$load" ] && kill "$load" 2>/dev/null
    stop
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

events=${PERF_EVENTS:-instructions:u,instructions:k,cycles:u,cycles:k}
perf=false
if command -v perf >/dev/null && perf stat -x, -e "$events" -o "$scratch/perf" -- true 2>/dev/null; then
    perf=$(awk -F, 'BEGIN { good = "true" } NF > 2 && !/^#/ { seen++; if ($1 !~ /^[0-9.]+$/) good = "false" }
                    END { print (seen ? good : "false") }' "$scratch/perf")
fi
$perf || events=''

# The counters of process $1: processor time in ns, user and system time in
# ticks, voluntary context switches; over all threads.
counters() {
    local tasks=(/proc/"$1"/task/*)
    echo "$(cat "${tasks[@]/%//schedstat}" 2>/dev/null | awk '{ ns += $1 } END { printf "%.0f", ns }')" \
         "$(sed 's/.*) //' "/proc/$1/stat" | cut -d' ' -f12,13)" \
         "$(cat "${tasks[@]/%//status}" 2>/dev/null | awk '/^voluntary/ { n += $2 } END { printf "%.0f", n }')"
}

# Starts command $1 in the background; sets server and where (options of load).
start() {
    local listen command i address
    if [ "$family" = unix ]; then listen="--unix $scratch/socket"; else listen='--bind 127.0.0.1:0'; fi
    command=$1
    case $command in *'{listen}'*) ;; *) command+=' {listen}' ;; esac
    command=${command//'{yardstick}'/$YARDSTICK}
    command=${command//'{target}'/$target}
    command=${command//'{buffer}'/$buffer}
    command=${command//'{listen}'/$listen}
    rm -f "$scratch/socket"
    : >"$scratch/out" # here, or the last server's address could be read below
    # Words are split on purpose: the command is a command line.
    # shellcheck disable=SC2086
    taskset -c "$server_cpu" $command >"$scratch/out" 2>"$scratch/err" &
    server=$!
    for ((i = 0; i < 500; i++)); do
        address=$(sed -n 's/^listening on //p;/^listening on /q' "$scratch/out")
        [ -n "$address" ] && break
        kill -0 "$server" 2>/dev/null || break
        sleep 0.02
    done
    if [ -z "$address" ]; then
        cat "$scratch/err" >&2
        die "no 'listening on' from: $command"
    fi
    if [ "$family" = unix ]; then where="--unix $scratch/socket"; else where="--connect $address"; fi
}

names=() commands=()
IFS=';' read -r -a list <<<"$servers"
for item in "${list[@]}"; do
    [ -n "$item" ] || continue
    name=${item%%=*} command=${item#*=}
    [ "$name" != "$item" ] || die "not name=command: $item"
    program=${command%% *}
    program=${program//'{yardstick}'/$YARDSTICK}
    program=${program//'{target}'/$target}
    if command -v "$program" >/dev/null; then
        names+=("$name") commands+=("$command")
    else
        echo "left out: $name ($program does not exist)"
    fi
done
[ ${#names[@]} -gt 0 ] || die "no contender"

echo "$family, $connections connections, $size bytes, depth $depth, $messages messages, $rounds rounds; kernel $(uname -r)"
$perf || echo "(perf stat cannot count instructions and cycles here)"
head=(messages/s cpu-ns user-ns system-ns switches p50-us p99-us)
if $perf; then IFS=, read -r -a more <<<"$events"; head+=("${more[@]}"); fi
printf '%-5s %-14s' round contender; printf ' %14s' "${head[@]}"; echo

ticks=$(getconf CLK_TCK)
for ((round = 1; round <= rounds; round++)); do
    for ((turn = 0; turn < ${#names[@]}; turn++)); do
        which=$(((turn + round - 1) % ${#names[@]}))
        start "${commands[which]}"
        run=(taskset -c "$load_cpu" "$YARDSTICK" load)
        read -r -a options <<<"$where"
        run+=("${options[@]}" --connections "$connections" --size "$size" --depth "$depth")
        run+=(--messages "$messages" --json)
        $perf && run=(perf stat -x, -e "$events" -p "$server" -o "$scratch/perf" -- "${run[@]}")
        before=$(counters "$server")
        "${run[@]}" >"$scratch/load" &
        load=$!
        wait "$load" || die "the load on ${names[which]} failed"
        load=''
        after=$(counters "$server")
        stop
        counted=''
        $perf && counted=$(awk -F, 'NF > 2 && !/^#/ { printf " %s", $1 }' "$scratch/perf")
        echo "$before $after$counted" | awk -v load="$(cat "$scratch/load")" -v ticks="$ticks" \
            -v round="$round" -v name="${names[which]}" -v table="$scratch/table" '
            function field(key) {
                if (!match(load, "\"" key "\":[0-9.]+")) return 0
                return substr(load, RSTART + length(key) + 3, RLENGTH - length(key) - 3)
            }
            {
                all = field("messages") + field("warmup")
                value[1] = field("messages_per_second")
                value[2] = ($5 - $1) / all
                value[3] = ($6 - $2) * 1e9 / ticks / all
                value[4] = ($7 - $3) * 1e9 / ticks / all
                value[5] = ($8 - $4) / all
                value[6] = field("p50_us")
                value[7] = field("p99_us")
                for (i = 9; i <= NF; i++) value[i - 1] = $i / all
                printf "%-5s %-14s", round, name
                printf "%s", name >> table
                for (i = 1; i <= (NF > 8 ? NF - 1 : 7); i++) {
                    printf (i == 5 ? " %14.4f" : " %14.1f"), value[i]
                    printf " %.6f", value[i] >> table
                }
                print ""; print "" >> table
            }'
    done
done

awk -v heads="${head[*]}" '
    {
        if (!($1 in rows)) order[++contenders] = $1
        rows[$1]++
        for (i = 2; i <= NF; i++) value[$1, i - 1, rows[$1]] = $i
        columns = NF - 1
    }
    function spread(name, column,    i, j, x) { # sets low, middle, high
        n = rows[name]
        for (i = 1; i <= n; i++) {
            x = value[name, column, i]
            for (j = i - 1; j >= 1 && sorted[j] > x; j--) sorted[j + 1] = sorted[j]
            sorted[j + 1] = x
        }
        low = sorted[1]; high = sorted[n]
        middle = n % 2 ? sorted[(n + 1) / 2] : (sorted[n / 2] + sorted[n / 2 + 1]) / 2
    }
    function ratio(a, b) { return b ? sprintf("%.3f", a / b) : "-" }
    END {
        split(heads, head, " ")
        for (c = 1; c <= columns; c++) {
            printf "\n%-22s %12s %12s %12s %10s %10s\n", head[c] (c == 1 || c == 6 || c == 7 ? "" : " per message"), \
                "minimum", "median", "maximum", "min/first", "med/first"
            for (k = 1; k <= contenders; k++) {
                spread(order[k], c)
                if (k == 1) { first_low = low; first_middle = middle }
                form = c == 5 ? "%12.4f" : "%12.1f"
                printf "  %-20s " form " " form " " form " %10s %10s\n", order[k], low, middle, high, \
                    ratio(low, first_low), ratio(middle, first_middle)
            }
        }
    }' "$scratch/table"
