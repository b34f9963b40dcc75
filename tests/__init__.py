"""Tests. Their processes compute with one thread: most models are tiny, and two tests run side by side."""

import os

from clo.runtime.machine.process import set_threads

set_threads(os.environ, 1)  # here, because torch reads it when it is first imported
