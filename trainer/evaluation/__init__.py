"""Protocols that score embeddings."""
