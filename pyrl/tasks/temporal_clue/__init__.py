"""Temporal Clue: who killed the host, with what, where, when and why, from clues about a night."""
