"""Importing updates that other tools recorded as a run: folders of state_dicts, Arrow and Parquet tables.

Nothing is unpickled: torch reads `.pt` with `weights_only=True`, numpy reads `.npz` with `allow_pickle=False`. The file
of one client never stops the import: it is recorded, or refused with a reason.
"""

from gradlens.ingestion.folders import PATTERNS
from gradlens.ingestion.recording import Ingested, ingest
from gradlens.ingestion.tables import with_csv_truth

__all__ = ["PATTERNS", "Ingested", "ingest", "with_csv_truth"]
