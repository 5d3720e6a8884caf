"""The masks that every method is asked with: over patches of single parcels, functions of the window alone."""

from __future__ import annotations

from brainlm.masking import MaskKind, make_mask, mask_generator
from eval.cohort import BoolArray, Cohort, WindowRef


def random_mask(cohort: Cohort, scored_P: BoolArray, mask_ratio: float, seed: int, ref: WindowRef) -> BoolArray:
    """Return the mask (L,) of one window that hides random tokens; see `draw_mask`."""
    return draw_mask(cohort, scored_P, "random", mask_ratio, seed, ref)


def draw_mask(
    cohort: Cohort, scored_P: BoolArray, kind: MaskKind, mask_ratio: float, seed: int, ref: WindowRef
) -> BoolArray:
    """Return the mask (L,) of one window: a function of kind, seed, recording id, start and ratio alone.

    Where the compared models hold several parcels in a token, these are hidden together.
    """
    import torch

    from brainlm.tokens import parcel_groups, parcel_mask, present_rows

    words = () if kind == "random" else (kind,)
    generator = mask_generator(seed, ref.recording_id, ref.start, round(mask_ratio * 10_000), *words)
    present = torch.from_numpy(scored_P)
    groups = None
    if cohort.patch_parcels > 1:
        coords_mm = torch.from_numpy(cohort.dataset.contract.atlas.coords_mm.copy())
        groups = parcel_groups(coords_mm, cohort.patch_parcels)
    rows = present_rows(present[None], groups)[0] > 0
    drawn = make_mask(kind, len(rows), cohort.num_patches, mask_ratio, generator, rows)
    mask = parcel_mask(drawn, cohort.num_parcels, groups).clone()
    mask[~present] = True
    out: BoolArray = mask.flatten().numpy()
    return out
