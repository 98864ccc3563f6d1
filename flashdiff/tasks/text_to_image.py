"""Images of a prompt, from noise."""

from flashdiff.tasks.base import Task

TASK = Task()
