"""Write the embeddings of every recording of a cohort to one parquet table.

    python eval/extract.py --checkpoint C --data URL --out embeddings.parquet [section.key=value ...] [--dry-run]
    python eval/extract.py --checkpoint C --data series/*.csv --out embeddings.parquet tr_s=2.0
    python eval/extract.py --config eval/configs/demo_embeddings.yaml

Data are a prepared data set, or series files in the checkpoint's parcels. Run it again after a stop and only what is
missing is computed. Recordings without an embedding are listed, with reasons, in ``<out>.rejected.parquet``. Exit code
0 if every recording was embedded or listed, and at least one was embedded.
"""

from __future__ import annotations

import sys

from eval.embedding_rows import embed_part
from eval.extract_settings import ExtractSettings
from eval.fill_table import run_entry


def main(argv: list[str] | None = None) -> int:
    return run_entry(__doc__ or "", argv, ExtractSettings, embed_part, "embedded")


if __name__ == "__main__":
    sys.exit(main())
