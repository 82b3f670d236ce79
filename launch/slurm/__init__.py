"""SLURM jobs: job graph, batch files, submission, supervision, status, failure reports."""
