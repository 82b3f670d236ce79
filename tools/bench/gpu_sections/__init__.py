"""The sections of `tools/bench/gpu`: each module measures one thing and appends lines of JSON."""
