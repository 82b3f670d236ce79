"""Build a DICOM structured report (TID 1500) of the quantities of a mask.

One group of measurements for each segment of the SEG: volume; for lesions long and short axis and,
for CT, the mean attenuation; for organs the share that lesions take. The groups have the tracking
ids and UIDs of the segments and refer to them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from liverseg_dist.clinical.dicom_codes import (
    BURDEN,
    LONG_AXIS,
    PRIVATE_SCHEME,
    SHORT_AXIS,
    VOLUME,
    category_of,
    sct,
    site_of,
    type_of,
    unit,
)
from liverseg_dist.clinical.dicom_segmentation import (
    MANUFACTURER,
    SERIES_NUMBER,
    Producer,
    Segment,
    format_decimal,
)
from liverseg_dist.clinical.quantify import CaseQuantities, IntensityStatistics
from liverseg_dist.labels import LabelScheme
from liverseg_dist.optional_packages import load_module, quiet_pydicom
from liverseg_dist.texts.uids import derive_uid


def build_report(
    segmentation: Any,
    segments: Sequence[Segment],
    quantities: CaseQuantities,
    scheme: LabelScheme,
    datasets: Sequence[Any],
    producer: Producer,
    key: str,
) -> Any:
    """The report as a pydicom data set.

    Args:
        segmentation: the SEG that the report refers to.
        segments: its segments.
        quantities: of the same mask.
        scheme: labels of the mask.
        datasets: source images, as evidence.
        producer: what made the mask.
        key: text that the UIDs follow from.
    """
    highdicom = load_module("highdicom")
    codes = load_module("pydicom.sr.codedict").codes
    is_ct = datasets[0].Modality == "CT"
    with quiet_pydicom():
        groups = []
        for segment in segments:
            measurements = list(_measure(segment, quantities, is_ct))
            if measurements:
                groups.append(_build_group(segment, segmentation, measurements, scheme, producer))
        device = highdicom.sr.DeviceObserverIdentifyingAttributes(
            uid=derive_uid("device", MANUFACTURER),
            name=MANUFACTURER,
            manufacturer_name=MANUFACTURER,
            model_name=MANUFACTURER,
        )
        observer = highdicom.sr.ObserverContext(codes.DCM.Device, device)
        region = codes.LN.CTUnspecifiedBodyRegion if is_ct else codes.LN.MRUnspecifiedBodyRegion
        content = highdicom.sr.MeasurementReport(
            observation_context=highdicom.sr.ObservationContext(observer_device_context=observer),
            procedure_reported=region,
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )
        return highdicom.sr.Comprehensive3DSR(
            evidence=[*datasets, segmentation],
            content=content[0],
            series_instance_uid=derive_uid("sr series", key),
            series_number=SERIES_NUMBER + 1,
            sop_instance_uid=derive_uid("sr", key),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=producer.full_version,
            device_serial_number="1",
            is_complete=True,
            series_description="Automatic measurements",
        )


def _build_group(
    segment: Segment,
    segmentation: Any,
    measurements: Sequence[Any],
    scheme: LabelScheme,
    producer: Producer,
) -> Any:
    sr = load_module("highdicom").sr
    site = site_of(segment.structure, scheme)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(segment.tracking_uid, segment.label),
        referenced_segment=_refer_to(segmentation, segment),
        finding_category=category_of(segment.structure),
        finding_type=type_of(segment.structure),
        finding_sites=None if site is None else [sr.FindingSite(site)],
        algorithm_id=sr.AlgorithmIdentification(MANUFACTURER, producer.full_version),
        measurements=measurements,
    )


def _refer_to(segmentation: Any, segment: Segment) -> Any:
    sr = load_module("highdicom").sr
    if segmentation.SegmentationType != "LABELMAP":
        return sr.ReferencedSegment.from_segmentation(segmentation, segment.number)
    # Frames of a label map belong to all segments, so the report refers to the source series.
    (series,) = segmentation.ReferencedSeriesSequence
    return sr.ReferencedSegment(
        segmentation.SOPClassUID,
        segmentation.SOPInstanceUID,
        segment.number,
        source_series=sr.SourceSeriesForSegmentation(series.SeriesInstanceUID),
    )


def _measure(segment: Segment, quantities: CaseQuantities, is_ct: bool) -> Iterator[Any]:
    measurement = load_module("highdicom").sr.Measurement
    name = segment.structure.name
    if segment.structure.kind == "lesion":
        for lesion in quantities.lesions:
            if (lesion.structure, lesion.number) != (name, segment.lesion):
                continue
            yield measurement(sct(VOLUME), format_decimal(lesion.volume_ml), unit("ml"))
            yield measurement(sct(LONG_AXIS), format_decimal(lesion.long_axis_mm), unit("mm"))
            yield measurement(sct(SHORT_AXIS), format_decimal(lesion.short_axis_mm), unit("mm"))
            if is_ct:
                yield from _measure_attenuation(lesion.intensity)
        return
    for structure in quantities.structures:
        if structure.structure != name:
            continue
        yield measurement(sct(VOLUME), format_decimal(structure.volume_ml), unit("ml"))
        if structure.burden is not None:
            concept = load_module("highdicom").sr.CodedConcept
            burden = concept(BURDEN[0], PRIVATE_SCHEME, BURDEN[1])
            yield measurement(burden, format_decimal(100 * structure.burden), unit("%"))
        if is_ct:
            yield from _measure_attenuation(structure.intensity)


def _measure_attenuation(intensity: IntensityStatistics | None) -> Iterator[Any]:
    if intensity is None:
        return
    codes = load_module("pydicom.sr.codedict").codes
    yield load_module("highdicom").sr.Measurement(
        codes.DCM.AttenuationCoefficient,
        format_decimal(intensity.mean),
        codes.UCUM.HounsfieldUnit,
        derivation=codes.SCT.Mean,
    )
