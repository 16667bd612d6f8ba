"""Training of a face-recognition network: configuration, backbones, engine, loop, checkpoints, evaluation."""
