"""DICOM results of a mask: equal voxels in independent readers, codes, report, and privacy."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK
import skimage.draw

from liverseg_dist.clinical.dicom_contours import trace_outlines
from liverseg_dist.clinical.quantify import quantify_case
from liverseg_dist.data.io.dicom_series import DicomScan, read_dicom_scan
from liverseg_dist.data.io.dicom_structure_set import fill_polygon
from liverseg_dist.inference.dicom_results import DicomResults, write_dicom_results
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.phantom.dicom_series import SeriesOptions, build_series
from liverseg_dist.volume import Volume
from tests.data.dicom_sources import make_grid, make_scan, write_scan

VARIANTS = ("oblique", "tilted", "gap", "enhanced")
PRODUCER = "abc123"


def find_tool(name: str) -> str:
    """A command of the package dcmqi, beside the interpreter."""
    return str(Path(sys.executable).parent / name)


def make_mask(volume: Volume) -> Volume:
    """An organ with three lesions of different sizes."""
    mask = np.zeros(volume.shape, np.uint8)
    mask[3:20, 4:34, 5:38] = 1
    mask[14:18, 20:30, 20:30] = 2
    mask[5:9, 8:13, 8:14] = 2
    mask[9:12, 25:30, 8:12] = 2
    return Volume(mask, volume.grid)


def make_source(folder: Path, variant: str) -> DicomScan:
    scan = make_scan(make_grid(variant if variant in ("oblique", "tilted") else "axial"))

    def remove_two(datasets: list[Any]) -> None:
        del datasets[10:12]

    source = folder / variant
    if variant == "enhanced":
        image = hd.legacy.LegacyConvertedEnhancedCTImage(
            build_series(scan, SeriesOptions("e")), hd.UID(), 7, hd.UID(), 1
        )
        source.mkdir()
        image.save_as(source / "e.dcm")
    else:
        write_scan(source, scan, remove_two if variant == "gap" else None)
    return DicomScan((source,), f"scan_{variant}", fill_gaps=variant == "gap")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DicomScan, Volume, Path]]:
    """Source, mask and folder of the results of each variant."""
    found = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp(variant)
        source = make_source(folder, variant)
        mask = make_mask(read_dicom_scan(source).volume)
        out = folder / "out"
        out.mkdir()
        options = DicomResults(model=PRODUCER, with_contours=True)
        files = write_dicom_results(source, mask, LITS_SCHEME, out, options)
        assert [file.name for file in files] == [
            f"scan_{variant}.seg.dcm",
            f"scan_{variant}.sr.dcm",
            f"scan_{variant}.rt.dcm",
        ]
        found[variant] = (source, mask, out)
    return found


def frames_of(seg: Any, pixels: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(segment number, position in LPS, values) of each frame, by the functional groups alone."""
    for group, values in zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        yield number, position, values != 0


def expected_segments(mask: Volume) -> dict[str, np.ndarray]:
    segments = {"liver": mask.voxels > 0}
    for lesion in quantify_case(mask, LITS_SCHEME).lesions:
        canonical = mask.reoriented()
        part = np.zeros(canonical.shape, bool)
        box = tuple(slice(*ends) for ends in lesion.box)
        part[box] = canonical.voxels[box] == 2
        own = Volume(part, canonical.grid).reoriented(mask.grid.orientation)
        segments[f"tumour {lesion.number}"] = own.voxels
    return segments


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reader", ["highdicom", "SimpleITK"])
def test_every_voxel_is_at_its_place(
    written: dict[str, tuple[DicomScan, Volume, Path]], variant: str, reader: str
) -> None:
    """The frames are put back by their positions; slices without a source have no frame."""
    source, mask, out = written[variant]
    file = out / f"{source.name}.seg.dcm"
    seg = hd.seg.segread(file)
    pixels = seg.pixel_array
    if reader == "SimpleITK":
        pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
    labels = {int(one.SegmentNumber): str(one.SegmentLabel) for one in seg.SegmentSequence}
    assert list(labels.values()) == ["liver", "tumour 1", "tumour 2", "tumour 3"]
    found = {label: np.zeros(mask.shape, bool) for label in labels.values()}
    for number, position, values in frames_of(seg, pixels):
        index = mask.grid.index_of(np.array([-1, -1, 1]) * position)
        assert np.abs(index - np.rint(index)).max() < 0.02
        assert tuple(np.rint(index[1:])) == (0, 0)
        found[labels[number]][round(index[0])] = values
    for label, expected in expected_segments(mask).items():
        if variant == "gap":
            expected = expected.copy()
            expected[[10, 11]] = False
        np.testing.assert_array_equal(found[label], expected, err_msg=label)


def test_dcmqi_reads_the_same_segments(
    written: dict[str, tuple[DicomScan, Volume, Path]], tmp_path: Path
) -> None:
    """dcmqi is an implementation of its own (DCMTK); its command comes with the package."""
    source, mask, out = written["oblique"]
    subprocess.run(
        [find_tool("segimage2itkimage"), "--inputDICOM", str(out / f"{source.name}.seg.dcm"),
         "--outputDirectory", str(tmp_path), "--outputType", "nifti"],
        check=True, capture_output=True,
    )  # fmt: skip
    for number, expected in enumerate(expected_segments(mask).values(), start=1):
        image = SimpleITK.ReadImage(str(tmp_path / f"{number}.nii.gz"))
        values = SimpleITK.GetArrayFromImage(image)
        assert int((values != 0).sum()) == int(expected.sum())
        for index in np.argwhere(expected)[:: max(1, expected.sum() // 20)]:
            place = np.array([-1, -1, 1]) * mask.grid.world_mm(index)
            assert image.GetPixel(image.TransformPhysicalPointToIndex(place.tolist())) != 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_have_codes_and_tracking_ids(
    written: dict[str, tuple[DicomScan, Volume, Path]], variant: str
) -> None:
    source, _, out = written[variant]
    seg = pydicom.dcmread(out / f"{source.name}.seg.dcm")
    organ, first, *_ = seg.SegmentSequence
    assert organ.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert organ.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "123037004"
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert first.AnatomicRegionSequence[0].CodeValue == "10200004"
    assert first.TrackingID == "tumour 1"
    assert len({one.TrackingUID for one in seg.SegmentSequence}) == 4
    algorithm = first.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "liverseg_dist"
    assert PRODUCER in algorithm.AlgorithmVersion
    assert organ.RecommendedDisplayCIELabValue != first.RecommendedDisplayCIELabValue
    image = pydicom.dcmread(next(source.paths[0].iterdir()), stop_before_pixels=True)
    assert seg.StudyInstanceUID == image.StudyInstanceUID
    assert seg.FrameOfReferenceUID == image.FrameOfReferenceUID
    assert seg.PatientID == image.PatientID


def test_the_standard_is_met(written: dict[str, tuple[DicomScan, Volume, Path]]) -> None:
    """dciodvfy (Debian: dicom3tools) checks each object where it is installed; pydicom's readers
    always."""
    for source, _, out in written.values():
        for suffix in (".seg.dcm", ".sr.dcm", ".rt.dcm"):
            file = out / f"{source.name}{suffix}"
            pydicom.dcmread(file)
            if shutil.which("dciodvfy") is None:
                continue
            checked = subprocess.run(
                ["dciodvfy", "-new", str(file)], check=False, capture_output=True, text=True
            )
            lines = (checked.stdout + checked.stderr).splitlines()
            assert [line for line in lines if line.startswith("Error")] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_filled_contours_give_the_mask(
    written: dict[str, tuple[DicomScan, Volume, Path]], variant: str
) -> None:
    """Filled by skimage, on the slices that the contours name."""
    source, mask, out = written[variant]
    dataset = pydicom.dcmread(out / f"{source.name}.rt.dcm")
    names = {int(one.ROINumber): str(one.ROIName) for one in dataset.StructureSetROISequence}
    images = {
        str(image.ReferencedSOPInstanceUID)
        for image in dataset.ReferencedFrameOfReferenceSequence[0]
        .RTReferencedStudySequence[0]
        .RTReferencedSeriesSequence[0]
        .ContourImageSequence
    }
    expected = expected_segments(mask)
    assert list(names.values()) == list(expected)
    for roi in dataset.ROIContourSequence:
        found = np.zeros(mask.shape, bool)
        for contour in roi.ContourSequence:
            assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID in images
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            index = mask.grid.index_of(points * [-1, -1, 1])
            at = round(float(index[0, 0]))
            assert np.abs(index[:, 0] - at).max() < 0.01
            found[at] ^= skimage.draw.polygon2mask(mask.shape[1:], index[:, 1:])
        truth = expected[names[int(roi.ReferencedROINumber)]].copy()
        if variant == "gap":
            truth[[10, 11]] = False
        np.testing.assert_array_equal(found, truth)


def test_outlines_of_any_mask_enclose_its_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = rng.random(rng.integers(1, 14, 2)) < rng.random()
        filled = np.zeros(mask.shape, bool)
        for outline in trace_outlines(mask):
            filled ^= fill_polygon(outline[:, 0], outline[:, 1], mask.shape)
        np.testing.assert_array_equal(filled, mask)


def test_the_report_has_the_quantities(
    written: dict[str, tuple[DicomScan, Volume, Path]], tmp_path: Path
) -> None:
    """Read back by dcmqi."""
    source, mask, out = written["oblique"]
    target = tmp_path / "report.json"
    subprocess.run(
        [find_tool("tid1500reader"), "--inputDICOM", str(out / f"{source.name}.sr.dcm"),
         "--outputMetadata", str(target)],
        check=True, capture_output=True,
    )  # fmt: skip
    groups = {
        one["TrackingIdentifier"]: one for one in json.loads(target.read_text())["Measurements"]
    }
    quantities = quantify_case(mask, LITS_SCHEME, read_dicom_scan(source).volume)
    seg = pydicom.dcmread(out / f"{source.name}.seg.dcm")
    uids = {one.TrackingID: one.TrackingUID for one in seg.SegmentSequence}
    assert set(groups) == set(uids)
    for lesion in quantities.lesions:
        group = groups[f"tumour {lesion.number}"]
        items = {one["quantity"]["CodeValue"]: one for one in group["measurementItems"]}
        assert group["TrackingUniqueIdentifier"] == uids[f"tumour {lesion.number}"]
        assert float(items["118565006"]["value"]) == pytest.approx(lesion.volume_ml, rel=1e-4)
        assert float(items["103339001"]["value"]) == pytest.approx(lesion.long_axis_mm, rel=1e-4)
        assert float(items["103340004"]["value"]) == pytest.approx(lesion.short_axis_mm, rel=1e-4)
        assert lesion.intensity is not None
        mean = float(items["112031"]["value"])
        assert mean == pytest.approx(lesion.intensity.mean, abs=0.01)
    organ = quantities.structures[0]
    items = {one["quantity"]["CodeValue"]: one for one in groups["liver"]["measurementItems"]}
    assert float(items["118565006"]["value"]) == pytest.approx(organ.volume_ml, rel=1e-4)
    assert organ.burden is not None
    assert float(items["BURDEN"]["value"]) == pytest.approx(100 * organ.burden, rel=1e-4)


def test_a_label_map_and_probabilities_are_written_on_request(tmp_path: Path) -> None:
    source = make_source(tmp_path, "oblique")
    mask = make_mask(read_dicom_scan(source).volume)
    write_dicom_results(source, mask, LITS_SCHEME, tmp_path, DicomResults("labelmap"))
    seg = hd.seg.segread(tmp_path / f"{source.name}.seg.dcm")
    assert seg.SegmentationType == "LABELMAP"
    stored = np.sort(np.unique(seg.pixel_array, return_counts=True)[1])
    parts = expected_segments(mask)
    organ = parts["liver"] & (mask.voxels == 1)
    assert stored[:3].tolist() == sorted(int(parts[f"tumour {k}"].sum()) for k in (1, 2, 3))
    assert int(organ.sum()) in stored.tolist()
    values = {name: (mask.voxels > 0).astype(np.float32) * 0.4 for name in ("liver", "tumour")}
    options = DicomResults("fractional")
    write_dicom_results(source, mask, LITS_SCHEME, tmp_path, options, values)
    seg = hd.seg.segread(tmp_path / f"{source.name}.seg.dcm")
    assert seg.SegmentationType == "FRACTIONAL"
    assert set(np.unique(seg.pixel_array).tolist()) <= {0, 102}


def test_the_same_mask_gives_the_same_objects_and_an_empty_one_none(tmp_path: Path) -> None:
    source = make_source(tmp_path, "oblique")
    mask = make_mask(read_dicom_scan(source).volume)
    uids = []
    for _ in range(2):
        files = write_dicom_results(source, mask, LITS_SCHEME, tmp_path, DicomResults())
        uids.append([pydicom.dcmread(file).SOPInstanceUID for file in files])
    assert uids[0] == uids[1]
    empty = Volume(np.zeros_like(mask.voxels), mask.grid)
    assert write_dicom_results(source, empty, LITS_SCHEME, tmp_path, DicomResults()) == []
    assert not list(tmp_path.glob("*.dcm"))


def test_structures_without_codes_and_sources_without_attributes_are_written(
    tmp_path: Path,
) -> None:
    def anonymise(datasets: list[Any]) -> None:
        for dataset in datasets:
            for keyword in ("PatientName", "PatientID", "StudyDate", "FrameOfReferenceUID"):
                delattr(dataset, keyword)

    folder = write_scan(tmp_path / "s", make_scan(), anonymise)
    source = DicomScan((folder,), "scan_s")
    scheme = LabelScheme(
        ((0, "background"), (1, "spleen"), (2, "cyst")),
        (Structure("spleen", (1, 2)), Structure("cyst", (2,), "lesion", "spleen")),
    )
    mask = make_mask(read_dicom_scan(source).volume)
    files = write_dicom_results(source, mask, scheme, tmp_path, DicomResults())
    seg = pydicom.dcmread(files[0])
    assert [one.SegmentLabel for one in seg.SegmentSequence] == [
        "spleen", "cyst 1", "cyst 2", "cyst 3",
    ]  # fmt: skip
    assert seg.FrameOfReferenceUID
    named = replace(scheme.structures[0], snomed="78961009")
    scheme = LabelScheme(scheme.values, (named, scheme.structures[1]))
    files = write_dicom_results(source, mask, scheme, tmp_path, DicomResults())
    code = pydicom.dcmread(files[0]).SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
    assert (code.CodeValue, code.CodeMeaning) == ("78961009", "Spleen")
