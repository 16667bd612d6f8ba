"""From files on disk to decoded, augmented batches. Imports nothing of the project outside itself."""
