"""The commands: wiring only. `main.py` holds the table; each module has `add_arguments(parser)` and `run(args)`."""
