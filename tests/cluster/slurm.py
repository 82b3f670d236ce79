"""A real SLURM on one machine, for tests: controller, accounting and nodes.

`with Cluster(folder) as cluster: cluster.sbatch("job.sh")`. Everything is written
below `folder`, nothing to /etc. A node is a set of Linux namespaces (network, host name, mounts,
processes) around a slurmd; a bridge connects the nodes. So one kill ends a node, a rendezvous of
several nodes uses a real network, and no process of a job can survive its node. Needs root and the
Debian packages that tools/setup-slurm installs. All daemons end with the test process.
"""

import contextlib
import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROGRAMS = (
    "slurmctld", "slurmd", "slurmdbd", "sbatch", "srun", "sacct", "munged", "mariadbd", "mariadb-install-db", "ip",
    "unshare", "setpriv",
)  # fmt: skip
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
BRIDGE = "lsegbr"
FINISHED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)

NODE_START = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf || true
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$3/24" dev eth0
ip link set eth0 up
ip route add default via "$4"
slurmd -D -N "$1" -f "$2/slurm.conf" -L "$2/$1.log" &
wait $!
"""
"""The first process of a node, with name, folder, own address and gateway. Its end ends all others
of the node."""

PROBE = """
hostname probe
mount -t tmpfs tmpfs /mnt
mknod /mnt/gpu0 c 1 3
ip link add probe0 type bridge
ip link add probe1 type veth peer name probe2
unshare --pid --fork --kill-child --mount-proc true
"""
"""A test of everything that a node needs from the kernel, in its own namespaces."""


def find_missing_requirement() -> str:
    """Why this machine cannot run the cluster; an empty text if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no SLURM here ({', '.join(missing)} not installed); tools/setup-slurm installs it"
    if os.geteuid() != 0:
        return "nodes are Linux namespaces, which need root"
    in_namespaces = ("unshare", "--net", "--uts", "--mount", "sh", "-ec", PROBE)
    probe = subprocess.run(
        in_namespaces, capture_output=True, text=True, env=os.environ | {"PATH": PATH}
    )
    if probe.returncode == 0:
        return ""
    reason = " ".join(probe.stderr.split())
    return f"root has no Linux namespaces, mounts or bridges on this machine: {reason}"


class Cluster:
    """A cluster of nodes node1, node2, ... with the partitions main, preemptible and urgent.

    main is the default; urgent preempts the jobs of preemptible.
    """

    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 8, gpus: int = 2) -> None:
        self.folder = folder
        self.cpus, self.gpus = cpus, gpus
        self.small_disk = folder / "small"
        """A file system of 256 KiB that every node sees."""
        network = f"10.{100 + os.getpid() // 200 % 100}.{os.getpid() % 200}"
        self.gateway = f"{network}.1"
        self.address = {f"node{i}": f"{network}.{10 + i}" for i in range(1, nodes + 1)}
        self.bridge = f"{BRIDGE}{os.getpid()}"[:15]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        self.environment |= {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._write_files()
            self.run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", self.small_disk)
            self._start_network()
            self._start_services()
            for name in self.address:
                self.start_node(name)
            self.wait_for(
                lambda: set(self.node_states().values()) == {"idle"}, 60, "all nodes idle"
            )
            self._until_accounting_works()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.address, "slurmctld", "slurmdbd", "mariadbd", "munged"]:
            self._kill(name, gently=name in ("slurmdbd", "mariadbd"))
        for command in (["ip", "link", "del", self.bridge], ["umount", str(self.small_disk)]):
            subprocess.run(command, env=self.environment, capture_output=True)

    def run(self, *command: object, check: bool = True, timeout_s: float = 60) -> str:
        """stdout of a command on the login node, e.g. `run("squeue", "-h")`."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(words)}: {done.stderr.strip()} {done.stdout.strip()}"
        )
        return done.stdout

    def sbatch(self, *arguments: object, cwd: Path | None = None, **environment: str) -> str:
        """Submit a job; returns its id."""
        words = ["sbatch", "--parsable", *(str(word) for word in arguments)]
        env = self.environment | environment
        done = subprocess.run(
            words, env=env, cwd=cwd or self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of a job (`JobState`, `Restarts`, `NodeList`, `ExitCode`, ...)."""
        words = self.run("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait_state(self, job_id: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until the job is in one of these states (default: any final one).

        After a final state the processes of the job have ended, too.
        """
        wanted = states or FINISHED
        final = set(wanted) <= set(FINISHED)

        def reached() -> bool:
            job = self.job(job_id)
            if job["JobState"] not in ("PENDING", *wanted):
                return False
            leaves = self.run("squeue", "-h", "-j", job_id, "-t", "CG", check=False).strip()
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime" and not leaves:
                # SLURM waits 2 minutes after a requeue, so that late messages of one start are not
                # taken for those of the next one.
                time.sleep(1)
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)
            return job["JobState"] in wanted and not (final and leaves)

        self.wait_for(
            reached, timeout_s, lambda: f"{'/'.join(wanted)}; job {job_id} is {self.state(job_id)}"
        )
        return self.job(job_id)

    def wait_for(
        self, reached: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]
    ) -> None:
        end = time.monotonic() + timeout_s
        while not reached():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not dead, f"{dead[0]} died: {self.log(dead[0])}"
            description = what if isinstance(what, str) else what()
            assert time.monotonic() < end, (
                f"waited {timeout_s} s for {description}\n{self.run('sinfo', '-N', check=False)}"
            )
            time.sleep(0.1)

    def node_states(self) -> dict[str, str]:
        rows = (
            line.split()
            for line in self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).splitlines()
        )
        return {row[0]: row[1] for row in rows if len(row) == 2}

    def kill_node(self, name: str) -> None:
        """Like a power failure: first the network stops, then all processes of the node end."""
        self._ip("link", "set", self._port(name), "down")
        self._kill(name)

    def start_node(self, name: str) -> None:
        if name in self.processes:
            return
        own = os.readlink("/proc/self/ns/net")
        command = [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        arguments = [name, str(self.folder), self.address[name], self.gateway]
        process = self._spawn(name, [*command, "bash", "-c", NODE_START, "bash", *arguments])
        self.wait_for(
            lambda: _network_of(process.pid) not in ("", own), 10, f"the namespaces of {name}"
        )
        port = self._port(name)
        subprocess.run(
            ["ip", "link", "del", port], env=self.environment, capture_output=True
        )  # the port of a killed node
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", process.pid)
        self._ip("link", "set", port, "master", self.bridge, "up")

    def _port(self, node: str) -> str:
        return f"{self.bridge[:12]}{node.removeprefix('node')}"

    def restart_controller(self) -> None:
        """Stop and start slurmctld as an administrator would; jobs continue."""
        self.stop_controller()
        self.start_controller()

    def stop_controller(self) -> None:
        self._kill("slurmctld", gently=True)

    def processes_of(self, node: str) -> list[str]:
        """Command lines of the processes on the node, without those of the node itself."""
        parent = self.processes[node].pid
        inside = subprocess.run(
            ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True
        ).stdout.splitlines()
        rows = [line.split(None, 2) for line in inside]
        family = {str(parent)}
        for _ in rows:
            family |= {row[0] for row in rows if row[1] in family}
        own = ("unshare", "bash -c", "slurmd ", "ps ", "sleep 0.02")
        return [row[2] for row in rows if row[0] in family and not row[2].startswith(own)]

    def log(self, name: str) -> str:
        texts = [
            path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{name}*.log"))
        ]
        return "\n".join(texts)[-2000:]

    def _spawn(
        self, name: str, command: Sequence[str], **environment: str
    ) -> "subprocess.Popen[bytes]":
        with open(self.folder / f"{name}.out.log", "ab") as out:
            self.processes[name] = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    *command,
                ],  # a killed test leaves no process
                env=self.environment | environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return self.processes[name]

    def _kill(self, name: str, *, gently: bool = False) -> None:
        process = self.processes.pop(name, None)
        if process is None:
            return
        if gently:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        process.kill()
        process.wait()

    def _start_network(self) -> None:
        for link in Path("/sys/class/net").glob(f"{BRIDGE}*"):  # left by killed tests
            owner = link.name.removeprefix(BRIDGE)
            is_bridge = (
                link / "bridge"
            ).is_dir()  # not the port of a node of another running cluster
            if is_bridge and owner.isdigit() and not Path(f"/proc/{owner}").exists():
                subprocess.run(
                    ["ip", "link", "del", link.name], env=self.environment, capture_output=True
                )
        self._ip("link", "add", self.bridge, "type", "bridge")
        self._ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        self._ip("link", "set", self.bridge, "up")

    def _ip(self, *words: object) -> None:
        self.run("ip", *words)

    def _start_services(self) -> None:
        folder, munge = self.folder, self.folder / "munge.socket"
        files = [f"--{what}-file={folder}/munged.{what}" for what in ("pid", "log", "seed")]
        key = f"--key-file={folder}/munge.key"
        self._spawn(
            "munged", ["munged", "--foreground", "--force", f"--socket={munge}", key, *files]
        )
        self.wait_for(munge.exists, 10, "munge")
        database = folder / "mysql"
        self.run(
            "mariadb-install-db", "--no-defaults", f"--datadir={database}", "--user=root", "--skip-test-db",
            "--auth-root-authentication-method=normal", "--innodb-log-file-size=8M", timeout_s=120,
        )  # fmt: skip
        self._spawn("mariadbd", [
            "mariadbd", "--no-defaults", f"--datadir={database}", f"--socket={folder}/mysql.socket", "--user=root",
            "--skip-networking", "--skip-grant-tables", "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF", "--innodb-lock-wait-timeout=900",
        ])  # fmt: skip
        self.wait_for((folder / "mysql.socket").exists, 60, "mariadb")
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(folder / "mysql.socket"))
        self.wait_for(lambda: self._answers("sacctmgr", "-n", "show", "cluster"), 60, "slurmdbd")
        self.start_controller()

    def start_controller(self) -> None:
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", f"{self.folder}/slurm.conf"])
        self.wait_for(lambda: self._answers("scontrol", "ping"), 30, "slurmctld")

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def _until_accounting_works(self) -> None:
        self.run("srun", "--job-name=first", f"--nodes={len(self.address)}", "--overcommit", "true")
        done = ("sacct", "-X", "-n", "--name=first", "--format=State")
        self.wait_for(lambda: "COMPLETED" in self.run(*done), 30, "sacct")

    def _write_files(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        self.small_disk.mkdir()
        key = os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(key, secrets.token_bytes(128))
        os.close(key)
        for number in range(self.gpus):  # SLURM counts these files as GPUs; no process opens them
            os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        here = socket.gethostname().split(".")[0]
        hosts = {"localhost": "127.0.0.1", here: self.gateway, **self.address}
        texts = _configuration(self, here, _free_ports(2))
        texts |= {
            "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",  # no query of a name server
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
        (folder / "slurmdbd.conf").chmod(0o600)


def _configuration(cluster: Cluster, here: str, ports: Sequence[int]) -> Mapping[str, str]:
    """slurm.conf and the other configuration files, with short times, so that tests take seconds."""
    folder, gateway = cluster.folder, cluster.gateway
    (folder / "spool").mkdir()
    nodes = "".join(
        f"NodeName={name} NodeAddr={address} CPUs={cluster.cpus} RealMemory=32000 Gres=gpu:{cluster.gpus}\n"
        for name, address in cluster.address.items()
    )
    slurm = f"""
ClusterName=tests
SlurmctldHost={here}({gateway})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
GresTypes=gpu
ReturnToService=2
FirstJobId={1000 + secrets.randbelow(10_000_000)}
SlurmdTimeout=6
KillWait=8
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
CompleteWait=0
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={gateway}
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/munge.socket
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preemptible PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent PriorityTier=100 PreemptMode=OFF
"""
    dbd = f"""
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=0.0.0.0
DbdPort={ports[1]}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
"""
    files = f"{folder}/gpu[0-{cluster.gpus - 1}]" if cluster.gpus > 1 else f"{folder}/gpu0"
    texts = {
        "slurm.conf": slurm,
        "slurmdbd.conf": dbd,
        "gres.conf": f"AutoDetect=off\nName=gpu File={files}\n",
    }
    if _slurm_version() >= (24, 5):  # newer versions use control groups by default
        texts["cgroup.conf"] = "CgroupPlugin=disabled\n"
    return texts


def _slurm_version() -> tuple[int, ...]:
    version = subprocess.run(
        ["slurmctld", "-V"], env={"PATH": PATH}, capture_output=True, text=True
    ).stdout
    return tuple(int(part) for part in version.split()[-1].split(".")[:2])


def _free_ports(count: int) -> list[int]:
    """Free ports below the range from which the kernel assigns ports to other processes."""
    ports: list[int] = []
    while len(ports) < count:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
    return ports


def _network_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""


def find_cluster_problem() -> str:
    """Why no cluster can run here, after starting one; an empty text if it can."""
    if reason := find_missing_requirement():
        return reason
    folder = Path(tempfile.mkdtemp(prefix="lseg-"))
    try:
        with Cluster(folder / "c") as cluster:
            cluster.run("srun", "-N2", "true")
    except Exception as error:
        return f"a cluster does not start: {' '.join(str(error).split())[-500:]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ""


if __name__ == "__main__":
    print(find_cluster_problem())
