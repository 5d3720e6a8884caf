"""What a model loses when it is fed another TR than it was trained at: natively, or resampled to its own.

    python benchmarks/native_tr.py [--seeds 0 1 2] [--steps 500] [--train-tr 0.72 1 2] [--json PATH]

One continuous signal is simulated for all: seven coupled networks and their haemodynamic response
(`data_prep.simulated_dynamics`) sampled exactly every 0.04 s, read by 100 parcels that differ between subjects, plus
private white noise. A timepoint is the mean over one TR, as an acquisition that lasts a TR gives it, which is also the
filter against aliasing. So every TR shows the same seconds of the same subjects. Models are `tiny`, windows of 200,
one for each TR and seed, trained alike.

Scored are new subjects, hidden patches of random masks (50 % of the tokens): R2 = 1 - SSE / SST in the units that the
model is fed, SST about each recording's mean per parcel. Ways of feeding:

* `own`      the TR that the model was trained at;
* `seconds`  natively, positions in true seconds (`Windows.tr_s`), 200 timepoints;
* `same_s`   natively, positions in true seconds, and a window of about as many seconds as in training;
* `pretend`  natively, as if the TR were the model's own;
* `resampled`          to the model's TR (`data_prep.resample`), masks and targets on the resampled series;
* `resampled, native target`  what is hidden, and scored, is what `seconds` hides and is scored on. Hidden values are
  replaced by a line between visible ones before resampling, so that nothing leaks; every token that touches a hidden
  one is hidden, so more than half of them are (the table says how many, nearly all where the model's TR is the longer
  one); predictions are resampled back to the native TR.

The reference for another TR is the model that was trained at it (`own` of that model), not `own` of this one: longer
averages carry less noise, so the TRs differ in what can be predicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.input_contract import InputContract
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM
from brainlm.presets import preset
from brainlm.recording import Recording
from brainlm.scaling import centre, robust_statistics, scale
from brainlm.testing import synthetic_atlas
from brainlm.tokens import sample_hidden
from brainlm.windows import Windows, cut_windows
from data_prep.resample import resample
from data_prep.simulated_dynamics import NUM_NETWORKS, DynamicsConfig, reference_couplings, sample_dynamics
from train.param_groups import param_groups
from train.schedule import learning_rate_at
from train.settings import OptimizerSettings

FINE_S = 0.04  # 0.72, 1 and 2 s are 18, 25 and 50 of these
TRS_S = (0.72, 1.0, 2.0)
NUM_PARCELS, NUM_TRAIN, NUM_TEST = 100, 40, 10
DURATION_S, BURN_IN_S = 1200.0, 120.0
NOISE_SHARE = 0.3  # of the variance at 1 s, private white noise
WINDOW_LEN, PATCH_LEN = 200, 20
TRAIN_RATIOS, TEST_RATIO, BATCH, NUM_DECODED = (0.5, 0.75), 0.5, 4, 200
WAYS = ("own", "seconds", "same_s", "pretend", "resampled", "resampled, native target")
Series = NDArray[np.float32]


# -------------------------------------------------------------------- one signal, three TRs


def simulate(num_subjects: int, seed: int) -> dict[float, list[Series]]:
    """Return each subject's series (T, P) at every TR; all of one subject show the same seconds."""
    rng = np.random.default_rng(seed)
    config = DynamicsConfig()
    systems = []
    for _ in range(num_subjects):
        couplings = reference_couplings()
        couplings = couplings + config.coupling_sd * rng.standard_normal(couplings.shape) * (couplings != 0)
        systems.append(sample_dynamics(config, couplings, np.ones(NUM_NETWORKS), FINE_S))
    transition = np.stack([system.transition for system in systems])
    values, vectors = np.linalg.eigh(np.stack([system.process_cov for system in systems]))
    root = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    num_burnt, num_steps = (round(seconds / FINE_S) for seconds in (BURN_IN_S, DURATION_S))
    state = np.zeros((num_subjects, config.num_states, 1))
    response = np.empty((num_subjects, num_steps, NUM_NETWORKS), dtype=np.float32)
    for step in range(num_burnt + num_steps):
        state = transition @ state + root @ rng.standard_normal(state.shape)
        if step >= num_burnt:
            response[:, step - num_burnt] = state[:, -NUM_NETWORKS:, 0]
    response /= response.std(axis=(0, 1))

    atlas = synthetic_atlas(NUM_PARCELS, NUM_NETWORKS)
    first = np.eye(NUM_NETWORKS)[[int(name.removeprefix("network-")) for name in atlas.networks or ()]]
    shared = np.random.default_rng(0)  # the average subject's loadings, whatever the seed
    second = shared.permuted(first, axis=1)  # a parcel's second network, which may be its first
    loading = first + config.second_loading * shared.random((NUM_PARCELS, 1)) * second
    out: dict[float, list[Series]] = {tr_s: [] for tr_s in TRS_S}
    noise_sd = np.sqrt(NOISE_SHARE / (1 - NOISE_SHARE) / FINE_S)  # of one fine step: its mean over 1 s has this share
    for subject in range(num_subjects):
        weights = loading * rng.normal(1, config.loading_sd, loading.shape)
        fine = response[subject] @ weights.T.astype(np.float32)
        fine += np.float32(noise_sd) * rng.standard_normal(fine.shape, dtype=np.float32)
        total = np.concatenate([np.zeros((1, NUM_PARCELS)), fine.cumsum(axis=0, dtype=np.float64)])
        for tr_s in TRS_S:
            length = round(tr_s / FINE_S)
            out[tr_s].append((np.diff(total[::length], axis=0) / length).astype(np.float32))
    return out


def contract_of(train: list[Series], tr_s: float) -> InputContract:
    median, iqr = robust_statistics(np.concatenate([centre(one, np.ones(len(one), dtype=bool)) for one in train]))
    return InputContract(
        atlas=synthetic_atlas(NUM_PARCELS, NUM_NETWORKS), covered=np.ones(NUM_PARCELS, dtype=bool), median=median,
        iqr=iqr, tr_s=tr_s, window_len=WINDOW_LEN, patch_len=PATCH_LEN,
    )  # fmt: skip


def recordings_of(series: Iterable[Series], tr_s: float) -> list[Recording]:
    return [
        Recording(recording_id=f"sub-{number}", subject=f"sub-{number}", bold=bold, tr_s=tr_s)
        for number, bold in enumerate(series)
    ]


# -------------------------------------------------------------------- training


def train_model(train: list[Series], tr_s: float, steps: int, seed: int) -> BrainLM:
    """Train `tiny` on windows that begin anywhere."""
    contract = contract_of(train, tr_s)
    model = BrainLM(preset("tiny"), contract)
    model.init_weights(torch.Generator().manual_seed(seed))
    model.train()
    settings = OptimizerSettings(lr=4e-3, warmup_steps=50)
    optimizer = torch.optim.AdamW(
        param_groups(model, settings.weight_decay), lr=settings.peak_lr(BATCH), betas=settings.betas
    )
    scaled = [scale(centre(one, np.ones(len(one), dtype=bool)), contract).T for one in train]
    rng = np.random.default_rng([seed, 1])
    for step in range(steps):
        values, masks, decoded = [], [], []
        for sample in range(BATCH):
            series_PT = scaled[rng.integers(len(scaled))]
            start = int(rng.integers(series_PT.shape[1] - WINDOW_LEN + 1))
            values.append(torch.from_numpy(series_PT[:, start : start + WINDOW_LEN].copy()))
            masks.append(random_mask(float(rng.choice(TRAIN_RATIOS)), WINDOW_LEN, seed, step, sample))
            decoded.append(sample_hidden(masks[-1], NUM_DECODED, mask_generator(1, seed, step, sample)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, settings)
        loss = model(torch.stack(values), torch.stack(masks), ids_decoded=torch.stack(decoded)).mean
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def random_mask(ratio: float, window_len: int, *position: int) -> Tensor:
    return make_mask("random", NUM_PARCELS, window_len // PATCH_LEN, ratio, mask_generator(0, *position))


# -------------------------------------------------------------------- scoring


@dataclass
class Sums:
    """Squared errors, and squares about the recording's mean, of hidden values; how many tokens were hidden."""

    sse: float = 0.0
    sst: float = 0.0
    num_hidden: int = 0
    num_tokens: int = 0

    def add(self, predicted: Tensor, windows: Tensor, hidden: Tensor, mean: Tensor) -> None:
        self.sse += float((predicted - windows)[hidden].double().square().sum())
        self.sst += float((windows - mean)[hidden].double().square().sum())

    @property
    def r2(self) -> float:
        return 1 - self.sse / self.sst


def whole_windows(recording: Recording, contract: InputContract) -> Windows:
    """Cut windows side by side; what is left at the end is left out."""
    starts = range(0, recording.num_timepoints - contract.window_len + 1, contract.window_len)
    return cut_windows(recording, contract, starts=starts, native_tr=True)


def masks_of(windows: Windows, number: int) -> Tensor:
    """Return the masks (B, L) of a recording's windows: the same for every way of feeding the same windows."""
    return torch.stack([random_mask(TEST_RATIO, windows.values.shape[2], 7, number, start) for start in windows.starts])


def recording_mean(contract: InputContract) -> Tensor:
    """Return what a centred recording's mean is in contract units, (P, 1)."""
    return torch.from_numpy(-contract.median / contract.iqr)[:, None]


def score(model: BrainLM, recordings: list[Recording], window_len: int = WINDOW_LEN) -> float:
    """Return R2 of hidden patches, fed as the recordings are."""
    sums, contract = Sums(), model.contract.with_windows(window_len, PATCH_LEN)
    for number, recording in enumerate(recordings):
        windows = whole_windows(recording, contract)
        predicted = model.reconstruct(windows, masks_of(windows, number))
        sums.add(predicted, windows.values, ~predicted.isnan(), recording_mean(contract))
    return sums.r2


def score_native_target(model: BrainLM, recordings: list[Recording]) -> Sums:
    """Score the values that native feeding hides, from what it shows, resampled to the model's TR and back."""
    sums, contract, tr_s = Sums(), model.contract, model.contract.tr_s
    for number, recording in enumerate(recordings):
        native = whole_windows(recording, contract)
        hidden_BPW = masks_of(native, number).view(len(native), NUM_PARCELS, -1).repeat_interleave(PATCH_LEN, dim=2)
        hidden, bold = series_of(hidden_BPW).numpy(), series_of(native.values).numpy()
        filled = fill_hidden(bold, hidden)
        fed = resample(filled, np.ones(len(filled), dtype=bool), recording.tr_s, tr_s)[0]
        fed = fed[: len(fed) // WINDOW_LEN * WINDOW_LEN]
        values = windows_of(torch.from_numpy(fed))
        mask = touched_tokens(hidden, recording.tr_s, tr_s, len(fed))
        predicted = model.reconstruct(values, mask)
        sums.num_hidden += int(mask.sum())
        sums.num_tokens += mask.numel()
        whole = series_of(torch.where(predicted.isnan(), values, predicted)).numpy()
        back = torch.from_numpy(resample(whole, np.ones(len(whole), dtype=bool), tr_s, recording.tr_s)[0])
        end = min(len(back), len(bold))
        hidden_TP, truth = torch.from_numpy(hidden[:end]), torch.from_numpy(bold[:end])
        sums.add(back[:end], truth, hidden_TP, recording_mean(contract).T)
    return sums


def touched_tokens(hidden: NDArray[np.bool_], native_s: float, tr_s: float, num_timepoints: int) -> Tensor:
    """Return the mask (B, L) of tokens of a resampled series in which a timepoint is nearest to a hidden one (T, P)."""
    nearest = np.rint(np.arange(num_timepoints) * tr_s / native_s).astype(int).clip(max=len(hidden) - 1)
    return windows_of(torch.from_numpy(hidden[nearest])).unflatten(2, (-1, PATCH_LEN)).any(dim=3).flatten(1)


def series_of(windows_BPW: Tensor) -> Tensor:
    """Put windows that lie side by side one after the other, (T, P)."""
    return windows_BPW.permute(0, 2, 1).flatten(0, 1)


def windows_of(series_TP: Tensor) -> Tensor:
    """Undo `series_of`."""
    return series_TP.unflatten(0, (-1, WINDOW_LEN)).permute(0, 2, 1).contiguous()


def fill_hidden(bold: Series, hidden: NDArray[np.bool_]) -> Series:
    """Replace hidden values by a line between the visible ones of that parcel, (T, P)."""
    filled, times = bold.copy(), np.arange(len(bold))
    for parcel in range(bold.shape[1]):
        gone = hidden[:, parcel]
        filled[gone, parcel] = np.interp(times[gone], times[~gone], bold[~gone, parcel])
    return filled


def score_all(model: BrainLM, test: dict[float, list[Series]]) -> list[dict[str, Any]]:
    """Return a record for every TR and way of feeding."""
    tr_s, found = model.contract.tr_s, []
    for fed_s, series in test.items():
        recordings = recordings_of(series, fed_s)
        if fed_s == tr_s:
            found.append({"fed_s": fed_s, "way": "own", "r2": score(model, recordings)})
            continue
        resampled = [resample(one.bold, one.keep_mask, fed_s, tr_s)[0] for one in recordings]
        same_s = max(round(WINDOW_LEN * tr_s / fed_s / PATCH_LEN), 2) * PATCH_LEN
        native_target = score_native_target(model, recordings)
        scores = {
            "seconds": score(model, recordings),
            "same_s": score(model, recordings, same_s),
            "pretend": score(model, recordings_of(series, tr_s)),
            "resampled": score(model, recordings_of(resampled, tr_s)),
            "resampled, native target": native_target.r2,
        }
        found += [{"fed_s": fed_s, "way": way, "r2": r2} for way, r2 in scores.items()]
        found[-1]["hidden"] = native_target.num_hidden / native_target.num_tokens
    return found


def print_table(records: list[dict[str, Any]]) -> None:
    """Print means over seeds, with the smallest and the largest."""
    print(f"\n{'trained at':>10} {'fed':>6}  {'way':26}{'R2':>8}   {'range':18}")
    cells = dict.fromkeys((r["train_s"], r["fed_s"], r["way"]) for r in records)
    for train_s, fed_s, way in sorted(cells, key=lambda cell: (cell[0], cell[1], WAYS.index(cell[2]))):
        found = [r["r2"] for r in records if (r["train_s"], r["fed_s"], r["way"]) == (train_s, fed_s, way)]
        spread = f"{min(found):.3f} to {max(found):.3f}"
        hidden = [r["hidden"] for r in records if (r["train_s"], r["fed_s"]) == (train_s, fed_s) and "hidden" in r]
        share = f"{statistics.mean(hidden):.0%} of the tokens hidden" if way.endswith("target") else ""
        print(f"{train_s:8g} s {fed_s:4g} s  {way:26}{statistics.mean(found):8.3f}   {spread:18} {share}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of subjects, weights and batches")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--train-tr", nargs="+", type=float, default=list(TRS_S), choices=TRS_S)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.steps} steps of {BATCH} windows", flush=True)
    records = []
    for seed in args.seeds:
        series = simulate(NUM_TRAIN + NUM_TEST, seed)
        for train_s in args.train_tr:
            started = time.perf_counter()
            model = train_model(series[train_s][:NUM_TRAIN], train_s, args.steps, seed)
            trained = time.perf_counter()
            found = score_all(model, {tr_s: one[NUM_TRAIN:] for tr_s, one in series.items()})
            records += [{"seed": seed, "train_s": train_s, **record} for record in found]
            own = next(record["r2"] for record in found if record["way"] == "own")
            seconds = f"{trained - started:.0f} s of training, {time.perf_counter() - trained:.0f} s of scoring"
            print(f"seed {seed}, trained at {train_s:g} s: own R2 {own:.3f}; {seconds}", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(records, indent=1))
    print_table(records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
