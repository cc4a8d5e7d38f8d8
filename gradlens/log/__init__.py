"""The record: what the server saw, how it is written to a disk and read back."""

from gradlens.log.accumulated import Accumulated
from gradlens.log.levels import Evidence
from gradlens.log.log import UpdateLog
from gradlens.log.model import Layer, ModelSpec
from gradlens.log.round import Round
from gradlens.log.verification import Verification, verify
from gradlens.log.writer import LogWriter

__all__ = [
    "Accumulated",
    "Evidence",
    "Layer",
    "LogWriter",
    "ModelSpec",
    "Round",
    "UpdateLog",
    "Verification",
    "verify",
]
