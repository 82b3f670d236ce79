"""The kinds of faults. Each is done to a running stage and, where it outlasts the process, undone afterwards."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR2

from tests.chaos import damage, strikes
from tests.chaos.stages import PEER_TIMEOUT_S, Stage
from tests.chaos.strikes import Strike
from tests.chaos.two_nodes import FAKETIME


@dataclass(frozen=True)
class Fault:
    """`strike(process, stage, random)` happens once the stage has run for a while; it says what it did."""

    kind: str
    stages: tuple[str, ...]
    strike: Strike
    heal: Callable[[Stage], None] = lambda stage: None
    """Before the command is run again."""
    says: str = ""
    """Regular expression for what the command's last line must tell, if it fails of the fault."""
    met_when_run_again: bool = False
    """The damage is met by the next start, which must tell of it (`says`); only then it is undone."""
    environment: Callable[[Stage], Mapping[str, str]] = lambda stage: {}
    """Of the process that is struck."""
    needs_faketime: bool = False
    once: bool = False
    """Takes long: once on each stage, however many faults there are."""

    @property
    def possible(self) -> bool:
        return not self.needs_faketime or FAKETIME.is_file()


ALL = ("convert", "train", "evaluate")
RANKS = ("train", "evaluate")
NODES = ("train on two nodes",)
TUNE = ("tune",)
GONE = (
    r"SIGKILL|is lost|does not answer|lost their connection|lost contact|worker died|died|"
    r"no heartbeat"
)
FULL = r"No space left|free some space|disk"
LOCKED = r"Read-only file system|Permission denied|could not be written|check the permissions"
LINK = r"is lost|does not answer|lost their connection|network"

FAULTS = (
    Fault("kill -9 of the launcher", (*ALL, *TUNE), strikes.to_launcher(SIGKILL)),
    Fault("kill -9 of one rank or worker", ALL, strikes.to_one(SIGKILL), says=GONE),
    Fault("kill -9 of all", (*ALL, *TUNE), strikes.to_all(SIGKILL)),
    Fault("SIGTERM to the launcher", (*ALL, *TUNE), strikes.to_launcher(SIGTERM)),
    Fault("SIGTERM to one rank or worker", ALL, strikes.to_one(SIGTERM)),
    Fault("SIGTERM to all", ALL, strikes.to_all(SIGTERM)),
    Fault("SIGUSR2 to all ranks", ("train",), strikes.to_ranks(SIGUSR2)),
    Fault("Ctrl-C", (*ALL, *TUNE), strikes.to_all(SIGINT)),
    Fault("one asleep, then awake", ALL, strikes.pause(3)),
    Fault("one asleep longer than its peers wait", RANKS, strikes.pause(1.5 * PEER_TIMEOUT_S), says=GONE),
    Fault("one asleep for a minute", ALL, strikes.pause(60), says=GONE, once=True),
    Fault("launcher asleep for a minute", RANKS, strikes.pause(60, launcher=True), once=True),
    Fault("disk full", (*ALL, *TUNE), damage.fill, damage.free, says=FULL),
    Fault("disk read-only", ALL, damage.read_only, damage.writable, says=LOCKED),
    Fault("write permission taken away", (*ALL, *TUNE), damage.forbid, damage.permit, says=LOCKED),
    Fault("network cut in mid-step", RANKS, strikes.cut_loopback),
    Fault("link between two nodes cut for good", NODES, strikes.cut_link(None)),
    Fault("link between two nodes cut for 3 s", NODES, strikes.cut_link(3), says=LINK),
    Fault("link between two nodes cut for 20 s", NODES, strikes.cut_link(2 * PEER_TIMEOUT_S), says=LINK),
    Fault("kill -9 of a node", NODES, strikes.to_node(SIGKILL), says=GONE),
    Fault(
        "clock of a node an hour ahead", NODES, strikes.nothing,
        environment=lambda stage: {"NODE1_CLOCK": "+3600"}, needs_faketime=True,
    ),
    Fault(
        "clock of a node an hour behind", NODES, strikes.nothing,
        environment=lambda stage: {"NODE1_CLOCK": "-3600"}, needs_faketime=True,
    ),
    Fault(
        "clock jumps by an hour", (*ALL, *TUNE), strikes.jump,
        environment=strikes.clock_of_its_own, needs_faketime=True,
    ),
    Fault("newest checkpoint cut short", ("train",), damage.to_file(damage.newest_checkpoint, damage.cut_short)),
    Fault("bit flipped in the newest checkpoint", ("train",), damage.to_file(damage.newest_checkpoint, damage.flipped)),
    Fault("file gone from the newest checkpoint", ("train",), damage.to_file(damage.newest_checkpoint, damage.gone)),
    Fault("ledger entry cut short", ("evaluate",), damage.to_file(damage.ledger, damage.cut_short)),
    Fault("stored shard cut short", ("convert",), damage.to_file(damage.converted, damage.cut_short)),
    Fault("bit flipped in a stored shard", ("convert",), damage.to_file(damage.converted, damage.flipped)),
    Fault(
        "bit flipped in the shards that are read", RANKS, damage.flip_what_is_read, damage.restore,
        says=r"liver_\d+.*(damaged|checksum|crc)", met_when_run_again=True,
    ),
    Fault("kill -9 of the raylet", TUNE, strikes.to_named(SIGKILL, "raylet/raylet")),
    Fault("kill -9 of Ray's GCS", TUNE, strikes.to_named(SIGKILL, "gcs_server")),
    Fault("kill -9 of a Ray worker", TUNE, strikes.to_named(SIGKILL, "ray::")),
    Fault("kill -9 of a fold's trainer", TUNE, strikes.to_named(SIGKILL, "liverseg_dist train")),
)  # fmt: skip
