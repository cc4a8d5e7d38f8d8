"""Custody of the evidence: signed and time-stamped heads, copies for a second examiner, and thinner runs to keep."""

from gradlens.custody.copies import share, thinned
from gradlens.custody.seals import Seals, add_stamp, check_seals, new_key, sign, stamp_request

__all__ = ["Seals", "add_stamp", "check_seals", "new_key", "share", "sign", "stamp_request", "thinned"]
