"""A function call in a process of its own, for measurements that must not see what an earlier one left behind."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def call_in_new_process(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What the function returns in a process that starts before the call and ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()
