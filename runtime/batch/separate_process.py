"""A call in a process of its own: threads and connections that it leaves behind are in no worker that is forked later.

Azure's library keeps its connections for the whole process. Workers that were forked from a process which had listed
a container answered each other's requests.
"""

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from topt_deploy.errors import IOFailure

Value = TypeVar("Value")


def apart(call: Callable[[], Value]) -> Value:
    """Run ``call`` in a separate process and return its result, which must be picklable, or raise its error.

    Raises:
        IOFailure: If its process ends without either.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(call, theirs), daemon=True)
    process.start()
    theirs.close()
    done, value = False, None
    with suppress(EOFError):
        done, value = ours.recv()
    process.join()
    if done:
        return value  # type: ignore[return-value]
    raise value or IOFailure("a process that looked for inputs died", fix="give it more memory, or try again")


def _serve(call: Callable[[], Any], connection: Connection) -> None:
    try:
        answer = (True, call())
    except Exception as error:
        answer = (False, error)
    connection.send(answer)
