"""Evaluation protocols, which compute scores from embeddings."""
