"""What lies on the disk: files that are whole or not there, a model's directory, checkpoints larger than memory."""
