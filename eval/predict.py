"""Predict phenotypes from recordings with a fine-tuned checkpoint, in original units; one row a recording.

    python eval/predict.py --checkpoint C --data URL --out predictions.parquet [section.key=value ...] [--dry-run]
    python eval/predict.py --checkpoint C --data series/*.csv --out predictions.parquet tr_s=2.0
    python eval/predict.py --checkpoint C --data sub-01_bold.nii.gz --out predictions.parquet prepare.atlas.image=ATLAS
    python eval/predict.py --config eval/configs/demo_predictions.yaml

Data are a prepared data set, series files in the checkpoint's parcels, or images, which are prepared first as the
checkpoint's contract says. Run it again after a stop and only what is missing is computed. Recordings without a
prediction are listed, with reasons, in ``<out>.rejected.parquet``. Exit code 0 if every recording was predicted from or
listed, and at least one was predicted from.
"""

from __future__ import annotations

import sys

from eval.fill_table import run_entry
from eval.predict_settings import PredictSettings
from eval.prediction_rows import predict_part
from eval.prepare_images import are_images, prepare_images
from eval.table_plan import checkpoint_of, open_for


def main(argv: list[str] | None = None) -> int:
    return run_entry(__doc__ or "", argv, PredictSettings, predict_part, "predicted from", make_readable)


def make_readable(settings: PredictSettings, is_dry_run: bool) -> tuple[PredictSettings, list[dict[str, str]]] | None:
    """Prepare images; leave data sets and series files as they are."""
    if not are_images(settings):
        return settings, []
    folder = checkpoint_of(settings)
    contract = open_for(settings, folder).contract
    if is_dry_run:
        print(f"images are prepared first, for {contract.atlas.name} at a TR of {contract.tr_s:g} s")
        return None
    return prepare_images(settings, folder)


if __name__ == "__main__":
    sys.exit(main())
