"""The parts of `python -m launch.tune`: settings, search, journal, folds, Ray, results."""
