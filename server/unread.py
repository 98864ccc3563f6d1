"""Ends a gRPC call whose client does not read its reply, so that the unsent reply leaves the memory.

grpc.aio offers no way to do so: its context has no `cancel`, `abort` is refused once the status is on its way, and cancelling the
task that answers leaves the call open. Keepalive pings are answered by a client that does not read, and the options that end idle
or old connections take the connection's other calls along, or wait for them. gRPC cancels a call when nothing refers to it any
more, so this module finds the task that waits for the end of the call and cancels it. Where another version of grpcio has no such
task, nothing is cancelled, and the memory comes back when the connection is idle (`grpc.max_connection_idle_ms`) or closed.
"""

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from typing import Any
from weakref import WeakKeyDictionary

_TOGETHER_S = 1.0  # calls that are unread within it end together: finding their tasks and collecting takes milliseconds
_UNWOUND_S = 0.1
_TASK = "rpc_task"  # gRPC's name for the task that waits for the end of a call

_Task = asyncio.Task[Any]
_unread: "WeakKeyDictionary[asyncio.AbstractEventLoop, set[_Task]]" = WeakKeyDictionary()


def end_of_call() -> Callable[[], None]:
    """Ends the call that the current task answers, within a second or two."""
    answering, loop = asyncio.current_task(), asyncio.get_running_loop()

    def end() -> None:
        if answering is None:
            return
        if loop not in _unread:
            _unread[loop] = set()
            loop.call_later(_TOGETHER_S, _end_unread, loop)
        _unread[loop].add(answering)

    return end


def when_answered(close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `close` when the reply of the current task's call is sent, or the call has ended otherwise.

    The context's own callbacks would keep the call, with all that it was to send, until the garbage is collected.
    """
    answering, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert answering
    answering.add_done_callback(lambda _: loop.create_task(close()))


def _end_unread(loop: asyncio.AbstractEventLoop) -> None:
    unread = _unread.pop(loop)
    for waiting in asyncio.all_tasks(loop):
        if waiting.get_name() == _TASK:
            for answering in unread.intersection(_tasks_held_by(waiting)):
                waiting.cancel()
                answering.cancel()
    loop.call_later(_UNWOUND_S, gc.collect)  # the groups of a stream's tasks hold on to each other


def _tasks_held_by(task: _Task) -> Iterator[_Task]:
    """The tasks that the task's coroutines refer to."""
    coroutine: Any = task.get_coro()
    held = gc.get_referents(coroutine, *filter(None, [getattr(coroutine, "cr_await", None)]))
    yield from (one for one in (*held, *gc.get_referents(*held)) if isinstance(one, asyncio.Task))
