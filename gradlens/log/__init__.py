"""The record: what the server saw, how it is written to a disk and read back."""

from gradlens.log.evidence import Evidence
from gradlens.log.history import Accumulated, UpdateLog
from gradlens.log.manifest import Verification, verify
from gradlens.log.record import CannotSay, InputError, Layer, ModelSpec, Round
from gradlens.log.writer import LogWriter

__all__ = [
    "Accumulated",
    "CannotSay",
    "Evidence",
    "InputError",
    "Layer",
    "LogWriter",
    "ModelSpec",
    "Round",
    "UpdateLog",
    "Verification",
    "verify",
]
