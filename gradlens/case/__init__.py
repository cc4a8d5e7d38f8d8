"""From a recording to a case: who can be accused, how sure that is, since when, where, and what cannot be told.

`sums_of` sums a recording up once. `Scoring` reads it, given which clients are thought clean; `peel` takes suspects out
one by one and judges everybody anew by those that are left. `Null` says how far attack-free recordings come by the same
procedure, and `investigate` concludes.
"""

from gradlens.case.accomplices import Group
from gradlens.case.investigation import Case, investigate
from gradlens.case.null import Null

__all__ = ["Case", "Group", "Null", "investigate"]
