"""Checkpoints: complete on disk or not there at all, never a pickle. Read `checkpointer` first."""
