"""What runs in this process leave behind is put back: signal handlers, threads, environment."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)
