"""From a recording to a conclusion about its clients: what they add up to, who stands out once suspects judge nobody.

`sums_of` sums a recording up once; `Benign` learns from attack-free recordings what benign clients show; `peel` takes
suspects out one by one and judges everybody anew by those that are left. The verdict itself, `investigate`, is yet to
come: these are its parts.
"""

from gradlens.case.benign import Benign
from gradlens.case.peeling import Peeling, peel
from gradlens.case.readings import readings_of
from gradlens.case.sums import Sums, sums_of

__all__ = ["Benign", "Peeling", "Sums", "peel", "readings_of", "sums_of"]
