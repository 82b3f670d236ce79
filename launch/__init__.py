"""Starting liverseg_dist on clusters. Imports the package; nothing imports this.

In a checkout the package is the folder `launch`. A wheel installs the same files as `liverseg_launch`, because a
top-level package `launch` would collide with others of that name. Imports in here are therefore relative, and every
command line that the code writes (job files, helper processes) takes the name from `PACKAGE`.
"""

PACKAGE = __name__
"""Name by which this code was imported, and by which `python -m` finds it on a node that has the same code."""
PROGRAM = "python -m launch" if PACKAGE == "launch" else "liverseg-launch"
"""What a user types."""


def name_programs(text: str) -> str:
    """A help text, written for a checkout, with the command lines of this installation."""
    if PACKAGE == "launch":
        return text
    return text.replace("python -m launch.", f"python -m {PACKAGE}.").replace(
        "python -m launch", PROGRAM
    )
