"""Updates that were recorded elsewhere -> a run: folders of state_dicts, Arrow and Parquet tables.

Nothing is unpickled: `.pt` is read by torch with `weights_only=True`, `.npz` with `allow_pickle=False`. What one
client's file holds never stops the others: it is recorded, or refused with a reason.
"""

from gradlens.ingestion.folders import PATTERNS
from gradlens.ingestion.recording import Ingested, ingest
from gradlens.ingestion.tables import with_csv_truth

__all__ = ["PATTERNS", "Ingested", "ingest", "with_csv_truth"]
