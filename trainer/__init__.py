"""The training run: configuration, backbones, engine, step, loop, checkpoints, evaluation."""
