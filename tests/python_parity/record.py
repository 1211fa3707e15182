"""What CPython's socket module answers to the steps of cases.txt.

    python3.11 tests/python_parity/record.py            writes recorded.json, beside this file
    python3.11 tests/python_parity/record.py PATH       writes to PATH instead
    python3.11 tests/python_parity/record.py --serve    executes steps from standard input, one a line, and answers each with a line

A step is a statement of Python, so that executing it is all there is to do. An outcome is one line: the value as Python shows it,
or the exception's class, errno and text. What differs from run to run (ports, descriptors, names) is replaced by placeholders.
"""

import ast
import faulthandler
import json
import os
import re
import select
import shutil
import socket
import sys
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
STEP_LIMIT_S = 20


def tcp_pair(family=socket.AF_INET):
    """Both ends of a connection over the loopback interface."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as server:
        client = socket.create_connection(server.getsockname()[:2])
        return client, server.accept()[0]


def fd(number):
    """A descriptor's number says nothing, except that there is none."""
    return number if number < 0 else "a descriptor"


def flags(sock):
    """The descriptor's flags, as fcntl(2) would tell them."""
    with open(f"/proc/self/fdinfo/{sock.fileno()}") as info:
        value = int(re.search(r"flags:\s*(\d+)", info.read())[1], 8)
    names = ["O_NONBLOCK"] * bool(value & os.O_NONBLOCK) + ["O_CLOEXEC"] * bool(value & os.O_CLOEXEC)
    return "|".join(names)


def readable(sock):
    """Waits until there is something to receive."""
    return bool(select.select([sock], [], [], STEP_LIMIT_S / 2)[0])


def writable(sock):
    """Waits until there is room to send."""
    return bool(select.select([], [sock], [], STEP_LIMIT_S / 2)[1])


def fromfd(sock, *args):
    """A second object over a duplicate of the descriptor."""
    return socket.fromfd(sock.fileno(), *args)


def adopt(number, *args):
    """An object over the descriptor itself."""
    return socket.socket(*args, fileno=number)


def fill(sock, unit):
    """Sends without waiting until there is no more room."""
    try:
        while True:
            sock.send(b"x" * unit, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None


def between(low, number, high):
    """For numbers that only the kernel knows exactly."""
    return low <= number <= high


def same(left, right):
    """For values that differ from run to run."""
    return left == right


def within(name, length):
    """A path of that many bytes that begins with name."""
    return name + "/" + "x" * (length - len(name) - 1)


class Environment:
    """The variables of one case."""

    made = 0

    def __init__(self):
        Environment.made += 1
        self.id = f"rsp-{os.getpid() % 0x10000:04x}{Environment.made % 0x10000:04x}"
        self.dir = f"/tmp/{self.id}"
        # A process that was killed may have left one of that name.
        shutil.rmtree(self.dir, ignore_errors=True)
        os.mkdir(self.dir)
        self.ports = {}
        self.ended = False
        self.variables = {name: getattr(socket, name) for name in dir(socket) if not name.startswith("_")}
        helpers = [tcp_pair, fd, flags, readable, writable, fromfd, adopt, fill, between, same, within]
        self.variables.update({helper.__name__: helper for helper in helpers})
        self.variables.update(DIR=self.dir, NAME=b"\0" + self.id.encode())

    def close(self):
        for value in self.variables.values():
            for item in value if isinstance(value, tuple) else [value]:
                if isinstance(item, socket.socket):
                    item.close()
        shutil.rmtree(self.dir)

    def outcome(self, step):
        """Executes a step: its outcome as one line."""
        faulthandler.dump_traceback_later(STEP_LIMIT_S, exit=True)
        try:
            value = self.execute(step)
            text = self.show(fd(value) if step.endswith(".detach()") else value)
        except Exception as error:
            number = getattr(error, "errno", None)
            text = f"{type(error).__name__} {'-' if number is None else number}: {error}"
            # Without the variable, the steps that follow mean nothing.
            self.ended = " = " in step
        finally:
            faulthandler.cancel_dump_traceback_later()
        return self.normalised(text)

    def execute(self, step):
        (statement,) = ast.parse(step).body
        if isinstance(statement, ast.Assign):
            value = eval(compile(ast.Expression(statement.value), step, "eval"), self.variables)
            (target,) = statement.targets
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value if isinstance(target, ast.Tuple) else [value]
            self.variables.update(zip([name.id for name in targets], values, strict=True))
            return value
        if isinstance(statement, ast.Delete):
            for target in statement.targets:
                del self.variables[target.id]
            return None
        return eval(compile(ast.Expression(statement.value), step, "eval"), self.variables)

    def show(self, value):
        if isinstance(value, socket.socket):
            timeout = self.show(value.gettimeout())
            return f"<socket {int(value.family)} {int(value.type)} {value.proto} timeout={timeout}>"
        if isinstance(value, (tuple, list)):
            if len(value) in (2, 4) and isinstance(value[0], str) and isinstance(value[1], int) and value[1] >= 1024:
                self.ports.setdefault(value[1], f"$port{len(self.ports) + 1}")
            items = [self.show(item) for item in value]
            return f"({', '.join(items)})"
        if value is None or isinstance(value, (bool, str)):
            return repr(value)
        if isinstance(value, int):
            return self.ports.get(value, str(int(value)))
        if isinstance(value, float):
            return re.sub(r"e([+-]?)0*(\d)", r"e\1\2", repr(value)).replace("e+", "e")
        if isinstance(value, bytearray):
            return f"bytearray({self.show(bytes(value))})"
        if len(value) > 80:
            return f"{len(value)} bytes, sum {sum(value.replace(self.id.encode(), b''))}"
        return repr(value)

    def normalised(self, text):
        for port, name in self.ports.items():
            text = re.sub(rf"\b{port}\b", name, text)
        text = re.sub(r"\bfd=\d+", "fd=$fd", text)
        text = re.sub(r"^b'\\x00[0-9a-f]{5}'$", r"b'\\x00$auto'", text)
        return text.replace(self.id, "$id")


def cases():
    """The table's cases, in its order: name and steps. See the head of cases.txt."""
    lists, found, current = {}, [], None
    with open(os.path.join(HERE, "cases.txt")) as table:
        for line in table.read().splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            if line.startswith("@"):
                current = lists.setdefault(line[1:].strip(), [])
            elif line.startswith("= "):
                current = []
                found.append((line[2:].strip(), current))
            else:
                current.append(line.strip())
    for name, steps in found:
        expanded = [(name, steps)]
        for placeholder in re.findall(r"{(\w+)}", name):
            expanded = [
                (name.replace(f"{{{placeholder}}}", item, 1), [step.replace(f"{{{placeholder}}}", item) for step in steps])
                for name, steps in expanded
                for item in lists[placeholder]
            ]
        yield from expanded


def record(path):
    recorded = {}
    for name, steps in cases():
        assert name not in recorded, f"two cases have the name {name}"
        environment = Environment()
        outcomes = recorded[name] = []
        for step in steps:
            if not environment.ended:
                outcomes.append([step, environment.outcome(step)])
        environment.close()
    with open(path, "w") as file:
        file.write("{\n")
        # A line per step: a changed outcome is a changed line.
        for index, (name, steps) in enumerate(recorded.items()):
            lines = ",\n".join("  " + json.dumps(step, ensure_ascii=False) for step in steps)
            comma = "," if index + 1 < len(recorded) else ""
            file.write(f" {json.dumps(name, ensure_ascii=False)}: [\n{lines}\n ]{comma}\n")
        file.write("}\n")
    print(f"{len(recorded)} cases, {sum(map(len, recorded.values()))} steps")


def serve():
    environment = Environment()
    for line in sys.stdin:
        if line == "\n":
            environment.close()
            environment = Environment()
        else:
            print(environment.outcome(line.rstrip("\n")), flush=True)
    environment.close()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        record(sys.argv[1] if sys.argv[1:] else os.path.join(HERE, "recorded.json"))
