"""The commands of `liverseg`: wiring only. Each module has `add_arguments(parser)` and `run(args)`; `main.py` lists them."""
