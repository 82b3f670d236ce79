"""No option is ignored: `launch` applies it to the right job, or refuses it in one line."""

import re
import subprocess
from pathlib import Path

import pytest

from launch.cli import run
from launch.slurm.arrays import expand_tasks, format_indices, parse_array, parse_indices
from launch.slurm.executors import build_local_command
from launch.slurm.sbatch import BatchJob, Resources, render_batch_file
from launch.slurm.sbatch_options import REPLACED, SHORT_OPTIONS, parse_sbatch_option
from launch.slurm.stages import compute_stage_resources
from launch.slurm.units import parse_gpus, parse_memory, parse_time_limit, time_to_seconds
from liverseg_dist.errors import UserError

Capture = pytest.CaptureFixture[str]
GPU = ("--gpus-per-node", "1", "--partition", "gpu")


@pytest.fixture
def train(phantom_store: Path, tmp_path: Path) -> list[str]:
    return ["train", f"data.store={phantom_store}", f"run.dir={tmp_path / 'run'}"]


@pytest.fixture
def chain(phantom_source: Path, tmp_path: Path) -> list[str]:
    words = ["chain", str(phantom_source), str(tmp_path / "s.zarr"), f"run.dir={tmp_path / 'run'}"]
    return [*words, "convert.splits.folds=3"]


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def expect_user_error(capsys: Capture, *words: str) -> str:
    assert run(words) == 2, capsys.readouterr()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    return shown.err


def list_batch_files(capsys: Capture, *words: str) -> list[str]:
    """The batch files of a dry run."""
    assert run([*words, "--dry-run"]) == 0, capsys.readouterr()
    text = capsys.readouterr().out
    return text.split("# --- job ")[1:] if "# --- job " in text else [text]


def read_sbatch_options(job: str) -> dict[str, str]:
    """The #SBATCH options of a batch file."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", job, re.MULTILINE)
    return {name: value.strip("'") for name, value in found}


@pytest.mark.parametrize(
    ("text", "indices", "throttle"),
    [("folds", (), 0), ("folds%2", (), 2), ("0-4", (0, 1, 2, 3, 4), 0), ("0-4%2", (0, 1, 2, 3, 4), 2),
     ("1,3", (1, 3), 0), ("0-4:2", (0, 2, 4), 0), ("0-4:2%1", (0, 2, 4), 1), ("3", (3,), 0), ("3,1,1-2", (1, 2, 3), 0)],
)  # fmt: skip
def test_array_expressions(text: str, indices: tuple[int, ...], throttle: int) -> None:
    array = parse_array(text)
    assert (array.indices, array.throttle) == (indices, throttle)
    if indices:
        assert tuple(parse_indices(array.format_indices(indices))) == indices


@pytest.mark.parametrize(
    "text",
    ["", "foo", "fold", "folds%", "folds%0", "0-", "-1", "4-0", "0-4:0", "1,,2", "1 3", "0-4%a", "folds-2", "a-b",
     "1.5", "0-4%-1", "\u0663", "0-999999999", "folds,1", "folds%2%2", "0--4"],
)  # fmt: skip
def test_invalid_arrays_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--array"):
        parse_array(text)


def test_indices_have_the_notation_of_sbatch() -> None:
    assert format_indices([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert expand_tasks("9", "0-2:2,5%1") == ["9_0", "9_2", "9_5"]
    assert expand_tasks("9", "") == expand_tasks("9", "damaged") == ["9"]


@pytest.mark.parametrize(
    ("array", "tasks"),
    [("folds%2", "0-1%2"), ("1", "1"), ("0-1%1", "0-1%1"), ("0-1:2", "0"), ("1,0", "0-1")],
)
def test_only_training_and_evaluation_get_the_array_of_folds(
    array: str, tasks: str, train: list[str], capsys: Capture
) -> None:
    training, evaluation, aggregate = list_batch_files(capsys, *train, "--array", array, *GPU)
    assert (
        read_sbatch_options(training)["array"] == read_sbatch_options(evaluation)["array"] == tasks
    )
    assert "array" not in read_sbatch_options(aggregate)
    chosen = ",".join(map(str, parse_indices(tasks)))
    assert aggregate.rstrip().endswith("run 2" if chosen == "0,1" else f"run 2 --only {chosen}")


def test_arrays_that_do_not_fit_are_refused(
    train: list[str], chain: list[str], phantom_source: Path, capsys: Capture
) -> None:
    assert "accepted: folds, 0-4" in expect_user_error(capsys, *train, "--array", "foo")
    assert "no fold 2; the store has 2" in expect_user_error(capsys, *train, "--array", "0-4")
    convert = ("convert", str(phantom_source), "s.zarr")
    for array in ("folds", "1,3", "0-4:2", "0"):
        assert "task" in expect_user_error(capsys, *convert, "--array", array)
    (text,) = list_batch_files(capsys, *convert, "--array", "8%4")
    assert read_sbatch_options(text)["array"] == "0-7%4"
    assert '--shard "$SLURM_ARRAY_TASK_ID"/8' in text
    for command in ("evaluate", "predict", "tune", "doctor", "verify"):
        assert "--array is for train, convert and chain" in expect_user_error(
            capsys, command, "x", "--array", "folds"
        )
    assert "no fold 3" in expect_user_error(capsys, *chain, "--array", "3")


def list_spellings(name: str) -> list[str]:
    letters = [letter for letter, long in SHORT_OPTIONS.items() if long == name]
    forms = [f"{name}=1", f"--{name}=1", f"--{name} 1", f"{name} 1", f" {name} = 1"]
    return forms + [
        form
        for letter in letters
        for form in (f"-{letter} 1", f"-{letter}1", f"{letter}=1", f"-{letter}=1")
    ]


@pytest.mark.parametrize("name", sorted(REPLACED))
def test_an_option_that_launch_sets_is_refused_in_every_spelling(name: str) -> None:
    for text in list_spellings(name):
        with pytest.raises(UserError, match=re.escape(REPLACED[name])):
            parse_sbatch_option(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("arr=0-4", "did you mean array"), ("Partition=x", "did you mean partition"), ("exlusive", "mean exclusive"),
     ("open_mode=append", "mean open-mode"), ("zzz=1", "--sbatch-plugin"), ("reservation", "needs a value"),
     ("hold=1", "takes no value"), ("gres=gpu:a100:2", "--gpus-per-node"), ("gres=ssd:1,gpu:2", "--gpus-per-node"),
     ("comment=a\n#SBATCH --array=0-3", "control characters"), ("=x", "KEY=VALUE"), ("-y 1", "no option -y"),
     ("qos=", "empty value"), ("", "KEY=VALUE")],
)  # fmt: skip
def test_unknown_and_broken_sbatch_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_sbatch_option(text)


def test_sbatch_options_apply_to_the_right_jobs(train: list[str], capsys: Capture) -> None:
    assert "use --array" in expect_user_error(
        capsys, *train, "--array", "folds", "--sbatch", "array=0-4%2"
    )
    assert "use --array" in expect_user_error(
        capsys, *train, "--array", "folds", "--sbatch=--array=0-4%2"
    )
    given = (
        "exclusive",
        "mail-type=END",
        "reservation=x",
        "hold",
        "nodelist=a",
        "container-image=y",
    )
    more = [word for text in given for word in ("--sbatch", text)]
    training, evaluation, aggregate = (
        read_sbatch_options(job)
        for job in list_batch_files(capsys, *train, "--array", "folds", *GPU, *more)
    )
    assert {"exclusive", "mail-type", "reservation", "hold", "nodelist", "container-image"} <= set(
        training
    )
    assert {"exclusive", "mail-type", "reservation", "nodelist"} <= set(evaluation)
    assert "hold" not in evaluation, "it waits for the training"
    assert {"mail-type", "reservation", "container-image"} <= set(aggregate)
    assert not {"exclusive", "hold", "nodelist"} & set(aggregate)
    (single,) = list_batch_files(
        capsys, *train, "--sbatch", "-p gpu", "--sbatch", "--time=90", "--sbatch", "mem=8GB"
    )
    found = read_sbatch_options(single)
    assert (found["partition"], found["time"], found["mem"]) == ("gpu", "01:30:00", "8G")
    assert "contradicts --partition" in expect_user_error(
        capsys, *train, "--partition", "a", "--sbatch", "partition=b"
    )


def test_stages_without_gpu_stay_off_the_gpu_nodes(chain: list[str], capsys: Capture) -> None:
    requested = [
        "--array",
        "folds%2",
        "--gpus-per-node",
        "a100:1",
        "--partition",
        "gpu",
        "--qos",
        "long",
        "--account",
        "lab",
    ]
    requested += ["--constraint", "ib", "--mem", "400G", "--gpu-bind", "closest"]
    convert, training, evaluation, aggregate = list_batch_files(capsys, *chain, *requested)
    for text in (training, evaluation):
        found = read_sbatch_options(text)
        assert (found["gpus-per-node"], found["partition"], found["mem"]) == (
            "a100:1",
            "gpu",
            "400G",
        )
        assert "--gpu-bind=closest" in text
    for text, limit in ((convert, "04:00:00"), (aggregate, "00:30:00")):
        found = read_sbatch_options(text)
        assert not {"gpus-per-node", "partition", "qos", "constraint", "mem"} & set(found)
        assert (found["account"], found["time"]) == ("lab", limit)
        assert "gpu-bind" not in text
    assert read_sbatch_options(evaluation)["time"] == "04:00:00"
    assert read_sbatch_options(training)["time"] == "24:00:00"


def test_each_stage_can_have_its_own_partition_time_and_memory(
    chain: list[str], capsys: Capture
) -> None:
    requested = [
        "--array",
        "folds",
        *GPU,
        "--cpu-partition",
        "cpu",
        "--time",
        "2h",
        "--convert-tasks",
        "4%2",
        "--name",
        "n",
    ]
    stages = (
        "aggregate:time=1h",
        "aggregate:partition=short",
        "evaluate:gpus-per-node=0",
        "convert:mem=16G",
        "train:-x n1",
    )
    requested += [word for text in stages for word in ("--stage-option", text)]
    convert, training, evaluation, aggregate = (
        read_sbatch_options(job) for job in list_batch_files(capsys, *chain, *requested)
    )
    assert (convert["partition"], convert["mem"], convert["array"]) == ("cpu", "16G", "0-3%2")
    assert (training["partition"], training["exclude"], training["time"]) == (
        "gpu",
        "n1",
        "02:00:00",
    )
    assert (evaluation["partition"], evaluation["time"]) == ("cpu", "02:00:00"), (
        "at most the time of the training"
    )
    assert "gpus-per-node" not in evaluation
    assert (aggregate["partition"], aggregate["time"]) == ("short", "01:00:00")
    assert "exclude" not in convert.keys() | evaluation.keys() | aggregate.keys()
    names = [job["job-name"] for job in (convert, training, evaluation, aggregate)]
    assert names == ["n-convert", "n-train", "n-evaluate", "n-aggregate"], (
        "each has its own batch file"
    )
    for option, message in [
        ("agregate:time=1h", "stages are convert, train, evaluate, aggregate"), ("time=1h", "STAGE:KEY=VALUE"),
        ("train:nodes=2", "use --nodes"), ("aggregate:gpus-per-node=1", "one process"),
        ("evaluate:time=x", "written 24h"),
        ("aggregate:array=0-1", "use --array"), ("evaluate:zzz=1", "no option zzz"),
    ]:  # fmt: skip
        assert message in expect_user_error(
            capsys, *chain, *GPU, "--array", "folds", "--stage-option", option
        )


def test_a_short_stage_is_asked_to_stop_before_its_end() -> None:
    main = Resources(time="24:00:00", signal_s=3600)
    aggregate = compute_stage_resources(main, "aggregate")
    assert 0 < aggregate.signal_s < time_to_seconds(aggregate.time)


def test_training_without_gpus_prints_a_warning(
    chain: list[str], train: list[str], capsys: Capture
) -> None:
    for words in (chain, train):
        for confirmed, expected in (
            ([], True),
            (["--cpu"], False),
            (["--gpus-per-node", "0"], False),
            (GPU, False),
        ):
            assert run([*words, *confirmed, "--dry-run"]) == 0
            assert ("requests no GPU" in capsys.readouterr().err) == expected
    assert run([*train, "--device", "cpu", "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "count", "kind"),
    [
        ("4", 4, ""),
        ("a100:4", 4, "a100"),
        ("gpu:a100:4", 4, "a100"),
        ("gpu:2", 2, ""),
        ("0", 0, ""),
    ],
)
def test_gpu_counts(text: str, count: int, kind: str) -> None:
    request = parse_gpus(text)
    assert (request.count, request.model) == (count, kind)


@pytest.mark.parametrize(
    "text",
    ["-1", "four", "a100", "a100:", "gpu:gpu:4", "2.5", "", "a100:2,v100:2", "a b:1", "\u0663"],
)
def test_invalid_gpu_counts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="a100:4"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("text", "form"),
    [("64G", "64G"), ("64GB", "64G"), ("64 GiB", "64G"), ("512m", "512M"), ("0", "0")],
)
def test_memory_sizes(text: str, form: str) -> None:
    assert parse_memory(text) == form
    for wrong in (f"-{text}", f"{text}x", "lots", "", "1.5G"):
        with pytest.raises(UserError):
            parse_memory(wrong)


@pytest.mark.parametrize(
    "text", ["00:00:00", "0-00", "-5", "1-25", "24H", "1:60:00", "UNLIMITED", "", "\u0663"]
)
def test_times_that_slurm_reads_differently_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        parse_time_limit(text)
    assert [time_to_seconds(time) for time in ("1-00:00:00", "24:00:00", "1-00", "00:01:30")] == [
        86400,
        86400,
        86400,
        90,
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-per-node", "4"], "did you mean --gpus-per-node?; see python -m launch --help"),
        (["--gpus", "4"], "did you mean --gpus-per-node?"),
        (["--nodes", "0"], "--nodes: 0: a whole number"),
        (["--nodes", "x"], "--nodes: x"),
        (["--tasks-per-node", "-1"], "--tasks-per-node"),
        (["--restarts", "-1"], "--restarts"),
        (["--gpus-per-node", "-1"], "--gpus-per-node"),
        (["--after", "abc"], "--after"),
        (["--name", "a/b"], "--name"),
        (["--name", "a\nb"], "--name"),
        (["--partition", ""], "--partition"),
        (["--partition=--"], "--partition"),
        (["--convert-tasks", "3"], "is for chain"),
        (["--convert-sbatch", "hold"], "is for chain"),
        (["--stage-option", "train:hold"], "is for several jobs"),
        (["--cpu-partition", "x"], "is for several jobs"),
        (["--time", "1h", "--signal", "4000"], "stopped at once"),
        (["--follow", "--dry-run"], "--follow has no effect with --dry-run"),
        (["--parsable", "--dry-run"], "--parsable has no effect with --dry-run"),
        (["--cluster", "local", "--partition", "x"], "--cluster local"),
        (["--cluster", "local", "--launcher", "srun"], "--cluster local"),
        (["--cluster", "local", "--after", "1"], "--cluster local"),
        (["--cluster", "local", "--nodes", "2"], "this machine is one node"),
        (
            ["--cluster", "local", "--gpus-per-node", "65", "train.global_batch_size=65"],
            "this machine has",
        ),
        (["--cluster", "debug", "--dry-run"], "--cluster debug"),
        (["--cluster", "debug", "--time", "1h"], "--cluster debug"),
        (["--mem", "1G", "--mem-gib", "2"], "give one of them"),
        (["--cpu", "--gpus-per-node", "1"], "contradicts"),
        (["--gpu-bind", "closest"], "needs --gpus-per-node"),
        (["--env", "PYTHONPATH=x"], "is set by launch"),
        (["--env", "A"], "NAME=VALUE"),
        (["--setup", "/nowhere/x"], "no such file"),
        (["--sbatch-plugin", "partition=x"], "use --sbatch"),
    ],
)
def test_an_option_without_effect_is_refused(
    words: list[str], message: str, train: list[str], capsys: Capture
) -> None:
    assert message in expect_user_error(capsys, *train, *words)


def test_every_command_refuses_the_options_it_ignores(
    phantom_source: Path, phantom_store: Path, capsys: Capture
) -> None:
    convert = ("convert", str(phantom_source), "s.zarr")
    tune = ("tune", f"data.store={phantom_store}", "run.dir=x")
    for words, message in [
        ((*convert, "--nodes", "2"), "one process"),
        ((*convert, "--launcher", "torchrun"), "one process"),
        (("verify", "x.zarr", "--gpus-per-node", "1"), "uses no GPU"),
        ((*tune, "--gpu-per-node", "1"), "did you mean --gpus-per-node?"),
        ((*tune, "--launcher", "torchrun"), "no effect on tune"),
        ((*tune, "--address", "a:1"), "its own Ray cluster"),
        (("doctor", "--follow"), "no effect on doctor"),
        (("doctor", "--nodez", "2"), "did you mean --nodes?"),
        (("status", "x", "--nodes", "2"), "no option --nodes"),
        (("logs", "x", "--follow", "--lines", "3"), "--lines has no effect with --follow"),
        (("logs", "x", "--lines", "-3"), "--lines"),
        (("--lines", "3", "logs", "x"), "no jobs/ in it"),
        (("staus", "x"), "did you mean status?"),
    ]:  # fmt: skip
        assert message in expect_user_error(capsys, *words)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("tarin", "train"), ("evalute", "evaluate"), ("docter", "doctor"), ("chian", "chain"),
     ("tunes", "tune"), ("cancle", "cancel"), ("statsu", "status")],
)  # fmt: skip
@pytest.mark.parametrize(
    "options", [[], ["--gpus-per-node", "2"], ["--array", "folds"], ["--cluster", "debug"]]
)
def test_a_misspelt_command_is_reported_before_its_options(
    misspelt: str, meant: str, options: list[str], capsys: Capture
) -> None:
    for words in ([misspelt, *options], [*options, misspelt]):
        error = expect_user_error(capsys, *words, "run.dir=x")
        assert f"{misspelt}: no such command; did you mean {meant}?" in error


def test_a_command_like_no_other_is_reported_without_a_suggestion(capsys: Capture) -> None:
    error = expect_user_error(capsys, "xyzzy")
    assert "xyzzy: no such command; one of " in error


def test_job_dir_is_the_folder_of_batch_file_and_logs(
    train: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (job,) = list_batch_files(capsys, *train, "--cpu", "--job-dir", str(tmp_path / "jobs_of_run"))
    assert read_sbatch_options(job)["output"].startswith(f"{tmp_path / 'jobs_of_run'}/")


@pytest.mark.parametrize("form", ["--folder {}", "--folder={}"])
def test_the_old_name_of_job_dir_has_the_same_effect_and_one_deprecation_line(
    form: str, train: list[str], tmp_path: Path, capsys: Capture
) -> None:
    folder = str(tmp_path / "x")
    assert run([*train, "--cpu", "--job-dir", folder, "--dry-run"]) == 0
    expected = capsys.readouterr()
    assert expected.err == ""
    assert run([*train, "--cpu", *form.format(folder).split(), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected.out
    assert shown.err == "launch: --folder is deprecated; use --job-dir\n"
    error = expect_user_error(capsys, *train, "--folder", folder, "--job-dir", folder)
    assert "--folder is the old name of --job-dir; give one of them" in error


def test_the_help_lists_job_dir_and_not_its_old_name(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--job-dir" in text
    assert "--folder" not in text


def test_environment_setup_and_placement_reach_the_ranks(
    train: list[str], tmp_path: Path, capsys: Capture
) -> None:
    setup = tmp_path / "site setup.sh"
    setup.write_text("export FROM_SETUP=1\n")
    words = ["--setup", str(setup), "--env", "NCCL_DEBUG=WARN", "--env", "WORD=a b", *GPU]
    words += [
        "--cpu-bind",
        "cores",
        "--gpu-bind",
        "closest",
        "--distribution",
        "block:block",
        "--sbatch-plugin",
        "site=1",
    ]
    (text,) = list_batch_files(capsys, *train, *words)
    assert (
        "srun --export=ALL --label --kill-on-bad-exit=1 --distribution=block:block --cpu-bind=cores --gpu-bind=closest"
        in text
    )
    assert "#SBATCH --site=1\n" in text
    assert (
        text.index("source ")
        < text.index("export NCCL_DEBUG=WARN")
        < text.index("export PYTHONPATH")
    )
    assert "export WORD='a b'\n" in text


@pytest.mark.parametrize("content", ["export SEEN=1\n", "false\n"])
def test_the_setup_file_is_sourced_first_and_must_succeed(content: str, tmp_path: Path) -> None:
    setup = tmp_path / "it's setup.sh"
    setup.write_text(content)
    job = BatchJob("n", ("x",), tmp_path, setup=setup, environment=("OTHER=a b",), workdir=tmp_path)
    text = re.sub(
        r"^exec .*",
        'echo "seen $SEEN $OTHER"',
        render_batch_file(job),
        flags=re.MULTILINE | re.DOTALL,
    )
    done = subprocess.run(["/bin/bash", "-c", text], capture_output=True, text=True)
    if content == "false\n":
        assert done.returncode == 1
        assert done.stderr == f"launch: {setup} failed\n"
    else:
        assert done.stdout == "seen 1 a b\n"
    words = build_local_command(job)
    assert words[:3] == ["bash", "-c", 'source "$0" && exec "$@"']
    assert "OTHER=a b" in words


def test_a_batch_file_without_memory_says_so() -> None:
    job = BatchJob("n", ("x",), Path("/x"))
    assert "##SBATCH --mem=" in render_batch_file(job)
    assert "the cluster's default applies" in render_batch_file(job)
    requested = render_batch_file(BatchJob("n", ("x",), Path("/x"), resources=Resources(mem="64G")))
    assert "#SBATCH --mem=64G\n" in requested
    assert "##SBATCH" not in requested
