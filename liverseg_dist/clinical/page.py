"""`quantities.html`: one self-contained page with every case's volumes, lesions and drawn
diameters.

Rendered by jinja2 with autoescape; pictures are data URIs that were checked on reading. It opens
offline, on a phone and in dark mode.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from liverseg_dist.pages import load_theme

MAX_PICTURE_BYTES = 24 << 20
MAX_CASES = 200
"""Cases with a section of their own; the tables hold all."""
Case = Mapping[str, Any]


def render_quantities(
    title: str,
    cases: Sequence[Case],
    failures: Mapping[str, str],
    pictures: Mapping[str, Sequence[Mapping[str, Any]]],
    details: Mapping[str, Any],
) -> str:
    """The page's text.

    Args:
        title: Its heading.
        cases: As `CaseQuantities.to_json` gives them, each with its name as `case` and `notes`.
        failures: Case name -> why it could not be measured.
        pictures: Case name -> pictures with `structure` and `number` of their lesions.
        details: What to state about the measurement.
    """
    shown, room = [], MAX_PICTURE_BYTES
    for case in cases[:MAX_CASES]:
        drawn = []
        for picture in pictures.get(case["case"], ()):
            # The stored length is close to the length in the page, because pictures are data URIs.
            room -= len(json.dumps(picture))
            if room > 0:
                drawn.append({"picture": picture, "lesion": _lesion_of(case, picture)})
        shown.append({"case": case, "drawn": drawn})
    return render_page(
        "quantities.html.j2",
        title=title,
        cases=cases,
        shown=shown,
        failures=failures,
        details=details,
        has_range=any(_has_range(case) for case in cases),
        num_lesions=sum(len(case["lesions"]) for case in cases),
        num_cut=sum(any(lesion["cut_by"] for lesion in case["lesions"]) for case in cases),
        structures=[structure["structure"] for structure in cases[0]["structures"]]
        if cases
        else [],
    )


def render_page(template: str, **values: Any) -> str:
    """A template of this package with its style sheet and filters."""
    loader = PackageLoader("liverseg_dist.clinical")
    jinja = Environment(
        loader=loader,
        autoescape=True,
        # A misspelled name in a template is an error, not an empty text.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {
        "num": format_number,
        "percent": format_percent,
        "signed": format_signed_percent,
    }
    # Both are files of this package.
    css = Markup(load_theme() + loader.get_source(jinja, "clinical.css")[0])  # nosec B704
    return jinja.get_template(template).render(css=css, **values)


def format_number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def format_percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %".replace("-", "−")


def format_signed_percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:+.{digits}f} %".replace("-", "−")


def _has_range(case: Case) -> bool:
    """Whether probabilities gave a range of volumes."""
    return any(structure["volume_range"] for structure in case["structures"])


def _lesion_of(case: Case, picture: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for lesion in case["lesions"]:
        if (lesion["structure"], lesion["number"]) == (picture["structure"], picture["number"]):
            return lesion
    return None
