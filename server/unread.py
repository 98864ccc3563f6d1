"""Ends a gRPC call whose reply its client does not read, so that what was to be sent leaves the memory."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

_UNWOUND_S = 0.1
_TASK = "rpc_task"  # gRPC's name for the task that waits for the end of a call


def end_of_call() -> Callable[[], None]:
    """Ends the call that the current task answers.

    gRPC's Python has no way to cancel a call from the server once its last message is on its way. It does so when nothing
    refers to the call any more: when the task that answers it and the one that waits for its end are both gone.
    """
    answering = asyncio.current_task()

    def end() -> None:
        if answering is None or (waiting := _waiting_for(answering)) is None:
            return
        waiting.cancel()
        answering.cancel()
        asyncio.get_running_loop().call_later(_UNWOUND_S, gc.collect)  # the groups of a stream's tasks hold on to each other

    return end


def when_answered(close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `close` when the reply of the current task's call is sent, or the call has ended otherwise.

    The context's own callbacks would keep the call, with all that it was to send, until the garbage is collected.
    """
    answering, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert answering
    answering.add_done_callback(lambda _: loop.create_task(close()))


def _waiting_for(answering: "asyncio.Task[Any]") -> "asyncio.Task[Any] | None":
    """gRPC's task that waits for the end of a call: the one whose coroutines refer to the task that answers it."""
    for task in asyncio.all_tasks():
        if task.get_name() == _TASK:
            coroutine: Any = task.get_coro()
            held = gc.get_referents(coroutine, *filter(None, [getattr(coroutine, "cr_await", None)]))
            if any(one is answering for one in (*held, *gc.get_referents(*held))):
                return task
    return None
