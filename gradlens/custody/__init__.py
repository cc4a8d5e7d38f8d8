"""Custody of the evidence: who signed it and when, copies for a second examiner, and thinner runs to keep."""

from gradlens.custody.copies import share, thinned
from gradlens.custody.seals import Seals, add_stamp, check_seals, new_key, sign, stamp_request
from gradlens.custody.signing import check_updates, keys_of_clients, sign_update

__all__ = [
    "Seals",
    "add_stamp",
    "check_seals",
    "check_updates",
    "keys_of_clients",
    "new_key",
    "share",
    "sign",
    "sign_update",
    "stamp_request",
    "thinned",
]
