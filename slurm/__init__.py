"""Submission of training runs to a Slurm cluster."""
