"""Tasks by name: `make_task("passkey", tokenizer="words")`."""

from lcr.tasks.interface import DocumentTask, Example, Task, make_task
from lcr.tasks.passkey import PasskeyTask
from lcr.tasks.text import TextTask

TASKS = {"passkey": PasskeyTask, "text": TextTask}

__all__ = ["TASKS", "DocumentTask", "Example", "Task", "make_task"]
