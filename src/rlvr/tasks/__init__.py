"""Tasks: where prompts and their answers come from."""

from rlvr.tasks.letters import LettersTask
from rlvr.tasks.problem_file import ProblemFile
from rlvr.tasks.protocol import Task
from rlvr.tasks.rows import ProblemFormat, prompts_from, read_rows
from rlvr.tasks.word_problems import WordProblemsTask

__all__ = [
    "LettersTask",
    "ProblemFile",
    "ProblemFormat",
    "Task",
    "WordProblemsTask",
    "prompts_from",
    "read_rows",
]
