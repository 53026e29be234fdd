"""Training: config, processes, the trainer and its checkpoints."""
