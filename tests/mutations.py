#!/usr/bin/env python3
"""Shows that the tests guard what keeps this crate sound: switches off one guard after the other, and a named test has to fail.

    python3 tests/mutations.py                 all of them (half an hour on two cores)
    python3 tests/mutations.py NAME...         those whose name contains one of these
    python3 tests/mutations.py --limit 60      tests that hang are given up sooner
    python3 tests/mutations.py --list          what there is
    python3 tests/mutations.py --check         whether every text to replace is still there, without building anything

Each guard is a piece of text in one file that is replaced in a copy of the tree (under target/mutations, with a target directory of
its own). The tests must pass in the copy as it is; with the piece replaced it must still build, and then the tests named beside it
must fail, or not end. Exits with 1 if a mutant survives, does not build, or has gone stale: its text is not found, or found twice.

The numbers are those of the hazards that a completion-based engine has: 1 buffers the kernel owns, 2 timeouts, 3 partial sends,
4 descriptors nobody holds, 5 late completions, 7 close, 8 connect, 9 threads that end, 10 fork, 11 overflow, 13 bounds, 14 EMFILE,
15 failing enters, 16 locked memory, 17 refusals, 18 SIGPIPE, 19 stacks, 20 threads.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = os.path.join(ROOT, "target", "mutations")
TREE = os.path.join(WORK, "tree")
BUILD_LIMIT_S = 1800
TEST_LIMIT_S = 150


def test(binary, *names):
    """Tests of tests/BINARY.rs by their whole names."""
    return ["--test", binary, "--", "--exact", *names]


def lib(*names):
    """Unit tests, by their paths."""
    return ["--lib", "--", "--exact", *names]


def program(binary, *names):
    """Tests that start the example programs, which have to be built first."""
    return ["--examples", *test(binary, *names)]


SIMULATION = [
    "fiber::simulation::data_at_the_deadline_is_received_whole_and_in_order",
    "fiber::simulation::a_timed_send_reports_exactly_what_the_peer_gets",
    "fiber::simulation::sendall_sends_all_or_a_prefix_by_its_deadline",
    "fiber::simulation::every_connection_at_the_deadline_is_accepted_once",
    "fiber::simulation::a_busy_worker_keeps_every_promise",
]

# Name, file, text, replacement, tests of which at least one fails.
MUTATIONS = [
    (
        "1 an interrupt resumes without the final completion",
        "src/fiber/scheduler.rs",
        "            State::InOperation | State::Watching => self.cancel(fiber.key.get()),\n            State::Parked => {\n                self.end_wait(fiber.key.get());",
        "            State::Watching => self.cancel(fiber.key.get()),\n            State::InOperation | State::Parked => {\n                self.end_wait(fiber.key.get());",
        lib(*SIMULATION),
    ),
    (
        "1 a slot with an operation in flight is given away",
        "src/driver/slab.rs",
        'assert_eq!(slot.key, Key::NONE, "an operation is still in flight");',
        "let _ = slot;",
        lib("driver::slab::tests::a_slot_with_an_operation_in_flight_is_not_given_back"),
    ),
    (
        "2 data that came just in time is taken for a timeout",
        "src/fiber/mod.rs",
        "    if completion.res >= 0 {\n        return completion.res;\n    }\n    failed_in_fiber(",
        "    if completion.res >= 0 && !(timeout_ns >= 0 && completion.res & 1 == 1) {\n        return completion.res;\n    }\n"
        "    if completion.res >= 0 {\n        return outcome::TIMED_OUT;\n    }\n    failed_in_fiber(",
        lib(SIMULATION[0]),
    ),
    (
        "2 a cancelled receive forgets what has arrived",
        "src/fiber/mod.rs",
        "    if completion.res >= 0 {\n        return completion.res;\n    }\n    failed_in_fiber(",
        "    if completion.res >= 0 && !is_interrupted(fiber) {\n        return completion.res;\n    }\n"
        "    if completion.res >= 0 {\n        return outcome::CANCELLED;\n    }\n    failed_in_fiber(",
        test("races", "a_receive_against_a_cancel"),
    ),
    (
        "3 sendall goes on from the first byte",
        "src/socket/mod.rs",
        "            sent => self.sendall_rest(&bytes[sent.unwrap_or(0) as usize..], flags),",
        "            _ => self.sendall_rest(bytes, flags),",
        lib("fiber::simulation::sendall_sends_all_or_a_prefix_by_its_deadline"),
    ),
    (
        "3 a short send that did not wait is reported whole",
        "src/socket/mod.rs",
        "            Some(sent) if timeout_ns > 0 || sent as usize == bytes.len() => {\n                return Ok(sent as usize);",
        "            Some(sent) if timeout_ns > 0 || sent as usize == bytes.len() => {\n                return Ok(bytes.len().max(sent as usize));",
        lib("fiber::simulation::a_timed_send_reports_exactly_what_the_peer_gets"),
    ),
    (
        "3 a short send by the ring is reported whole",
        "src/socket/mod.rs",
        "        transferred(self.wait(op, Direction::Out, timeout_ns))\n",
        "        let len = match op {\n            Op::Send { buffer, .. } => buffer.len(),\n            _ => 0,\n        };\n"
        "        transferred(self.wait(op, Direction::Out, timeout_ns)).map(|sent| sent.max(len))\n",
        lib("fiber::simulation::a_timed_send_reports_exactly_what_the_peer_gets"),
    ),
    (
        "4 a cancelled accept forgets its connection",
        "src/fiber/mod.rs",
        "    if completion.res >= 0 {\n        return completion.res;\n    }\n    failed_in_fiber(",
        "    if completion.res >= 0 && !is_interrupted(fiber) {\n        return completion.res;\n    }\n"
        "    if completion.res >= 0 {\n        return outcome::CANCELLED;\n    }\n    failed_in_fiber(",
        test("hazards", "accepts_cancelled_just_as_a_client_comes_leak_and_lose_nothing"),
    ),
    (
        "4 a closed socket keeps its number",
        "src/socket/mod.rs",
        "            fiber::watch::end(&self.inflight);\n            sys::close(self.fd);",
        "            fiber::watch::end(&self.inflight);\n            if !self.inflight.is_closed() {\n                sys::close(self.fd);\n            }",
        test("close", "every_round_of_opening_and_closing_gives_its_descriptors_back"),
    ),
    (
        "5 the generation is not compared",
        "src/driver/slab.rs",
        "Some(slot) if slot.key == key && completion",
        "Some(slot) if slot.key != Key::NONE && completion",
        lib(
            "driver::slab::tests::a_late_cqe_never_hits_the_slots_next_operation",
            "driver::slab::tests::a_late_cqe_never_hits_a_slots_next_owner",
        ),
    ),
    (
        "5 F_MORE is not looked at",
        "src/driver/slab.rs",
        "completion.flags & (CQE_F_MORE | CQE_F_NOTIF) == 0 =>",
        "completion.flags & CQE_F_NOTIF == 0 =>",
        lib("driver::slab::tests::a_multi_cqe_operation_keeps_its_slot_and_its_first_result"),
    ),
    (
        "5 the notification's result replaces the first one",
        "src/driver/slab.rs",
        "let res = first.map_or(completion.res, |index| self.draining.swap_remove(index).1);",
        "let res = first.map_or(completion.res, |index| {\n            self.draining.swap_remove(index);\n            completion.res\n        });",
        lib("driver::slab::tests::a_multi_cqe_operation_keeps_its_slot_and_its_first_result"),
    ),
    (
        "7 the descriptor is not buried",
        "src/socket/convert.rs",
        "                sys::bury(fd, tombstone);",
        "                let _ = (fd, tombstone);",
        test("close", "a_closed_socket_answers_ebadf_to_every_method", "no_call_reaches_another_connection_while_its_socket_is_closed"),
    ),
    (
        "7 close does not cancel what its own worker has in flight",
        "src/fiber/inflight.rs",
        "        worker.cancel(Key(key.load(Ordering::Relaxed)));",
        "        let _ = key;",
        test("close", "close_from_anywhere_wakes_every_blocked_call"),
    ),
    (
        "7 close does not cancel what other threads have in flight",
        "src/fiber/inflight.rs",
        "        if remote.send(Control::CancelOperation(key)).is_err() {",
        "        if remote.is_ours() && false {",
        test("close", "close_from_anywhere_wakes_every_blocked_call"),
    ),
    (
        "7 a cancel that missed is not repeated",
        "src/driver/mod.rs",
        "                    && self.slots.is_waiting(key)\n                {\n                    self.missed.push(key);",
        "                    && self.slots.is_waiting(key)\n                {\n                    let _ = key;",
        test("close", "close_ends_a_pending_unix_connect_to_a_full_backlog"),
    ),
    (
        "7 a blocked caller is told of a cancel rather than of the close",
        "src/fiber/mod.rs",
        "        libc::ECANCELED | libc::EINTR if is_closed(target) => -libc::EBADF,",
        "        libc::ECANCELED | libc::EINTR if is_closed(target) && timeout_ns == 7 => -libc::EBADF,",
        test("close", "close_from_anywhere_wakes_every_blocked_call"),
    ),
    (
        "7 a socket that is dropped stays watched",
        "src/socket/mod.rs",
        "            fiber::watch::end(&self.inflight);\n",
        "",
        test("watched", "dropping_the_last_handle_tells_the_peer_on_any_thread"),
    ),
    (
        "7 a socket that is closed stays watched",
        "src/fiber/inflight.rs",
        "    if let Some(id) = inflight.watch() {\n        if worker.end_watch(id) {",
        "    if let Some(id) = inflight.watch().filter(|_| false) {\n        if worker.end_watch(id) {",
        test("watched", "closing_wakes_who_waits_and_tells_the_peer"),
    ),
    (
        "2 nobody looks again after a short receive",
        "src/driver/watch.rs",
        "        self.wants_look |= !watch.seen_empty;\n",
        "",
        test("watched", "what_follows_on_urgent_data_comes_at_the_second_look"),
    ),
    (
        "2 a wait for an event has no end",
        "src/driver/watch.rs",
        "        watch.end_ns = end_ns;\n",
        "        watch.end_ns = i64::MAX;\n",
        test("watched", "timeouts_are_kept_without_operations"),
    ),
    (
        "2 what a late worker has not been told of is no longer looked for",
        "src/socket/watched.rs",
        "                    if code == -libc::EAGAIN {\n                        return Ok(outcome::TIMED_OUT);",
        "                    if code == -libc::EAGAIN || true {\n                        return Ok(outcome::TIMED_OUT);",
        test("watched", "what_came_in_time_is_no_timeout_however_late_the_worker_is"),
    ),
    (
        "7 a cancel between a second look and its turn is lost",
        "src/fiber/watch.rs",
        "        self.fiber.interrupt.get() == 0\n    }\n\n    /// The events are true still.",
        "        true\n    }\n\n    /// The events are true still.",
        test("watched", "a_cancel_between_a_second_look_and_its_turn_is_not_lost"),
    ),
    (
        "2 a check for waits whose time is over is not repeated",
        "src/driver/watch.rs",
        "                self.soonest_ns = self.soonest_ns.min(watch.end_ns);\n            }",
        "            }",
        test("watched", "each_connection_times_out_on_its_own"),
    ),
    (
        "2 a receive whose watch ends waits for its whole time again",
        "src/driver/watch.rs",
        "        if self.end_ns == 0 {\n            return self.timeout_ns;\n        }",
        "        if self.end_ns >= 0 {\n            return self.timeout_ns;\n        }",
        test("watched", "a_timeout_goes_on_where_a_watch_ends"),
    ),
    (
        "7 a watch nobody listens to goes on waking its worker",
        "src/driver/watch.rs",
        "            watch.unheard = watch.unheard.saturating_add(1);\n",
        "",
        test("watched", "a_watch_nobody_listens_to_is_ended"),
    ),
    (
        "2 the end of a stream hides what came with it",
        "src/driver/attempt.rs",
        "        let last = self.step(op);\n        Some(last",
        "        let last = None;\n        let _ = &op;\n        Some(last",
        lib("driver::attempt::tests::what_comes_with_the_end_of_a_stream_is_received_before_it"),
    ),
    (
        "15 an interrupted first receive is taken for a failure",
        "src/fiber/mod.rs",
        "        libc::EINTR => return None,\n        _ => return Some(result),",
        "        _ => return Some(result),",
        test("faults", "every_call_of_the_epoll_driver_may_fail"),
    ),
    (
        "8 a blocking connect does not wait for an earlier one",
        "src/socket/mod.rs",
        "Err(error) if error.errno() == Some(libc::EALREADY) && timeout_ns < 0 => {",
        "Err(error) if error.errno() == Some(libc::EALREADY) && timeout_ns == 0 => {",
        test("connections", "connect_ex_that_times_out_is_eagain_and_goes_on_connecting"),
    ),
    (
        "9 a thread in teardown insists on its ring",
        "src/fiber/thread.rs",
        "    used.ok().flatten()\n",
        "    used.expect(\"a ring\")\n",
        test("hazards", "calls_in_destructors_of_thread_locals_work_before_and_after_the_ring_went"),
    ),
    (
        "10 a forked child takes its parent's ring for its own",
        "src/driver/uring.rs",
        "        self.fork_mark.load(Ordering::Relaxed) == self.fork_epoch",
        "        self.fork_mark.load(Ordering::Relaxed) == self.fork_epoch || self.nap.is_zero()",
        test(
            "close",
            "a_child_forked_by_a_plain_thread_works_with_its_sockets",
            "a_child_forked_by_a_fiber_leaves_the_parents_operations_alone",
            "a_forked_child_never_writes_into_memory_that_took_the_rings_place",
        ),
    ),
    (
        "10 a child goes on into its parent's scheduler",
        "src/fiber/mod.rs",
        "    if worker.is_some_and(|worker| !worker.is_ours()) {",
        "    if worker.is_some_and(|worker| !worker.is_ours() && worker.id() == u32::MAX) {",
        test("hazards", "a_child_that_returns_from_its_fiber_is_told_and_ends"),
    ),
    (
        "10 programs inherit the eventfd",
        "src/sys.rs",
        "libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)",
        "libc::eventfd(0, libc::EFD_NONBLOCK)",
        test("hazards", "a_program_started_from_a_fiber_inherits_no_descriptor"),
    ),
    (
        "11 an overflow is not counted",
        "src/driver/uring.rs",
        "counters.cq_overflows += u64::from(self.queues.has_overflown());",
        "counters.cq_overflows += u64::from(self.queues.has_overflown()) * 0;",
        lib("driver::tests::a_completion_queue_of_eight_delivers_ten_thousand_completions_once_each"),
    ),
    (
        "11 the watch of the bell is not set up again",
        "src/driver/mod.rs",
        "completion.flags & slab::CQE_F_MORE == 0 && completion.res != -libc::ECANCELED;",
        "completion.flags & slab::CQE_F_MORE == 0 && completion.res == i32::MIN;",
        lib("driver::tests::a_bell_survives_overflows_of_the_completion_queue"),
    ),
    (
        "13 a worker takes a fiber too many",
        "src/fiber/scheduler.rs",
        "self.live.get() < self.limits.fibers_max",
        "self.live.get() < self.limits.fibers_max * 2",
        test("fibers", "builder_spawn_at_the_limit_is_eagain", "spawn_waits_at_the_limit_of_fibers"),
    ),
    (
        "13 the inbox takes twice as many",
        "src/fiber/remote.rs",
        "crossbeam_channel::bounded(spawns_max);",
        "crossbeam_channel::bounded(spawns_max * 2);",
        test("limits", "spawns_wait_for_room_in_the_inbox_and_start_in_their_order"),
    ),
    (
        "14 accepting does not pause",
        "src/runtime.rs",
        "        if sleep(back_off.wait()).is_err() {",
        "        if sleep(back_off.wait() / 100_000).is_err() {",
        program("limits", "a_server_out_of_descriptors_rests_and_serves_everybody_in_the_end"),
    ),
    (
        "15 an enter without memory ends the process",
        "src/driver/uring.rs",
        "libc::EAGAIN | libc::EBUSY | libc::ENOMEM => {",
        "libc::EAGAIN | libc::EBUSY => {",
        program("faults", "a_server_loses_nothing_when_enters_fail"),
    ),
    (
        "15 an interrupted direct call is taken for a failure",
        "src/fiber/scheduler.rs",
        "            code if matches!(-code, libc::EAGAIN | libc::EINTR) => None,",
        "            code if matches!(-code, libc::EAGAIN) => None,",
        program("faults", "a_server_survives_failing_calls_of_its_connections"),
    ),
    (
        "15 a thread whose ring is refused gives up",
        "src/fiber/thread.rs",
        "        None => by_readiness(op, timeout_ns, target),\n    };",
        "        None => -libc::ENOSYS,\n    };",
        test("faults", "threads_without_any_ring_lose_nothing"),
    ),
    (
        "16 workers do not share the locked memory",
        "src/driver/features.rs",
        "        Some(limit_bytes) => shrink(config, limit_bytes / rings as u64),",
        "        Some(limit_bytes) => shrink(config, limit_bytes + rings as u64),",
        program("limits", "under_any_locked_memory_limit_a_server_serves_or_says_what_to_change"),
    ),
    (
        "17 a refusal does not say what to change",
        "src/driver/features.rs",
        "profile: allow io_uring_setup, io_uring_enter and io_uring_register there, for example \\\n",
        "profile, for example \\\n",
        program("drivers", "a_ring_that_was_asked_for_and_is_refused_is_an_error_that_names_the_remedy"),
    ),
    (
        "18 a plain send raises SIGPIPE",
        "src/driver/op.rs",
        "            } => sys::send(\n                *fd,\n                buffer,\n                (*flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,",
        "            } => sys::send(\n                *fd,\n                buffer,\n                (*flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT,",
        test("hazards", "no_way_to_send_raises_sigpipe"),
    ),
    (
        "19 nobody handles an overflow",
        "src/fiber/overflow.rs",
        "        install_handlers();\n",
        "        let _ = install_handlers;\n",
        test("fibers", "an_overflow_ends_the_process_and_names_the_fiber"),
    ),
    (
        "20 the handle of any fiber crosses threads",
        "src/fiber/join.rs",
        "impl<T> JoinHandle<T> {\n    /// Waits for the fiber to end",
        "// SAFETY: none, this is a mutant.\n#[allow(unsafe_code)]\nunsafe impl<T> Send for JoinHandle<T> {}\n\n"
        "impl<T> JoinHandle<T> {\n    /// Waits for the fiber to end",
        ["--doc", "compile_fail"],
    ),
    (
        "timeouts: an enclosing deadline is forgotten",
        "src/fiber/mod.rs",
        "        timeout_ns = sooner(timeout_ns, left_ns);\n    }\n    suspend_fiber(",
        "        timeout_ns = sooner(timeout_ns, left_ns).max(timeout_ns);\n    }\n    suspend_fiber(",
        test("deadlines", "a_timeout_block_bounds_every_call_in_it"),
    ),
    (
        "control data: a length that lies is believed",
        "src/socket/message.rs",
        "let data = rest.get(..length.checked_sub(HEADER)?)?;",
        "let data = &rest[..length - HEADER];",
        lib("socket::message::tests::lengths_that_lie_end_the_data"),
    ),
]


def copy_tree():
    """The tracked files as they are now; unchanged ones keep their times, so that little is built anew."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    for name in filter(None, names.decode().split("\0")):
        source, target = os.path.join(ROOT, name), os.path.join(TREE, name)
        if not os.path.exists(source):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(source, "rb") as file:
            content = file.read()
        if not os.path.exists(target) or open(target, "rb").read() != content:
            shutil.copy(source, target)


def cargo(arguments, limit_s):
    """Runs cargo in the copy: the exit code (None: it did not end) and what it printed."""
    # Fewer repetitions than the tests make by themselves: a guard that is off shows soon.
    environment = dict(
        os.environ,
        CARGO_TARGET_DIR=os.path.join(WORK, "target"),
        CARGO_PROFILE_DEV_DEBUG="0",
        RINGSOCK_SEEDS="2000",
        RINGSOCK_TRIALS="4000",
        RINGSOCK_RACES="5000",
    )
    process = subprocess.Popen(
        ["cargo", *arguments],
        cwd=TREE, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        # The whole session: a test may have started servers.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output


def build(tests):
    """Builds what the tests need: None, or what is wrong."""
    if "--doc" in tests:
        return None
    if "--examples" in tests:
        # `cargo test --examples` would build them as tests.
        code, output = cargo(["build", "--quiet", "--examples"], BUILD_LIMIT_S)
        if code != 0:
            return output
    selection = [argument for argument in tests[: tests.index("--")] if argument != "--examples"]
    code, output = cargo(["test", "--quiet", "--no-run", *selection], BUILD_LIMIT_S)
    return None if code == 0 else output


def run(tests, limit_s):
    """Whether the tests pass, and what they printed. A selection that matches nothing is no pass."""
    selection = [argument for argument in tests if argument != "--examples"]
    code, output = cargo(["test", "--quiet", *selection], limit_s)
    ran = "running 0 tests" not in output or "passed" in output.replace("0 passed", "")
    return code == 0 and ran, output if code is not None else output + "\n(it did not end)"


def stale(mutation):
    name, path, text, replacement, _ = mutation
    with open(os.path.join(ROOT, path)) as file:
        count = file.read().count(text)
    return None if count == 1 else f"{name}: the text is in {path} {count} times"


def check(mutation, limit_s):
    """Applies one mutation and takes it back: 'caught', or what is wrong."""
    _, path, text, replacement, tests = mutation
    target = os.path.join(TREE, path)
    with open(target) as file:
        original = file.read()
    with open(target, "w") as file:
        file.write(original.replace(text, replacement))
    try:
        errors = build(tests)
        if errors is not None:
            return "does not build:\n" + errors[-2000:]
        passed, _ = run(tests, limit_s)
        return "SURVIVED" if passed else "caught"
    finally:
        with open(target, "w") as file:
            file.write(original)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--limit", type=float, default=TEST_LIMIT_S, metavar="SECONDS", help="when a test counts as hung")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.names or any(name in m[0] for name in arguments.names)]
    if not chosen:
        parser.error("no such mutation")
    if arguments.list:
        for name, path, *_ in chosen:
            print(f"{name:72} {path}")
        return 0
    gone = list(filter(None, map(stale, chosen)))
    for line in gone:
        print(f"stale: {line}")
    if gone or arguments.check:
        print(f"{len(chosen) - len(gone)} of {len(chosen)} texts are in place")
        return 1 if gone else 0

    copy_tree()
    start = time.monotonic()
    passes = set()
    wrong = []
    for mutation in chosen:
        name, tests = mutation[0], mutation[4]
        if tuple(tests) not in passes:
            errors = build(tests)
            passed, output = run(tests, arguments.limit) if errors is None else (False, errors)
            if not passed:
                print(f"{name}: the tests do not pass without it:\n{output[-3000:]}", flush=True)
                wrong.append(name)
                continue
            passes.add(tuple(tests))
        verdict = check(mutation, arguments.limit)
        print(f"{time.monotonic() - start:6.0f} s  {name}: {verdict}", flush=True)
        if verdict != "caught":
            wrong.append(name)
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} guards are seen to fail a test when switched off")
    for name in wrong:
        print(f"  not: {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
