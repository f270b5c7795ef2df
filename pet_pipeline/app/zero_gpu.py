"""The GPU of a Space on ZeroGPU, which is lent for the time of a call and does not exist between calls."""

from collections.abc import Callable
from typing import Any


def lend_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function or generator that runs with a GPU of ZeroGPU; elsewhere it is `function` itself.

    The package `spaces`, which every Space has, runs the call in a process of its own. Arguments and results
    must therefore be picklable, but `function` need not be: the process is a fork of this one.
    """
    try:
        from spaces import GPU
    except ImportError:
        return function
    return GPU(function)
