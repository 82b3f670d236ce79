"""The parts of `python -m launch.tune`: configuration, search, journal, folds, Ray, and the page at the end."""
