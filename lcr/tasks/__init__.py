"""Tasks by name: `make_task("passkey", tokenizer="words")`."""

from lcr.tasks.interface import DocumentTask, Example, Task, make_task
from lcr.tasks.passkey import PasskeyTask

TASKS = {"passkey": PasskeyTask}

__all__ = ["TASKS", "DocumentTask", "Example", "Task", "make_task"]
