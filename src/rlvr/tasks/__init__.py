"""Tasks: where prompts and their answers come from."""

from rlvr.tasks.protocol import Task

__all__ = ["Task"]
