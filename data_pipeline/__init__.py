"""Training data: from files to decoded, augmented batches. Imports no other package of the project."""
