"""The record: what the server saw, how it is written to a disk and read back."""

from gradlens.log.evidence import Evidence
from gradlens.log.history import Accumulated, UpdateLog
from gradlens.log.manifest import Verification, verify
from gradlens.log.model import CannotSay, InputError, Layer, ModelSpec, named_in, whole_number
from gradlens.log.record import Round
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
    "named_in",
    "verify",
    "whole_number",
]
