"""Tasks: where prompts and their answers come from."""

from rlvr.tasks.problem_file import ProblemFile
from rlvr.tasks.protocol import Task

__all__ = ["ProblemFile", "Task"]
