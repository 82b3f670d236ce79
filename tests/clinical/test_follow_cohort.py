"""`liverseg follow --table`: several patients, resumed, on two ranks, with the tables that
spreadsheets write."""

import json
from pathlib import Path

import pytest

from liverseg_dist.commands.follow_cohort import read_patients
from liverseg_dist.commands.main import main
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError
from tests.clinical.patients import BASELINE, STILL, paint_patient
from tests.clinical.test_follow_command import GROWS, write_scan
from tests.distributed.launch import torchrun
from tests.inference.small_run import SmallRun

RADII = {"ann": (9.0, 5.2), "bob": (7.0, 10.0)}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    rows = ["Patient; Date ;SCAN"]
    for patient, radii in RADII.items():
        for number, radius in enumerate(radii):
            write_scan(
                folder, f"{patient}_{number}", paint_patient(BASELINE, STILL, [(*GROWS, radius)])
            )
            rows.append(f"{patient};2024-0{number + 1}-01;masks/{patient}_{number}.nii.gz")
    rows.append("")
    file = folder / "patients.csv"
    # As Excel saves it: byte order mark, semicolons, CRLF.
    file.write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    return file


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    code = main(
        ["follow", *map(str, arguments), "--registration", "rigid", "--device", "cpu", "--json"]
    )
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out.splitlines()[-1])


def test_two_patients_on_one_page(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, result = call(capsys, "--table", table, "--out", out)
    assert (code, result["patients"]) == (EXIT_DONE, 2)
    rows = json.loads((out / "cohort.json").read_text())["patients"]
    assert {row["patient"]: row["recist"] for row in rows} == {"ann": "PR", "bob": "PD"}
    page = (out / "cohort.html").read_text()
    assert page.count("<rect ") == 2
    assert page.count("<polyline ") == 2
    for row in rows:
        assert (out / row["page"]).is_file()
        assert f'href="{row["page"]}"' in page
    assert str(table.parent) not in page
    pages = [out / row["page"] for row in rows]
    before = [page.stat().st_mtime_ns for page in pages]
    assert call(capsys, "--table", table, "--out", out)[0] == EXIT_DONE
    assert [page.stat().st_mtime_ns for page in pages] == before
    # follow.json is written last: where it is missing, the patient was interrupted.
    (pages[0].parent / "follow.json").unlink()
    assert call(capsys, "--table", table, "--out", out)[0] == EXIT_DONE
    assert (pages[0].parent / "follow.json").is_file()
    assert pages[0].stat().st_mtime_ns > before[0]
    assert pages[1].stat().st_mtime_ns == before[1]
    arguments = ("follow", "--table", str(table), "--out", str(tmp_path / "ranks" / "out"))
    ended = torchrun(
        2, "-m", "liverseg_dist", *arguments, "--registration", "rigid", "--device", "cpu"
    )
    assert ended.returncode == 0, ended.stderr
    for name in ("cohort.json", "cohort.csv", "cohort.html"):
        assert (tmp_path / "ranks" / "out" / name).read_bytes() == (out / name).read_bytes()


def test_one_bad_patient_does_not_stop_the_others(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = table.with_name("more.csv")
    lines = table.read_text(encoding="utf-8-sig").strip().splitlines()[:3]
    more.write_text(
        "\n".join(
            [*lines, "eve;2024-01-01;masks/absent.nii.gz", "eve;2024-02-01;masks/ann_0.nii.gz"]
        )
    )
    code, result = call(
        capsys,
        "--table",
        more,
        "--labels",
        "liver=1,2",
        "--labels",
        "tumour=2",
        "--out",
        tmp_path / "out",
    )
    assert (code, result["patients"], list(result["failed"])) == (EXIT_FAILED, 1, ["eve"])
    assert "absent.nii.gz" in (tmp_path / "out" / "cohort.csv").read_text()
    assert str(table.parent) not in (tmp_path / "out" / "cohort.html").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty table"),
        ("case,patient\na,b\n", "column date is missing"),
        ("patient,date,scan\na,2024-01-01,\n", "line 2: column scan is empty"),
        ("patient,date,scan\na,01.02.2024,x.nii.gz\n", "no date"),
        ("patient,date,scan\na,2024-01-01,x.nii.gz\n", "one scan"),
        ("patient,date,scan\na,2024-01-01,x.nii.gz\na,2024-01-01,y.nii.gz\n", "one date"),
    ],
)
def test_a_wrong_table_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_patients(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("patient\tdate\tscan\na\t2024-01-01\tx.nii\na\t2024-02-01\ty.nii\n", "utf-8"),
        ("patient,date,scan\n# note\na,2024-01-01,x.nii\na,2024-02-01,y.nii\n", "utf-16"),
        ("sep=;\npatient;date;scan\na;2024-01-01;x.nii\na;2024-02-01;y.nii\n", "utf-8-sig"),
    ],
)
def test_a_table_may_have_every_form_of_other_tables(
    text: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(text, encoding=encoding)
    (patient,) = read_patients(tmp_path / "t.csv")
    assert patient.patient == "a"
    assert [mask.name for mask in patient.masks] == ["x.nii", "y.nii"]
    assert patient.images == (None, None)


def test_rows_are_sorted_by_date_and_names_stay_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "patient,date,scan\n007,2024-05-01,b.nii\n 007 ,2024-01-01,a.nii\n"
    )
    (patient,) = read_patients(tmp_path / "t.csv")
    assert patient.patient == "007"
    assert [mask.name for mask in patient.masks] == ["a.nii", "b.nii"]


def test_a_table_goes_alone(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = call(capsys, "scan.nii.gz", "--table", table, "--out", tmp_path / "out")
    assert code == EXIT_USER
    assert "--table" in result["error"]


def test_scans_of_a_table_with_a_run(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder for each date, as hospitals export them: all files have one name. A patient whose
    scan is damaged is reported with the reason, and the same line again segments nothing."""
    rows = ["patient,date,scan"]
    for number, patient in enumerate(("ann", "bob", "eve")):
        source = small_run.source / "imagesTr" / f"liver_{number % 2}.nii.gz"
        for date in ("2024-01-01", "2024-06-01"):
            folder = tmp_path / "in" / patient / date
            folder.mkdir(parents=True)
            is_damaged = patient == "eve" and date == "2024-06-01"
            content = source.read_bytes()
            (folder / "ct.nii.gz").write_bytes(content[:900] if is_damaged else content)
            rows.append(f"{patient},{date},{patient}/{date}/ct.nii.gz")
    table = tmp_path / "in" / "patients.csv"
    table.write_text("\n".join(rows))
    out = tmp_path / "out"
    code, result = call(capsys, "--table", table, "--run", small_run.run, "--out", out)
    assert (code, result["patients"], list(result["failed"])) == (EXIT_FAILED, 2, ["eve"])
    assert "no such file" not in result["failed"]["eve"]
    assert "ct" in result["failed"]["eve"]
    content = json.loads((out / "patients" / "ann" / "follow.json").read_text())
    assert content["dates"] == ["2024-01-01", "2024-06-01"]
    # One scan twice: what the run found at the first date is there at the second.
    assert {lesion["status"] for lesion in content["lesions"]} <= {"persistent"}
    assert len(list((out / "masks").glob("*.nii.gz"))) == 5
    page = (out / "patients" / "ann" / "follow.html").read_text()
    assert "<image " in page or not content["lesions"]
    assert str(tmp_path) not in page + (out / "cohort.html").read_text()
    masks = {file: file.stat().st_mtime_ns for file in (out / "masks").glob("*.nii.gz")}
    pages = {file: file.stat().st_mtime_ns for file in out.glob("patients/*/follow.html")}
    call(capsys, "--table", table, "--run", small_run.run, "--out", out)
    assert {file: file.stat().st_mtime_ns for file in masks} == masks
    assert {file: file.stat().st_mtime_ns for file in pages} == pages
