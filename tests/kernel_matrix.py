#!/usr/bin/env python3
"""Runs tests/kernel_smoke.rs on other kernels: Debian's, each booted under qemu with that program as the only process.

    python3 tests/kernel_matrix.py                     all kernels; rewrites the table in tests/README.md
    python3 tests/kernel_matrix.py 6.1 newest          some of them; changes no file
    python3 tests/kernel_matrix.py --require-fallback  5.10 has to pass all checks without a ring; without this switch it may
                                                       also refuse, in one sentence that says what to change
    python3 tests/kernel_matrix.py --binary PATH       another static program, rather than building kernel_smoke
    python3 tests/kernel_matrix.py --cpus 2            more processors (1 if not said)
    python3 tests/kernel_matrix.py --driver epoll      RINGSOCK_DRIVER for the program

Needs qemu-system-x86_64, apt-get and dpkg-deb, and the network for the packages, which come from the Debian mirror that this
machine's apt uses; they are unpacked under target/kernel-matrix and never installed. Exits with 1 if a kernel fails.
"""

import argparse
import glob
import gzip
import json
import os
import re
import subprocess
import sys
import time
from datetime import date

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = os.path.join(ROOT, "target", "kernel-matrix")
README = os.path.join(ROOT, "tests", "README.md")
TARGET = "x86_64-unknown-linux-gnu"
BOOT_LIMIT_S = 900

# Name, Debian's suite, the package's name, and whether the ring has to work.
KERNELS = [
    ("5.10", "bullseye", r"linux-image-5\.10\.\S+-cloud-amd64", False),
    ("6.1", "bookworm", r"linux-image-6\.1\.\S+-cloud-amd64", True),
    ("6.12", "trixie", r"linux-image-6\.12\.\S+-cloud-amd64", True),
    ("newest", "sid", r"linux-image-\d+\.\d+\.\S+-cloud-amd64", True),
]


def run(*command, **options):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def mirror():
    """The Debian mirror this machine is configured with."""
    lines = run("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages").splitlines()
    for line in lines:
        origin, label, uri = line.split("|")
        if (origin, label) == ("Debian", "Debian"):
            return uri
    sys.exit("kernel_matrix: apt has no Debian mirror configured (or no index: apt-get update)")


def apt_options(suites):
    """An apt of our own, which knows these suites and leaves the machine's alone."""
    apt = os.path.join(WORK, "apt")
    for folder in ("state/lists/partial", "cache/archives/partial"):
        os.makedirs(os.path.join(apt, folder), exist_ok=True)
    open(os.path.join(apt, "status"), "w").close()
    sources = os.path.join(apt, "sources.list")
    uri, key = mirror(), "/usr/share/keyrings/debian-archive-keyring.gpg"
    with open(sources, "w") as file:
        for suite in suites:
            file.write(f"deb [signed-by={key}] {uri} {suite} main\n")
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": os.path.join(apt, "state"),
        "Dir::State::status": os.path.join(apt, "status"),
        "Dir::Cache": os.path.join(apt, "cache"),
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def version_key(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def image_in(folder):
    """The kernel image in an unpacked package, if there is one."""
    found = glob.glob(f"{folder}/**/vmlinuz*", recursive=True)
    return found[0] if found else None


def fetch(kernels):
    """The unpacked kernel image of each, downloaded unless an earlier run has left it: name -> (package, path)."""
    apt = apt_options(dict.fromkeys(suite for _, suite, _, _ in kernels))
    run("apt-get", *apt, "-qq", "update", stderr=subprocess.DEVNULL)
    listed = run("apt-cache", *apt, "search", "--names-only", r"^linux-(image|binary)-.*-cloud-amd64$").splitlines()
    packages = [line.split()[0] for line in listed]
    images = {}
    for name, _, pattern, _ in kernels:
        found = sorted((package for package in packages if re.fullmatch(pattern, package)), key=version_key)
        if not found:
            sys.exit(f"kernel_matrix: no package {pattern} is listed")
        package = found[-1]
        # Since Linux 7.2 the image itself is in a package of its own.
        binary = package.replace("linux-image-", "linux-binary-")
        package = binary if binary in packages else package
        folder = os.path.join(WORK, package)
        if not image_in(folder):
            os.makedirs(folder, exist_ok=True)
            run("apt-get", *apt, "-qq", "download", package, cwd=folder)
            [archive] = glob.glob(f"{folder}/*.deb")
            run("dpkg-deb", "-x", archive, folder)
            os.remove(archive)
        if not image_in(folder):
            sys.exit(f"kernel_matrix: {package} has no kernel image")
        images[name] = (package, image_in(folder))
    return images


def build():
    """kernel_smoke, linked statically: its path."""
    environment = dict(os.environ, RUSTFLAGS="-C target-feature=+crt-static")
    command = ["cargo", "test", "--no-run", "--test", "kernel_smoke", "--target", TARGET, "--message-format=json"]
    output = run(*command, cwd=ROOT, env=environment)
    artifacts = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    [path] = [a["executable"] for a in artifacts if a.get("executable") and a["target"]["name"] == "kernel_smoke"]
    return path


def cpio(files):
    """An archive in the form that the kernel unpacks at boot (newc): name -> (mode, bytes)."""
    archive = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += b"\0" * (-len(archive) % 4) + data
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def initramfs(binary):
    path = os.path.join(WORK, "initramfs.gz")
    with open(binary, "rb") as file:
        program = file.read()
    folders = {name: (0o040755, b"") for name in ("proc", "dev", "tmp")}
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(cpio({**folders, "init": (0o100755, program)}))
    return path


def boot(image, archive, cpus, environment):
    """Boots the kernel: what it printed, and how long that took."""
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max,-cx16", "-smp", str(cpus), "-m", "1024", "-nodefaults", "-no-user-config",
        "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", image, "-initrd", archive,
        "-append", " ".join(["console=ttyS0", "quiet", "panic=-1", *environment]),
    ]  # fmt: skip
    start = time.monotonic()
    try:
        output = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=BOOT_LIMIT_S
        ).stdout
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"") + b"\nkernel_smoke: verdict: no end\n"
    return output.decode(errors="replace").replace("\r", ""), time.monotonic() - start


def judge(output, needs_ring, require_fallback):
    """Whether that is as it has to be, and what to say of it."""
    said = dict(re.findall(r"^kernel_smoke: (kernel|driver|refused|verdict): (.*)$", output, re.M))
    verdict = said.get("verdict", "no word")
    passed = (re.findall(r"^kernel_smoke: (\d+ of \d+) checks passed$", output, re.M) or ["none"])[-1]
    driver = said.get("driver", "none")
    if verdict == "pass":
        ok = driver == ("io_uring" if needs_ring else "epoll")
    elif verdict == "refused":
        # The sentence has to name what is needed.
        ok = not needs_ring and not require_fallback and "needs Linux" in said.get("refused", "")
    else:
        ok = False
    text = {"pass": f"{passed} checks", "refused": "refused: " + said.get("refused", "")}.get(verdict, f"{verdict}: {passed} checks")
    return ok, said.get("kernel", "?"), driver, text


def write_table(rows):
    if not os.path.exists(README):
        return
    with open(README) as file:
        text = file.read()
    lines = [
        "| kernel | package | driver | result | s |",
        "|---|---|---|---|---|",
        *(f"| {k} | `{p}` | {d} | {'pass' if ok else 'FAIL'}: {t} | {s:.0f} |" for ok, k, p, d, t, s in rows),
        "",
        f"Made by `tests/kernel_matrix.py` on {date.today()}.",
    ]
    begin, end = "<!-- kernel matrix -->", "<!-- end of the kernel matrix -->"
    changed = re.sub(f"{begin}.*?{end}", lambda _: "\n".join([begin, *lines, end]), text, flags=re.S)
    with open(README, "w") as file:
        file.write(changed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(name for name, *_ in KERNELS))
    parser.add_argument("--require-fallback", action="store_true")
    parser.add_argument("--binary")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--driver")
    parser.add_argument("--trials", type=int)
    arguments = parser.parse_args()
    unknown = set(arguments.kernels) - {name for name, *_ in KERNELS}
    if unknown:
        parser.error(f"no such kernel: {', '.join(unknown)}")
    kernels = [row for row in KERNELS if not arguments.kernels or row[0] in arguments.kernels]
    os.makedirs(WORK, exist_ok=True)
    archive = initramfs(arguments.binary or build())
    environment = [f"RINGSOCK_DRIVER={arguments.driver}"] if arguments.driver else []
    environment += [f"RINGSOCK_TRIALS={arguments.trials}"] if arguments.trials else []
    images = fetch(kernels)
    rows = []
    for name, _, _, needs_ring in kernels:
        package, image = images[name]
        needs_ring = needs_ring and arguments.driver in (None, "uring")
        output, seconds = boot(image, archive, arguments.cpus, environment)
        with open(os.path.join(WORK, f"{name}.log"), "w") as file:
            file.write(output)
        ok, release, driver, text = judge(output, needs_ring, arguments.require_fallback)
        print(f"{'pass' if ok else 'FAIL'}  {name:7} {release:24} {driver:10} {seconds:4.0f} s  {text}", flush=True)
        if not ok:
            print("\n".join(output.splitlines()[-40:]), flush=True)
        rows.append((ok, release, package, driver, text, seconds))
    if not arguments.kernels and not environment:
        write_table(rows)
    return 0 if all(row[0] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
