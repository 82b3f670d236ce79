"""Submits liverseg_dist to clusters. It imports the package `liverseg_dist`, never the reverse.

In a checkout the package is the folder `launch`. A wheel installs the same files as
`liverseg_launch`, because a top-level package `launch` would collide with others of that name.
Imports in this package are therefore relative, and every command line that the code writes (batch
files, helper processes) has the name from `PACKAGE`.
"""

PACKAGE = __name__
"""The name of this package, which `python -m` finds on a node that has the same code."""
PROGRAM = "python -m launch" if PACKAGE == "launch" else "liverseg-launch"
"""The command that a user types."""


def name_programs(text: str) -> str:
    """A help text, written for a checkout, with the command names of this installation."""
    if PACKAGE == "launch":
        return text
    text = text.replace("python -m launch.", f"python -m {PACKAGE}.")
    return text.replace("python -m launch", PROGRAM)
