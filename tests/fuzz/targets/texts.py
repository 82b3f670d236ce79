"""What people write or download: dataset.json, YAML settings, overrides, tables, split files."""

import json
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

import yaml

from launch.sweep.sweep_config import SweepSettings
from liverseg_dist.config import Settings, SplitConfig, load_settings
from liverseg_dist.config.settings import load_settings_as
from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.spacing_table import read_spacing_table
from liverseg_dist.data.splits import check_split_files
from liverseg_dist.model.external_weights import external_parameter_names
from tests.fuzz.judge import Wrong
from tests.fuzz.mutate import NUMBERS, TEXTS, damaged, damaged_json, damaged_tree, json_text

INDEX = {
    "name": "Liver",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "cancer"},
    "numTraining": 2,
    "training": [
        {"image": f"./imagesTr/a_{n}.nii.gz", "label": f"./labelsTr/a_{n}.nii.gz"} for n in (1, 2)
    ],
    "test": ["./imagesTs/a_3.nii.gz"],
}


class IndexTarget:
    """`read_dataset` on a folder of empty files: the cases that json tells, none outside the folder."""

    name = "index"

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, case: Path, chance: Random) -> None:
        for name in ("imagesTr/a_1.nii.gz", "labelsTr/a_1.nii.gz", "imagesTs/a_3.nii.gz"):
            (case / name).parent.mkdir(exist_ok=True)
            (case / name).touch()
        (case / "dataset.json").write_bytes(
            damaged_json(INDEX, chance, ensure_ascii=chance.random() < 0.5)
        )

    def check(self, case: Path) -> None:
        dataset = read_dataset(case)
        content = json.loads((case / "dataset.json").read_bytes())
        if not content.keys() & {"training", "test", "testing"}:  # file names decide
            content |= {"training": ["imagesTr/a_1.nii.gz"], "test": ["imagesTs/a_3.nii.gz"]}
        for part, cases in (("training", dataset.training), ("test", dataset.test)):
            entries: list[str] = []
            for entry in content.get(part, []):
                image = entry["image"] if isinstance(entry, dict) else entry
                # A list or a mapping has a file for each channel.
                if isinstance(image, dict):
                    image = list(image.values())
                entries += image if isinstance(image, list) else [image]
            posix = [PurePosixPath(entry.replace("\\", "/")) for entry in entries]
            images = {case / path for path in posix if not path.name.startswith("._")}
            # A file under a slightly other name is found in the same folder.
            found_images = {
                c.image for c in cases if not (c.image.is_file() and c.image not in images)
            }
            others = [c.image for c in cases if c.image not in found_images]
            if not found_images <= images or any(
                path.parent not in {i.parent for i in images} for path in others
            ):
                raise Wrong(
                    f"{part}: {sorted(str(c.image) for c in cases)}, the index says {sorted(map(str, images))}"
                )
            for found in cases:
                for path in (found.image, found.label):
                    if path is not None and (".." in path.parts or not path.is_relative_to(case)):
                        raise Wrong(f"{path} leaves the folder")
        texts = [
            dataset.name,
            *(f.message for c in (*dataset.training, *dataset.test) for f in c.findings),
        ]
        texts += [note.message for note in dataset.notes]
        if not all(text.isprintable() for text in texts):
            raise Wrong(f"control characters get through: {texts!r}"[:500])


BOMBS = (
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]\nseed: [*h,*h,*h,*h,*h,*h,*h,*h,*h]\n",
    "train: &a {schedule: *a}\n",
    "model: {features: &f [1, *f]}\n",
    "x: &a\n  <<: *a\n",
    "seed: " + "[" * 3000 + "]" * 3000 + "\n",
    "? [a, b]\n: 1\n",
    "!!python/object/apply:os.system ['true']\n",
    "seed: 0x" + "f" * 9000 + "\n",
    "seed: " + "9" * 9000 + "\n",
    "seed: 2001-99-99\n",
    "seed: 1:60:60:60\n",
    "seed: !!binary xyz=\n",
    "seed: !!int x\n",
    "seed: !!float x\n",
    "seed: !!timestamp x\n",
    "\x85seed: 1\n",
    "&a : *a\n",
    "%YAML 9.9\n---\nseed: 1\n",
    "a: 1\n---\nb: 2\n",
)
DICT_BOMB = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}, z: *a{n - 1}}}\n" for n in range(1, 30)
)


class ConfigTarget:
    """`load_settings` and the sweep's settings: what is accepted is what YAML says, and survives being saved."""

    name = "config"

    def __init__(self, folder: Path) -> None:
        configs = Path(__file__).resolve().parents[3] / "configs"
        self.texts = [path.read_text(encoding="utf-8") for path in sorted(configs.glob("*.yaml"))]
        self.texts.append(Settings().to_yaml())

    def make(self, case: Path, chance: Random) -> None:
        text = chance.choice(self.texts)
        how = chance.randrange(12)
        if how == 0:
            raw = chance.choice((*BOMBS, DICT_BOMB)).encode()
        elif how <= 6:
            tree = yaml.safe_load(text)
            raw = json_text(
                damaged_tree(tree, chance)
            )  # JSON is YAML, and says more than yaml.dump would write
        else:
            raw = damaged(text.encode(), chance)
        overrides = [self._override(chance) for _ in range(chance.choice((0, 0, 1, 2)))]
        (case / "c.yaml").write_bytes(raw)
        (case / "overrides.json").write_text(json.dumps([chance.random() < 0.2, overrides]))

    def _override(self, chance: Random) -> str:
        key = chance.choice(
            (
                "seed",
                "train.learning_rate",
                "model.features",
                "data.patch_size",
                "train",
                "x.y",
                "",
                ".",
            )
        )
        value = chance.choice(
            (
                *TEXTS,
                *map(str, NUMBERS),
                *BOMBS,
                "{a: b}",
                "[1,",
                "2001-02-30",
                "&a [*a]",
                "!!set {a}",
                "1e-3",
                "[4,8]",
            )
        )
        return chance.choice(
            (f"{key}={value}", f"{key}={value}", f"{key}{value}", f"{value}={key}")
        )

    def check(self, case: Path) -> None:
        sweep, overrides = json.loads((case / "overrides.json").read_text())
        kind = SweepSettings if sweep else Settings
        file = case / "c.yaml"
        settings = load_settings_as(kind, [file], overrides)
        again = case / "again.yaml"
        again.write_text(
            yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
        )
        if load_settings_as(kind, [again]) != settings:
            raise Wrong("saved and loaded again it has other settings")
        if not overrides:
            self._compare(yaml.safe_load(file.read_bytes()), settings.model_dump(), "")

    def _compare(self, said: Any, ours: Any, key: str) -> None:
        if isinstance(said, dict) and isinstance(ours, dict):
            for name, value in said.items():
                if name not in ours:
                    raise Wrong(f"{key}.{name} is not among the settings")
                self._compare(value, ours[name], f"{key}.{name}")
        elif isinstance(said, (int, float)) and isinstance(ours, (int, float)) and said != ours:
            raise Wrong(f"{key} is {ours}, the file says {said}")


class TablesTarget:
    """Spacing tables, split files, patients, names of tensors."""

    name = "tables"

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, case: Path, chance: Random) -> None:
        csv = b"case,z_mm,y_mm,x_mm\nliver_1,2.5,0.7,0.7\nliver_2,1,0.8,0.8\n"
        patients = b"case,patient\nliver_1,p\nliver_2,p\n"
        splits = {"test": ["liver_1"], "folds": [["liver_2"], ["liver_3"]]}
        names = {"a.b.weight": "encoder.0.0.conv.weight", "c": "heads.0.bias"}
        bomb = chance.random() < 0.1
        (case / "spacing.csv").write_bytes(damaged(csv, chance))
        (case / "spacing.yaml").write_bytes(
            chance.choice((*BOMBS, DICT_BOMB)).encode()
            if bomb
            else damaged_json({"liver_1": [2.5, 0.7, 0.7]}, chance)
        )
        (case / "patients.csv").write_bytes(damaged(patients, chance))
        (case / "splits.json").write_bytes(damaged_json(splits, chance))
        (case / "names.yaml").write_bytes(
            chance.choice((*BOMBS, DICT_BOMB)).encode() if bomb else damaged_json(names, chance)
        )
        (case / "which").write_text(
            chance.choice(
                ("spacing.csv", "spacing.yaml", "patients.csv", "splits.json", "names.yaml")
            )
        )

    def check(self, case: Path) -> None:
        path = case / (case / "which").read_text()
        if path.name.startswith("spacing"):
            for values in read_spacing_table(path).values():
                if len(values) != 3 or not all(0.01 <= mm <= 100 for mm in values):
                    raise Wrong(f"a voxel size of {values}")
        elif path.name == "patients.csv":
            check_split_files(SplitConfig(patients=path), ["liver_1", "liver_2"])
        elif path.name == "splits.json":
            check_split_files(SplitConfig(kind="file", file=path), ["liver_1"])
            json.loads(path.read_bytes())
        elif external_parameter_names(path, load_settings().model) != yaml.load(
            path.read_bytes(),
            yaml.BaseLoader,  # noqa: S506 - a subclass of SafeLoader's base, builds text only
        ):
            raise Wrong("YAML names other tensors")
