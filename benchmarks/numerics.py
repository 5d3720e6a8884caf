"""How exact and how repeatable the model is: bfloat16, float32 and float64, batches, threads, order, repetition.

    python benchmarks/numerics.py [--cases tiny tiny-initial 1m 13m] [--weights DIR] [--json PATH] [--figure PATH]

Windows of 424 parcels x 200 timepoints of a simulated cohort (`brainlm.testing.synthetic_system`), 75 % hidden. Initial
weights predict almost nothing, and their errors are small with it. So a model is first trained for a short while, or
where that takes too long, its last layer is made ten times as large (see `CASES`; `tiny-initial` shows what that
changes). `--weights` keeps trained weights for the next call. Differences of predictions are in units of the SD of the
float64 predictions.

* precision: predictions, loss and gradients of one new window against float64. `weights alone` is float32 arithmetic
  with weights rounded to bfloat16: the part of bfloat16's error that no arithmetic can avoid.
* attention: output and gradients of each way to compute it against float64, both from the same rounded inputs.
* invariance: a window alone against the same in a batch of 8, padded beside a longer one, with its parcels in another
  order; and one thread against two.
* repetition: forward and backward again, in this process and in fresh ones, bit for bit.

Positions are computed in float32 in every case, as the model does. torch is slow in bfloat16 on a CPU without
instructions for it; there, products are done here as hardware does them: exact products of bfloat16 numbers, summed in
float32, rounded once. `--own-products` leaves them to torch; for `tiny`, both are shown. On a GPU float32 is without
TF32, which has a row of its own. Repetition is also shown with torch's deterministic algorithms.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from brainlm.input_contract import InputContract
from brainlm.layers import attend
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM
from brainlm.presets import preset
from brainlm.testing import synthetic_atlas, synthetic_system
from brainlm.tokens import hidden_ids, sample_hidden
from brainlm.windows import Windows, pad_windows

NUM_PARCELS, NUM_NETWORKS, WINDOW_LEN, LONGER_LEN, PATCH_LEN, TR_S = 424, 7, 200, 260, 20, 2.0
MASK_RATIO, BATCH = 0.75, 8
NUM_REPEATS, NUM_PROCESSES = 3, 2
GRID = np.logspace(-9, 1, 81)  # where the distribution of errors is evaluated for the figure
PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}
Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`preset`; training steps of 2 windows on a CPU and on a GPU, none = initial weights with a larger last layer."""

    preset: str
    lr: float
    steps: dict[str, int]
    repeat_len: int = WINDOW_LEN
    """Timepoints of the windows whose gradients are repeated, and compared between threads."""


CASES = {
    "tiny": Case(preset="tiny", lr=4e-3, steps={"cpu": 500, "cuda": 2000}),
    "tiny-initial": Case(preset="tiny", lr=0.0, steps={"cpu": 0, "cuda": 0}),
    "1m": Case(preset="1m", lr=1e-3, steps={"cpu": 0, "cuda": 2000}),
    "13m": Case(preset="13m", lr=1e-3, steps={"cpu": 0, "cuda": 1000}, repeat_len=40),
}
LARGER = 10.0  # undoes that the last layer begins a tenth as large: predictions then vary as much as the signal


# -------------------------------------------------------------------- data and weights


def made_contract(order: np.ndarray[Any, Any] | None = None) -> InputContract:
    """Return a contract whose series are in its units already, its parcels in another order if one is given."""
    atlas = synthetic_atlas(NUM_PARCELS, NUM_NETWORKS)
    ones = np.ones(NUM_PARCELS, dtype=np.float32)
    contract = InputContract(
        atlas=atlas, covered=ones > 0, median=0 * ones, iqr=ones, tr_s=TR_S, window_len=WINDOW_LEN, patch_len=PATCH_LEN
    )
    if order is None:
        return contract
    return replace(contract, atlas=replace(atlas, coords_mm=atlas.coords_mm[order]))


def simulated(count: int, length: int, seed: int) -> Tensor:
    """Draw windows (B, P, W) of subjects that differ in loudness, SD about 0.7."""
    rng = np.random.default_rng(seed)
    system = synthetic_system(synthetic_atlas(NUM_PARCELS, NUM_NETWORKS))
    series = [np.exp(0.3 * rng.standard_normal()) * system.simulate(length, rng).T / 1.7 for _ in range(count)]
    return torch.from_numpy(np.stack(series).astype(np.float32))


def random_masks(count: int, length: int, seed: int) -> Tensor:
    num_patches = length // PATCH_LEN
    masks = [make_mask("random", NUM_PARCELS, num_patches, MASK_RATIO, mask_generator(seed, i)) for i in range(count)]
    return torch.stack(masks)


def trained(name: str, device: torch.device, folder: str | None) -> BrainLM:
    """Return the model of a case after its short training, from `folder` if it is there."""
    case = CASES[name]
    model = BrainLM(preset(case.preset), made_contract())
    model.init_weights(torch.Generator().manual_seed(0))
    num_steps = case.steps[device.type]
    if num_steps == 0:
        with torch.no_grad():
            model.decoder_pred.weight.mul_(LARGER)
        return model.to(device).eval()
    path = None if folder is None else Path(folder) / f"{name}-{device.type}.pt"
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path))
        return model.to(device).eval()
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.lr, betas=(0.9, 0.98))
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = case.lr * min((step + 1) / 20, 1.0, 2 * (1 - step / num_steps))
        mask = random_masks(2, WINDOW_LEN, seed=1000 + step)
        ids = torch.stack([sample_hidden(one, 400, mask_generator(1, step)) for one in mask])
        windows = simulated(2, WINDOW_LEN, seed=1000 + step).to(device)
        model(windows, mask.to(device), ids_decoded=ids.to(device)).mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.cpu().state_dict(), path)
    return model.to(device).eval()


# -------------------------------------------------------------------- arithmetic


class HardwareProducts(TorchDispatchMode):
    """Multiply bfloat16 matrices as hardware does: exact products, summed in float32, rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[0].dtype == torch.bfloat16:
            exact = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
            return func(*exact, **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def has_bf16_products() -> bool:
    """Say whether this CPU multiplies bfloat16 matrices itself."""
    try:
        return bool(set(Path("/proc/cpuinfo").read_text().split()) & {"amx_bf16", "avx512_bf16"})
    except OSError:
        return False


@contextlib.contextmanager
def arithmetic(name: str) -> Iterator[None]:
    """Compute products as the name of the arithmetic says."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        with HardwareProducts() if name == "bf16, products emulated" else contextlib.nullcontext():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def in_arithmetic(model: BrainLM, name: str) -> BrainLM:
    """Return a copy with the weights of that arithmetic."""
    copy = BrainLM(model.config, model.contract)
    copy.load_state_dict(model.state_dict())
    copy.to(next(model.parameters()).device).eval()
    if name == "float64":
        return copy.double()
    if name == "weights alone":
        return copy.bfloat16().float()
    return copy.bfloat16() if name.startswith("bf16") else copy


def predict(model: BrainLM, windows: Windows | Tensor, mask: Tensor) -> Tensor:
    """Return predictions of hidden tokens, (B, Q, v), in the model's own dtype: `decode` would round float64."""
    raw: list[Tensor] = []
    hook = model.decoder_pred.register_forward_hook(lambda module, inputs, output: raw.append(output))
    try:
        encoded = model.encode(windows, mask)
        ids = hidden_ids(mask & encoded.grid.present)
        model.decode(encoded, ids)
    finally:
        hook.remove()
    if model.config.decoder == "full" and raw[0].shape[1] != ids.shape[1]:
        return raw[0][:, 1:].gather(1, ids[:, :, None].expand(-1, -1, raw[0].shape[2]))
    return raw[0]


def step(model: BrainLM, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Gradients]:
    """Return predictions, loss and gradients, in float64; the loss is computed in float32 or better, as in training."""
    model.zero_grad(set_to_none=True)
    raw = predict(model, values, mask)
    target = model.token_grid(values).patchify(values, hidden_ids(mask))
    exact = torch.float64 if raw.dtype == torch.float64 else torch.float32
    loss = (raw.to(exact) - target.to(exact)).square().mean()
    loss.backward()
    gradients = {n: p.grad.detach().double() for n, p in model.named_parameters() if p.grad is not None}
    return raw.detach().double(), loss.detach().double(), gradients


def norm(gradients: Gradients) -> float:
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


def distances(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Return how far predictions lie apart, in units of the SD of the expected ones; NaN (visible) is left out."""
    known = ~expected.isnan()
    found, expected = found[known].double(), expected[known].double()
    error = (found - expected).abs() / expected.std()
    return {"median": float(error.median()), "worst": float(error.max()), "equal": float((error == 0).double().mean())}


# -------------------------------------------------------------------- measuring


def measure_precision(model: BrainLM, names: list[str]) -> list[dict[str, Any]]:
    """Compare each arithmetic with float64 on one new window."""
    device = next(model.parameters()).device
    values, mask = simulated(1, WINDOW_LEN, seed=1).to(device), random_masks(1, WINDOW_LEN, seed=1).to(device)
    target = model.token_grid(values).patchify(values, hidden_ids(mask)).double()
    expected, loss, gradients = step(in_arithmetic(model, "float64"), values, mask)
    sst = float(target.square().sum())
    records = []
    for name in names:
        with arithmetic(name):
            found, found_loss, found_gradients = step(in_arithmetic(model, name), values, mask)
        apart = {key: found_gradients[key] - gradients[key] for key in gradients}
        scale = norm(gradients)
        cosine = sum(float((found_gradients[k] * gradients[k]).sum()) for k in gradients)
        tensors = sorted((float(apart[key].norm() / gradients[key].norm()), key) for key in gradients)
        error = ((found - expected).abs() / expected.std()).flatten().cpu().numpy()
        records.append(
            {
                "arithmetic": name,
                **distances(found, expected),
                "loss": abs(float(found_loss / loss) - 1),
                "gradient": norm(apart) / scale,
                "cosine": cosine / (scale * norm(found_gradients)),
                "tensors": [share for share, _ in tensors],
                "worst_tensor": tensors[-1][1],
                "r2": 1 - float((found - target).square().sum()) / sst,
                "r2_float64": 1 - float((expected - target).square().sum()) / sst,
                "sd": float(expected.std()),
                "cumulative": [float(share) for share in np.searchsorted(np.sort(error), GRID) / error.size],
            }
        )
    return records


def measure_invariance(model: BrainLM, names: list[str]) -> list[dict[str, Any]]:
    """Compare a window alone with the same window in other company, in another order, on more threads."""
    device = next(model.parameters()).device
    values, mask = simulated(BATCH, WINDOW_LEN, seed=2).to(device), random_masks(BATCH, WINDOW_LEN, seed=2).to(device)
    longer = simulated(1, LONGER_LEN, seed=3).to(device)
    padded_mask = torch.ones(2, NUM_PARCELS, LONGER_LEN // PATCH_LEN, dtype=torch.bool, device=device)
    padded_mask[0, :, : WINDOW_LEN // PATCH_LEN] = mask[0].view(NUM_PARCELS, -1)
    padded_mask[1] = random_masks(1, LONGER_LEN, seed=3).to(device).view(NUM_PARCELS, -1)
    joined = pad_windows([Windows.of(values[:1]), Windows.of(longer)], model.contract)
    order = np.random.default_rng(0).permutation(NUM_PARCELS)
    mask_ordered = mask[:1].view(1, NUM_PARCELS, -1)[:, order].flatten(1)
    records = []
    for name in names:
        rounded = in_arithmetic(model, name)
        with arithmetic(name):
            alone = rounded.reconstruct(values[:1], mask[:1])
            company = {
                "batch of 8": rounded.reconstruct(values, mask)[:1],
                "padded": rounded.reconstruct(joined, padded_mask.flatten(1))[:1, :, :WINDOW_LEN],
            }
            other = reordered(rounded, order).reconstruct(values[:1, order], mask_ordered)
            company["parcels shuffled"] = torch.empty_like(other)
            company["parcels shuffled"][:, order] = other
            if device.type == "cpu":
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                company[f"1 thread against {threads}"] = rounded.reconstruct(values[:1], mask[:1])
                torch.set_num_threads(threads)
        records += [{"arithmetic": name, "what": what, **distances(x, alone)} for what, x in company.items()]
    return records


def reordered(model: BrainLM, order: np.ndarray[Any, Any]) -> BrainLM:
    """Return the same model for parcels in another order: their coordinates and learned codes move with them."""
    state = model.state_dict()
    for key in ("position.parcel.weight", "decoder_position.parcel.weight"):
        if key in state:
            state[key] = state[key][torch.from_numpy(order)]
    copy = BrainLM(model.config, made_contract(order))
    copy.load_state_dict(state)
    return copy.to(next(model.parameters()).device, next(model.parameters()).dtype).eval()


def measure_repetition(model: BrainLM, name: str, names: list[str]) -> list[dict[str, Any]]:
    """Repeat forward and backward of three windows; compare every bit with the first time.

    Two windows would hide that sums over a batch come in any order: a + b is b + a.
    """
    device, length = next(model.parameters()).device, CASES[name].repeat_len
    values, mask = simulated(3, length, seed=4).to(device), random_masks(3, length, seed=4).to(device)
    records = []

    def compare(what: str, kind: str, rounded: BrainLM, first: tuple[Tensor, Tensor, Gradients], num: int) -> None:
        again = [step(rounded, values, mask) for _ in range(num)]
        apart = [norm({k: found[2][k] - first[2][k] for k in first[2]}) / norm(first[2]) for found in again]
        predicted = [float((found[0] - first[0]).abs().max() / first[0].std()) for found in again]
        records.append({"arithmetic": kind, "what": what, "worst": max(predicted), "gradient": max(apart), "num": num})

    for kind in names:
        rounded = in_arithmetic(model, kind)
        with arithmetic(kind):
            first = step(rounded, values, mask)
            compare("again", kind, rounded, first, NUM_REPEATS)
            torch.use_deterministic_algorithms(True)
            compare("again, deterministic", kind, rounded, step(rounded, values, mask), NUM_REPEATS)
            torch.use_deterministic_algorithms(False)
            if device.type == "cpu":
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                compare(f"1 thread against {threads}", kind, rounded, first, 1)
                torch.set_num_threads(threads)
    return records


def digest(name: str) -> str:
    """Hash predictions and gradients of untrained weights on one thread, to be compared between processes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = BrainLM(preset(CASES[name].preset), made_contract())
    model.init_weights(torch.Generator().manual_seed(0))
    length = CASES[name].repeat_len
    torch.set_num_threads(1)
    found = step(model.to(device), simulated(3, length, 4).to(device), random_masks(3, length, 4).to(device))
    content = hashlib.sha256(found[0].cpu().numpy().tobytes())
    for gradient in found[2].values():
        content.update(gradient.cpu().numpy().tobytes())
    return content.hexdigest()


def digests_of_processes(name: str) -> list[str]:
    command = [sys.executable, __file__, "--digest", name]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return [
        subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()[-1]
        for _ in range(NUM_PROCESSES)
    ]


# -------------------------------------------------------------------- attention


def measure_attention(device: torch.device, bf16_products: str) -> list[dict[str, Any]]:
    """Compare each way to compute attention with float64: relative RMS error of output and gradients."""
    generator = torch.Generator().manual_seed(0)
    size = (1, 2, 1061, 128)  # the encoder of 13m, two of its heads: visible tokens and CLS, head width
    q, k, v, dy = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4))
    valid = torch.rand(1, size[2], generator=generator) < 0.8
    every = None

    def math(q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if valid_BM is None else valid_BM[:, None, None]
            )

    def sdpa(q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if valid_BM is None else valid_BM[:, None, None])

    bf16 = torch.bfloat16
    ways: list[tuple[str, Callable[..., Tensor], torch.dtype, Tensor | None]] = [
        ("SDPA float32", attend, torch.float32, every),
        ("SDPA float32, a fifth masked", attend, torch.float32, valid),
        ("blocked bf16" if device.type == "cpu" else "SDPA bf16", attend, bf16, every),
        ("blocked bf16, a fifth masked" if device.type == "cpu" else "SDPA bf16, a fifth masked", attend, bf16, valid),
        ("SDPA written out, bf16", math, bf16, every),
    ]
    if device.type == "cpu":
        ways.append(("SDPA bf16 of torch", sdpa, bf16, every))
    records = []
    for sharpness in (1.0, 4.0):  # SD of the scores
        for what, function, dtype, allowed in ways:
            inputs = [x.to(dtype).to(device).requires_grad_() for x in (q * sharpness, k, v)]
            allowed = None if allowed is None else allowed.to(device)
            gradient = dy.to(dtype).to(device)
            with arithmetic(bf16_products):  # which torch's own kernel does not heed
                y = function(*inputs, allowed)
                found = [y.detach(), *torch.autograd.grad(y, inputs, gradient)]
            exact = [x.detach().double().requires_grad_() for x in inputs]
            scores = exact[0] @ exact[1].transpose(-1, -2) / size[3] ** 0.5
            if allowed is not None:
                scores = scores.masked_fill(~allowed[:, None, None], float("-inf"))
            truth = scores.softmax(-1) @ exact[2]
            expected = [truth.detach(), *torch.autograd.grad(truth, exact, gradient.double())]
            rms = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected)]
            worst = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected)]
            records.append({"what": what, "sharpness": sharpness, "rms": rms, "worst": worst})
    return records


# -------------------------------------------------------------------- what is printed and drawn


def print_tables(results: dict[str, Any]) -> None:
    print(f"\nprecision, against float64\n{'model':13}{'arithmetic':26}{'median':>9}{'worst':>9}{'loss':>9}", end="")
    print(f"{'gradient':>10}{'1-cosine':>10}{'worst tensor':>13}{'R2':>9}{'float64':>9}")
    for name, found in results["cases"].items():
        for r in found["precision"]:
            print(f"{name:13}{r['arithmetic']:26}{r['median']:9.1e}{r['worst']:9.1e}{r['loss']:9.1e}", end="")
            print(f"{r['gradient']:10.1e}{1 - r['cosine']:10.1e}{r['tensors'][-1]:13.1e}", end="")
            print(f"{r['r2']:9.5f}{r['r2_float64']:9.5f}  {r['worst_tensor']}")
    print(f"\nattention, against float64: relative RMS error\n{'path':32}{'score SD':>9}", end="")
    print("".join(f"{what:>10}" for what in ("output", "dq", "dk", "dv")) + f"{'worst':>10}")
    for r in results["attention"]:
        print(
            f"{r['what']:32}{r['sharpness']:9g}" + "".join(f"{x:10.1e}" for x in r["rms"]) + f"{max(r['worst']):10.1e}"
        )
    print("\ninvariance: predictions, against alone")
    print(f"{'model':13}{'arithmetic':26}{'':22}{'median':>9}{'worst':>9}{'equal':>8}")
    for name, found in results["cases"].items():
        for r in found["invariance"]:
            print(f"{name:13}{r['arithmetic']:26}{r['what']:22}{r['median']:9.1e}{r['worst']:9.1e}{r['equal']:8.1%}")
    print(f"\nrepetition\n{'model':13}{'arithmetic':26}{'':22}{'predictions':>12}{'gradient':>10}{'times':>6}")
    for name, found in results["cases"].items():
        for r in found["repetition"]:
            print(f"{name:13}{r['arithmetic']:26}{r['what']:22}{r['worst']:12.1e}{r['gradient']:10.1e}{r['num']:6}")
        print(
            f"{name:13}fresh processes of one thread, float32: "
            + ("equal" if found["processes_equal"] else "DIFFERENT")
        )


def draw(results: dict[str, Any], path: str) -> None:
    """Draw the distribution of prediction errors, and the gradient error of each tensor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"float32": "#0072B2", "tf32": "#009E73", "weights alone": "#E69F00", "bf16": "#D55E00"}
    styles = dict(zip(results["cases"], ("-", "-.", "--", ":")))
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name, found in results["cases"].items():
        for r in found["precision"]:
            kind = r["arithmetic"].split(",")[0]
            if r["arithmetic"] == "bf16, torch's products" and any(
                other["arithmetic"] == "bf16, products emulated" for other in found["precision"]
            ):
                continue
            label = {"bf16": "bfloat16", "weights alone": "bf16 weights alone"}.get(kind, kind)
            left.semilogx(
                GRID, r["cumulative"], styles[name], color=colours[kind], label=label if styles[name] == "-" else None
            )
            shares = np.linspace(0, 1, len(r["tensors"]))
            right.semilogx(r["tensors"], shares, styles[name], color=colours[kind])
    left.set(xlabel="error of a prediction (SD of predictions)", ylabel="share of predictions below", xlim=(1e-9, 1))
    right.set(xlabel="relative error of a gradient", ylabel="share of weight tensors below", ylim=(0, 1.02))
    for axes in (left, right):
        axes.minorticks_off()
    lines = [plt.Line2D([], [], color="0.3", linestyle=style) for style in styles.values()]
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    figure.legend(lines, list(styles), loc="outside upper right", ncols=len(lines), frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    if path.endswith(".svg"):  # hundredths of a point are enough, and half of the file
        Path(path).write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", Path(path).read_text()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--weights", metavar="DIR", help="keep trained weights here, and take them from here")
    parser.add_argument("--own-products", action="store_true", help="leave bfloat16 products to torch on any CPU")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--figure", metavar="PATH")
    parser.add_argument("--digest", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
    if args.digest:
        print(digest(args.digest))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emulated = device.type == "cpu" and not has_bf16_products() and not args.own_products
    bf16 = "bf16, products emulated" if emulated else "bf16, torch's products"
    what = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{what}, torch {torch.__version__}, {bf16}", flush=True)
    results: dict[str, Any] = {"machine": what, "torch": torch.__version__, "cases": {}}
    results["attention"] = measure_attention(device, bf16)
    for name in args.cases:
        started = time.perf_counter()
        model = trained(name, device, args.weights)
        names = ["float32", "weights alone", bf16]
        if device.type == "cuda":
            names.insert(1, "tf32")
        elif CASES[name].preset == "tiny" and emulated:
            names.append("bf16, torch's products")
        digests = digests_of_processes(name)
        results["cases"][name] = {
            "precision": measure_precision(model, names),
            "invariance": measure_invariance(model, ["float32", bf16]),
            "repetition": measure_repetition(model, name, ["float32", bf16]),
            "processes_equal": len(set(digests)) == 1,
        }
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    print_tables(results)
    if args.figure:
        draw(results, args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
