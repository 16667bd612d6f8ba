"""Starting the trainer on a Slurm cluster."""
