"""Both stages over a user's task, by budget."""

from tying.compress.load import load_task
from tying.compress.run import CompressResult, compress
from tying.compress.task import Task

__all__ = ["CompressResult", "Task", "compress", "load_task"]
