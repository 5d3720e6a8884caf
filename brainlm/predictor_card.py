"""README.md of a predictor: what it predicts, from whom it learned, what it must be fed. No ids, no paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainlm.predictor import Predictor
    from brainlm.targets import Target

USE = """\
```python
from brainlm import Predictor

predictor = Predictor.from_pretrained("PATH_OR_HUB_ID")
predictor.predict(bold, tr_s=predictor.contract.tr_s).values  # bold: (timepoints, parcels), not scaled
```
"""

LIMITS = """\
* Research software. It is no medical device and says nothing about the health of a person.
* It learned what goes with its targets in one cohort, motion, site and scanner included. Compare with a model that
  knows these alone before anything is said of brains.
* Feed it what its input contract says (`input_contract.json`): the wrong scale, parcel order or TR gives
  numbers that look sound and mean nothing.
* A score on people it was trained on says nothing about others: `train_subjects.json` holds keyed hashes.
"""


def predictor_card(predictor: Predictor, manifest: dict[str, Any]) -> str:
    """Return the text of README.md. Of the manifest only numbers and truth values are printed."""
    contract, config = predictor.contract, predictor.head.config
    rows = "".join(f"| {t.column} | {t.kind} | {_transform(t)} | {t.num_subjects:,} |\n" for t in predictor.targets)
    facts = [
        f"Encoder: {sum(p.numel() for p in predictor.encoder.parameters()):,} parameters, "
        f"{'trained with the head' if manifest.get('encoder_trained') else 'frozen'}"
        f"{', its weights random (a control)' if manifest.get('untrained') else ''}.",
        f"Head: three layers on the {'CLS token' if config.pooling == 'cls' else f'{config.pooling} of the tokens'}, "
        f"dropout {config.dropout:g}.",
        f"Fed {contract.atlas.num_parcels} parcels at a TR of {contract.tr_s:g} s, windows of {contract.window_len}.",
    ]
    score = manifest.get("best_val_r2")
    if isinstance(score, float):
        facts.append(f"Share of the loss of a constant answer that it explains, validation subjects: {score:.3f}.")
    seen = manifest.get("pretraining_subjects")
    if seen != 0:
        count = f"{seen:,}" if isinstance(seen, int) else "an unknown number"
        facts.append(
            f"**The encoder had been pretrained on {count} of these subjects: their scores are too high for new ones.**"
        )
    if manifest.get("permuted"):
        facts.append("**Targets were permuted among the training subjects: this is a control, it predicts nothing.**")
    listed = "".join(f"* {fact}\n" for fact in facts)
    return (
        "---\nlibrary_name: brainlm\n---\n\n# BrainLM, fine-tuned\n\n"
        f"| predicts | kind | learned as | training subjects |\n|---|---|---|---|\n{rows}\n{listed}\n"
        f"## How to use it\n\n{USE}\n## Limits\n\n{LIMITS}"
    )


def _transform(target: Target) -> str:
    if target.kind == "classification":
        return f"{len(target.classes)} classes"
    return {"zscore": "z-score", "minmax": "min-max", "log1p_minmax": "log(1 + x), min-max", "none": "as it is"}[
        target.transform
    ]
