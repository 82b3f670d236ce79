"""Base style sheet of all pages: colours as CSS variables, text, panels and tables."""

from importlib.resources import files

from liverseg_dist.pages.palette import (
    LESION_LINE_RGB,
    LESION_RGB,
    ORGAN_LINE_RGB,
    ORGAN_RGB,
    OVERLAY,
    SURFACE_RGB,
    hex_colour,
)

_LIGHT = {
    "ink": "#16202a",
    "soft": "#56626e",
    "faint": "#6b7783",
    "rule": "#dfe5ea",
    "axis": "#98a4ae",
    "paper": "#ffffff",
    "ground": "#f6f8f9",
    "link": "#0b63a5",
    "warn": "#8a5a00",
    "bad": "#b3261e",
    "good": "#0a6b52",
}
_DARK = {
    "ink": "#e6ebf0",
    "soft": "#a8b3bd",
    "faint": "#8d99a5",
    "rule": "#343c45",
    "axis": "#6c7884",
    "paper": "#1b2127",
    "ground": "#12171c",
    "link": "#7cc0f5",
    "warn": "#e0b050",
    "bad": "#ff8a80",
    "good": "#5fd0a9",
}


def load_theme() -> str:
    """CSS text: the variables of both colour schemes and the rules in `templates/theme.css`.

    The dark scheme applies where the reader's system has it (`prefers-color-scheme`); a printed
    page is light.
    """
    fixed = {
        "organ": hex_colour(ORGAN_RGB),
        "lesion": hex_colour(LESION_RGB),
        "organ-line": hex_colour(ORGAN_LINE_RGB),
        "lesion-line": hex_colour(LESION_LINE_RGB),
        "slice-ground": "#14181d",
        "detected": hex_colour(SURFACE_RGB["touched"]),
        "missed": hex_colour(SURFACE_RGB["missed"]),
        "false": hex_colour(SURFACE_RGB["false"]),
        "partly": "#b98300",
        "truth-line": hex_colour(OVERLAY["truth_line"]),
        "prediction-line": hex_colour(OVERLAY["prediction_line"]),
    }
    light = _format_variables(_LIGHT | fixed)
    dark = _format_variables(_DARK)
    rules = files("liverseg_dist.pages").joinpath("templates", "theme.css").read_text("utf-8")
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{rules}"
    )


def load_script(package: str, *names: str) -> str:
    """Concatenated text of scripts in the `templates` folder of a package."""
    folder = files(package).joinpath("templates")
    return "\n".join(folder.joinpath(name).read_text("utf-8") for name in names)


def _format_variables(values: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in values.items())
