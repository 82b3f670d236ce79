"""What is done to running processes, to their network and to their clock. Each returns a few words on what it did."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.processes import Process, command_of, descendants, is_python, send
from tests.chaos.stages import PEER_TIMEOUT_S, Stage
from tests.chaos.two_nodes import FAKETIME, PORTS, SWITCH, ip, sleeper

Strike = Callable[[Process, Stage, random.Random], str]
NOBODY = "there was no"


def workers(process: Process) -> list[int]:
    """Ranks, or converting workers: Python processes without children; the command itself where there are none yet."""
    below = [
        pid
        for pid in descendants(process.pid)
        if is_python(pid) and "resource_tracker" not in command_of(pid)
    ]
    return [pid for pid in below if not any(is_python(child) for child in descendants(pid))] or [
        process.pid
    ]


def to_launcher(number: signal.Signals) -> Strike:
    def strike(process: Process, _stage: Stage, _chance: random.Random) -> str:
        send(process.pid, number)
        return f"{number.name} to the launcher"

    return strike


def to_one(number: signal.Signals) -> Strike:
    def strike(process: Process, _stage: Stage, chance: random.Random) -> str:
        send(chance.choice(workers(process)), number)
        return f"{number.name} to one rank or worker"

    return strike


def to_all(number: signal.Signals) -> Strike:
    def strike(process: Process, _stage: Stage, _chance: random.Random) -> str:
        for pid in [process.pid, *descendants(process.pid)]:
            send(pid, number)
        return f"{number.name} to all processes"

    return strike


def to_ranks(number: signal.Signals) -> Strike:
    """Not to torchrun itself, which dies of signals it does not know."""

    def strike(process: Process, _stage: Stage, _chance: random.Random) -> str:
        for pid in workers(process):
            send(pid, number)
        return f"{number.name} to all ranks"

    return strike


def to_node(number: signal.Signals) -> Strike:
    """All processes of the second of two nodes."""

    def strike(process: Process, _stage: Stage, chance: random.Random) -> str:
        below = descendants(process.pid)
        top = [pid for pid in below if "--rdzv-conf=rank=" in command_of(pid)] or below[:1]
        chosen = chance.choice(top)
        for pid in [chosen, *descendants(chosen)]:
            send(pid, number)
        return f"{number.name} to all of node {top.index(chosen)}"

    return strike


def to_named(number: signal.Signals, *words: str) -> Strike:
    """One process with these words in its command line; a miss when there is none at the moment."""

    def strike(process: Process, _stage: Stage, chance: random.Random) -> str:
        end = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < end:
            found = [
                pid
                for pid in descendants(process.pid)
                if all(word in command_of(pid) for word in words)
            ]
            if found:
                send(chance.choice(found), number)
                return f"{number.name} to {' '.join(words)}"
            time.sleep(0.05)
        return f"{NOBODY} {' '.join(words)}"

    return strike


def pause(seconds: float, *, launcher: bool = False) -> Strike:
    def strike(process: Process, _stage: Stage, chance: random.Random) -> str:
        pid = process.pid if launcher else chance.choice(workers(process))
        send(pid, signal.SIGSTOP)
        time.sleep(seconds)
        send(pid, signal.SIGCONT)
        return f"{'the launcher' if launcher else 'one rank or worker'} asleep for {seconds:g} s"

    return strike


def cut_loopback(process: Process, _stage: Stage, _chance: random.Random) -> str:
    ip("link", "set", "lo", "down", node=process.pid)
    return f"loopback down, {_end_of(process)}"


def cut_link(seconds: float | None) -> Strike:
    """Between the two nodes: the switch forgets one port, so that both see a carrier and nothing arrives."""

    def strike(process: Process, _stage: Stage, chance: random.Random) -> str:
        number = chance.randrange(len(PORTS))
        while (
            PORTS[number] not in Path(f"/proc/{process.pid}/net/dev").read_text()
        ):  # the nodes start yet
            time.sleep(0.05)
        ip("link", "set", PORTS[number], "nomaster", node=process.pid)
        if seconds is None:
            return f"link of node {number} cut, {_end_of(process)}"
        time.sleep(seconds)
        if process.poll() is None:
            ip("link", "set", PORTS[number], "master", SWITCH, node=process.pid)
        return f"link of node {number} cut for {seconds:g} s"

    return strike


def _end_of(process: Process) -> str:
    """By itself it must end, with all ranks and torchrun's agents."""
    began = time.monotonic()
    while process.poll() is None:
        if time.monotonic() > began + 3 * PEER_TIMEOUT_S + 30:
            return "it still waits"  # the caller's patience will find the hang
        time.sleep(0.05)
    return f"it ended after {time.monotonic() - began:.0f} s"


def clock_file(stage: Stage) -> Path:
    return stage.disk.parent / "clock"


def clock_of_its_own(stage: Stage) -> dict[str, str]:
    """The environment in which `jump` moves the wall clock; monotonic time and the files' times stay true."""
    clock_file(stage).write_text("+0\n")
    return {
        "LD_PRELOAD": f"{sleeper(stage.disk.parent)} {FAKETIME}",
        "FAKETIME_TIMESTAMP_FILE": str(clock_file(stage)),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def jump(_process: Process, stage: Stage, chance: random.Random) -> str:
    offset = chance.choice(("+3600", "-3600"))
    clock_file(stage).write_text(f"{offset}\n")
    return f"wall clock jumps by {offset} s"


def nothing(_process: Process, _stage: Stage, _chance: random.Random) -> str:
    """What is wrong is the environment."""
    return "left alone"
