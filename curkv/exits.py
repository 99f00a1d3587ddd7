"""Statuses with which `curkv` ends; docs/operations.md tells what to do about each."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Why a process ended."""

    DONE = 0
    """Asked to stop, by a signal in whatever phase, or finished."""

    FAILED = 1
    """Something unforeseen; the log has a traceback."""

    BAD_OPTION = 2
    """An option, variable or file of settings is wrong: starting again will not help."""

    BAD_MODEL = 3
    """The model is not there, damaged or not supported: starting again will not help."""

    NO_RESOURCE = 4
    """The machine lacks something, which may pass: a port, memory, space, rights, the network."""

    ENGINE_BROKEN = 5
    """The engine failed again and again, or its device is lost: a new process may do better."""


class StartupError(Exception):
    """A process cannot start; the message says in a line why and what to do.

    Attributes:
        exit: the status to end with.
    """

    def __init__(self, message: str, exit: Exit):
        super().__init__(message)
        self.exit = exit
