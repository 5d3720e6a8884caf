"""Published checkpoints give the published numbers, and nothing loads by half."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from brainlm.errors import CheckpointError, ConfigError, DataError
from brainlm.official import convert, load_official, main
from brainlm.official_13m import NystromBrainLM
from brainlm.official_config import NystromConfig, VitMaeConfig
from brainlm.official_layers import SelfAttention
from brainlm.official_vitmae import VitMaeBrainLM, VitMaeFineTuned, hidden_columns, rows_by_y
from tests.brainlm.published_models import VIT, P, W, fine_tuned, image, normal, nystrom, randomised, vit, write

FIXTURES = Path(__file__).parents[2] / ".." / "shared" / "fixtures" / "official"
CASES = ("brainlm_nys_mask0.2", "vitmae_p16_auto0.75", "vitmae_p16_predict_last0.1")
NUM_PARAMETERS = {"5M": 5.05, "13M": 13.43, "111M": 112.59, "650M": 658.34}  # millions, from the reference notes


def official(name: str) -> Path:
    if not FIXTURES.is_dir():
        pytest.skip("the published fixtures (../shared/fixtures/official) are not here")
    return FIXTURES / name


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    state = change(load_file(folder / "model.safetensors"))
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")


# ---------------------------------------------------------------------- parity with the published code


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_published_ones(case: str) -> None:
    expected = load_file(official(case) / "io.safetensors")
    model = load_official(str(official(case)))
    inputs = ("signal_vectors", "xyz_vectors", "pixel_values", "noise")
    output = model(**{name: expected[name] for name in inputs if name in expected})
    output.loss.backward()
    compared = [name for name in ("loss", "logits", "latent", "mask", "ids_restore") if name in expected]
    assert {"loss", "logits", "mask"} <= set(compared)
    for name in compared:
        torch.testing.assert_close(getattr(output, name), expected[name], rtol=0, atol=1e-5)
    parameters = dict(model.named_parameters())
    grads = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    assert grads
    for name, value in grads.items():
        grad = parameters[name].grad
        assert grad is not None
        assert (grad - value).abs().max() <= 1e-4 * value.abs().max(), name


@pytest.mark.parametrize("size", NUM_PARAMETERS)
def test_weights_at_full_size_have_the_published_names_and_shapes(size: str) -> None:
    lines = official(f"keys_{size}.txt").read_text().splitlines()
    tree = json.loads(official(f"config_{size}.json").read_text())
    model_class, config_class = (
        (NystromBrainLM, NystromConfig) if size in ("5M", "13M") else (VitMaeBrainLM, VitMaeConfig)
    )
    known = {name: tree[name] for name in config_class.__dataclass_fields__ if name in tree}
    with torch.device("meta"):
        model = model_class(config_class(**known))  # type: ignore[arg-type]
    assert [f"{name}\t{tuple(value.shape)}" for name, value in sorted(model.state_dict().items())] == sorted(lines)
    count = sum(value.numel() for value in model.parameters()) / 1e6
    assert count == pytest.approx(NUM_PARAMETERS[size], abs=0.005)


@pytest.mark.parametrize("conv_len", [None, 5])
def test_attention_is_exact_and_convolves_values_along_tokens(conv_len: int | None) -> None:
    attention = randomised(SelfAttention(6, 2, bias=True, conv_len=conv_len)).double()
    x = normal(2, 9, 6).double()
    q, k, v = (linear(x) for linear in (attention.query, attention.key, attention.value))
    expected = torch.zeros_like(x)
    for head in (0, 1):
        part = slice(3 * head, 3 * head + 3)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5, dim=-1)
        expected[..., part] = weights @ v[..., part]
        for token in range(9) if conv_len else ():
            for tap in range(5):
                if 0 <= token + tap - 2 < 9:
                    expected[:, token, part] += attention.conv.weight[head, 0, tap, 0] * v[:, token + tap - 2, part]
    torch.testing.assert_close(attention(x), expected)


# ---------------------------------------------------------------------- masks


def test_given_noise_decides_what_is_hidden() -> None:
    noise = torch.rand(2, 729, generator=torch.Generator().manual_seed(2))
    output = vit()(image(), noise)
    for row, restore in zip(noise, output.ids_restore):
        assert restore.tolist() == [int((row < value).sum()) for value in row]  # rank of each token's noise
    again = vit()(image(), noise)
    assert torch.equal(output.logits, again.logits)
    assert output.latent.shape == (2, 1 + int(729 * 0.25), 8)


@pytest.mark.parametrize("family", ["13M", "others"])
def test_drawn_noise_follows_the_generator(family: str) -> None:
    model: Any = nystrom() if family == "13M" else vit()
    inputs = (normal(2, 12, 40), normal(2, 12, 3)) if family == "13M" else (image(),)

    def mask(seed: int) -> torch.Tensor:
        return model(*inputs, generator=torch.Generator().manual_seed(seed)).mask

    assert torch.equal(mask(3), mask(3))
    assert not torch.equal(mask(3), mask(4))


def test_mask_and_logits_of_the_13m_family_are_per_patch_of_a_parcel() -> None:
    signal = normal(2, 12, 40)
    noise = torch.arange(24.0).expand(2, -1)  # visible: the first 6 tokens, that is parcels 0, 1, 2
    output = nystrom()(signal, normal(2, 12, 3), noise)
    assert output.logits.shape == (2, 12, 2, 20)
    assert output.mask.sum(dim=(0, 2)).tolist() == [0, 0, 0] + [4] * 9
    error = (output.logits - signal.view(2, 12, 2, 20))[:, 3:].square().mean()
    torch.testing.assert_close(output.loss, error)


def brute_force(patch: int, mode: str, num_asked: int) -> tuple[list[int], list[int], list[int]]:
    """Return hidden patch columns, zeroed columns and scored timepoints, column by column."""
    side = {16: 432, 14: 434}[patch]
    timepoint_of = {(side - W) // 2 + t: t for t in range(W)}  # column of the square to timepoint
    asked_from = min(column for column, t in timepoint_of.items() if t == W - num_asked)
    last = max(timepoint_of) // patch
    columns_of = {i: range(i * patch, (i + 1) * patch) for i in range(last + 1)}
    wanted = any if mode == "predict_last" else all
    hidden = [i for i, columns in columns_of.items() if wanted(column >= asked_from for column in columns)]
    seen_columns = [column for i in columns_of if i not in hidden for column in columns_of[i]]
    zeroed = [column for column in seen_columns if column >= asked_from]
    scored = [t for column, t in timepoint_of.items() if column // patch in hidden or column in zeroed]
    return hidden, zeroed, sorted(scored)


@pytest.mark.parametrize("mode", ["predict_last", "predict_last_pixel"])
@pytest.mark.parametrize("patch", [16, 14])
def test_predict_modes_hide_and_score_the_right_columns(patch: int, mode: Any) -> None:
    for num_asked in range(1, W):
        config = VitMaeConfig(
            **VIT
            | {
                "patch_size": patch,
                "image_size": 432 if patch == 16 else 434,
                "train_mode": mode,
                "mask_ratio": (num_asked + 0.01) / W,
            }
        )
        hidden, zeroed, scored = brute_force(patch, mode, num_asked)
        found = hidden_columns(config, W)
        assert list(found.patches) == hidden
        assert list(found.zeroed) == zeroed
        assert list(range(W - found.num_scored, W)) == scored
        if mode == "predict_last_pixel":
            assert found.num_scored == num_asked


@pytest.mark.parametrize(("ratio", "num_scored"), [(0.1, 28), (0.2, 44)])
def test_predict_last_scores_whole_patch_columns(ratio: float, num_scored: int) -> None:
    output = vit(train_mode="predict_last", mask_ratio=ratio)(image())
    assert output.mask.sum(dim=2).unique().tolist() == [num_scored]


@pytest.mark.parametrize("patch", [16, 14])
@pytest.mark.parametrize("mode", ["predict_last", "predict_last_pixel"])
def test_scored_timepoints_are_not_seen(patch: int, mode: str) -> None:
    model = vit(patch_size=patch, image_size=432 if patch == 16 else 434, train_mode=mode, mask_ratio=0.2)
    output = model(image())
    scored = output.mask[0, 0].bool()
    assert torch.equal(output.mask.bool(), scored.expand(2, P, W))
    assert not scored[:-60].any()
    assert scored[-40:].all()
    changed = image().clone()
    changed[..., scored] = 7.0
    assert torch.equal(model(changed).logits, output.logits)
    changed[..., int((~scored).sum()) - 1] = 7.0  # the last timepoint that is seen
    assert not torch.equal(model(changed).logits, output.logits)
    error = (output.logits - image()[:, 0])[..., scored].square().mean()
    torch.testing.assert_close(output.loss, error)


@pytest.mark.parametrize("mode", ["auto_encode", "predict_last"])
def test_the_loss_can_take_normalised_rows_as_the_published_one(mode: str) -> None:
    output = vit(norm_pix_loss=True, train_mode=mode)(image(), torch.rand(2, 729))
    rows = image()[:, 0]
    target = (rows - rows.mean(dim=2, keepdim=True)) / (rows.var(dim=2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(output.loss, (output.logits - target)[output.mask.bool()].square().mean())


@pytest.mark.parametrize("make", [nystrom, vit])
def test_bfloat16_stays_near_float32(make: Callable[[], Any]) -> None:
    model = make()
    is_13m = isinstance(model, NystromBrainLM)
    inputs = (normal(2, 12, 40), normal(2, 12, 3)) if is_13m else (image(),)
    noise = torch.rand(2, 24 if is_13m else 729)
    exact = model(*inputs, noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs, noise).loss
    rounded.backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0)


def test_rows_of_equal_y_stay_in_atlas_order() -> None:
    coords = torch.stack([torch.arange(424.0), torch.arange(424) % 77, torch.zeros(424)], dim=1)
    expected = sorted(range(424), key=lambda parcel: parcel % 77)
    assert rows_by_y(coords).tolist() == expected


# ---------------------------------------------------------------------- embeddings and fine-tuned models


def test_embedding_hides_nothing_and_is_the_same_each_time() -> None:
    signal, xyz = normal(2, 12, 40), normal(2, 12, 3)
    model = nystrom()
    assert torch.equal(model.embed(signal, xyz).cls, model.embed(signal, xyz).cls)
    ordered = nystrom(mask_ratio=0.0)(signal, xyz, torch.arange(24.0).expand(2, -1))
    assert torch.equal(model.embed(signal, xyz).cls, ordered.latent[:, 0])
    pooled = vit().embed(image()).pooled
    open_window = vit(mask_ratio=0.0)(image(), torch.arange(729.0).expand(2, -1))
    torch.testing.assert_close(pooled, open_window.latent[:, 1:].mean(dim=1))


@pytest.mark.parametrize("pooling", [False, True])
def test_fine_tuned_folder_predicts_one_number_per_window(tmp_path: Path, pooling: bool) -> None:
    model = load_official(str(write(tmp_path, fine_tuned(use_mean_pooling=pooling))))
    noise = torch.rand(2, 729, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0.5, -1.0])
    output = model(image(), noise, labels)
    assert isinstance(model, VitMaeFineTuned)
    x = output.latent.mean(dim=1) if pooling else output.latent[:, 0]
    for name in ("lin1", "lin2", "lin3"):
        linear = getattr(model.mlp_pred_head, name)
        x = (x if name == "lin1" else x.clamp(min=0)) @ linear.weight.T + linear.bias
    torch.testing.assert_close(output.pred, x)
    torch.testing.assert_close(output.loss, (x[:, 0] - labels).square().mean())
    assert output.pred.shape == (2, 1)
    assert output.mask.sum(dim=1).tolist() == [729 - int(729 * 0.25)] * 2
    assert not torch.equal(model(image(), 1 - noise).pred, output.pred)
    assert model(image(), noise).loss is None


@pytest.mark.parametrize("pooling", [False, True])
def test_fine_tuned_prediction_without_noise_hides_nothing(pooling: bool) -> None:
    model = fine_tuned(use_mean_pooling=pooling, sigmoid_outputs=True)
    open_window = fine_tuned(use_mean_pooling=pooling, sigmoid_outputs=True, mask_ratio=0.0)
    noise = torch.rand(2, 729, generator=torch.Generator().manual_seed(5))  # any order: this family has no convolution
    torch.testing.assert_close(model.predict(image()), open_window(image(), noise).pred.sigmoid())
    assert torch.equal(model.predict(image()), model.predict(image()))


def test_embeddings_can_be_trained_through() -> None:
    for embedding in (nystrom().embed(normal(2, 12, 40), normal(2, 12, 3)), vit().embed(image())):
        assert embedding.pooled.requires_grad
        assert embedding.cls.requires_grad


def test_fine_tuned_outputs_and_losses_follow_the_configuration() -> None:
    noise, labels = torch.rand(2, 729), torch.tensor([1.0, 0.0])
    plain = fine_tuned()(image(), noise).pred
    squashed = fine_tuned(sigmoid_outputs=True)
    torch.testing.assert_close(squashed(image(), noise).pred, plain)  # as published: not without labels
    torch.testing.assert_close(squashed(image(), noise, labels).pred, plain.sigmoid())
    p = plain.sigmoid()[:, 0]
    binary = fine_tuned(loss_fn="binary_cross_entropy", pos_weight=3.0)(image(), noise, labels).loss
    torch.testing.assert_close(binary, -(3 * p[0].log() + (1 - p[1]).log()) / 2)
    absolute = fine_tuned(loss_fn="mae")(image(), noise, labels).loss
    torch.testing.assert_close(absolute, (plain[:, 0] - labels).abs().mean())
    with pytest.raises(ConfigError, match="loss_fn='weighted_mse' is not built"):
        fine_tuned(loss_fn="weighted_mse")(image(), noise, labels)


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize("make", [nystrom, vit, fine_tuned])
@pytest.mark.parametrize("pickled", [False, True])
def test_conversion_keeps_every_bit(tmp_path: Path, make: Callable[[], Any], pickled: bool) -> None:
    model = make()
    source, target = write(tmp_path / "src", model, pickled=pickled), tmp_path / "dst"
    assert main([str(source), str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for folder in (source, target):
        again = load_official(str(folder))
        assert type(again) is type(model)
        assert not again.training
        assert again.config == model.config
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_loaded_model_can_be_trained(tmp_path: Path) -> None:
    model = load_official(str(write(tmp_path, vit()))).train()
    model(image()).loss.backward()
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "vit.layernorm.bias"}, r"1 missing \(vit\.layernorm\.bias\)"),
        (lambda s: s | {"extra": torch.zeros(1)}, r"1 unexpected \(extra\): wrong subfolder"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, r"names begin with 'module\.'"),
        (
            lambda s: {k.removeprefix("vit."): v for k, v in s.items() if k.startswith("vit.")},
            r"names lack 'vit\.': a part of a model was saved alone",
        ),
        (lambda s: {k: v for k, v in s.items() if k.startswith("vit.")}, "an encoder without decoder or prediction"),
        (lambda s: {"roberta.weight": torch.zeros(1)}, "not one weight of a published BrainLM is there"),
        (lambda s: s | {"vit.layernorm.bias": torch.zeros(3)}, r"vit\.layernorm\.bias has shape \(3,\), expected \(8,"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_a_guess(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    folder = write(tmp_path, vit())
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_official(str(folder))


@pytest.mark.parametrize("config_of", ["13M", "others"])
def test_weights_of_the_other_family_are_recognised(tmp_path: Path, config_of: str) -> None:
    write(tmp_path, nystrom() if config_of == "13M" else vit())
    config = (tmp_path / "config.json").read_text()
    write(tmp_path, vit() if config_of == "13M" else nystrom())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"missing .* unexpected .* wrong family") as caught:
        load_official(str(tmp_path))
    kinds = ("111M or 650M", "13M") if config_of == "13M" else ("13M", "111M or 650M")
    assert "vit.embeddings." in str(caught.value)
    assert str(caught.value).endswith("weights of the {} kind beside a configuration of the {} kind".format(*kinds))


def test_another_number_of_layers_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing \(vit\.encoder\.layer\.1\..*number of layers: wrong subfolder"):
        load_official(str(write(tmp_path, vit(), num_hidden_layers=2)))


def test_the_folder_above_names_the_folders_below(tmp_path: Path) -> None:
    write(tmp_path / "vitmae_111M", vit())
    expected = f"no published checkpoint .* Did you mean {re.escape(str(tmp_path))}/vitmae_111M"
    with pytest.raises(CheckpointError, match=expected):
        load_official(str(tmp_path))
    (tmp_path / "vitmae_111M" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors or pytorch_model\.bin"):
        load_official(str(tmp_path / "vitmae_111M"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "brainlm-mae"}, r"found 'brainlm-mae'; BrainLM\.from_pretrained reads"),
        ({"hidden_size": "8"}, "hidden_size: .* found '8'"),
        ({"num_attention_heads": 3}, "hidden_size=8 must be a multiple of num_attention_heads=3"),
        ({"train_mode": "predict_first"}, "train_mode"),
        ({"image_size": [432, 416]}, "must be a square of whole patches"),
        ({"mask_ratio": 1.5}, "mask_ratio=1.5 must be from 0 to 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_official(str(write(tmp_path, vit(), **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_landmarks": 32}, "num_landmarks=32 must equal segment_means_seq_len=64"),
        ({"decoder_hidden_size": 16}, "hidden_size=8 must equal decoder_hidden_size=16"),
        ({"conv_kernel_size": 4}, "conv_kernel_size=4 must be odd"),
        (
            {"num_timepoints_per_voxel": 50},
            "num_timepoints_per_voxel=50 must be a multiple of timepoint_patching_size=20",
        ),
    ],
)
def test_a_13m_configuration_that_is_not_built_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_official(str(write(tmp_path, nystrom(), **changes)))


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "src", vit(), pickled=True)
    torch.save({"vit.layernorm.bias": Touch(tmp_path / "touched")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: it holds more than tensors"):
        load_official(str(folder))
    assert main([str(folder), str(tmp_path / "dst")]) == 1
    assert "is refused" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "dst").exists()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"plain": Touch(tmp_path / "touched")}, protocol=2))
    with pytest.raises(CheckpointError, match="refused"):
        load_official(str(folder))
    assert not (tmp_path / "touched").exists()


def test_damaged_weights_and_other_structures_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, vit(), pickled=True)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_official(str(folder))
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, not the weights: run 'git lfs pull'"):
        load_official(str(folder))
    torch.save({"state_dict": {}, "epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a mapping of names to tensors"):
        load_official(str(folder))
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_official(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a mapping, found list"):
        load_official(str(folder))


def test_views_of_one_storage_can_be_converted(tmp_path: Path) -> None:
    folder = write(tmp_path / "src", nystrom(), pickled=True)
    state = nystrom().state_dict()
    state["decoder.pos_embedding.pe"] = state["vit.embeddings.pos_embedding.pe"]  # one table under two names
    torch.save(state, folder / "pytorch_model.bin")
    assert convert(str(folder), str(tmp_path / "dst")) == sum(value.numel() for value in state.values())
    load_official(str(tmp_path / "dst"))


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"signal_vectors has shape \(1, 12, 30\), expected \(windows, 12 parcels"):
        nystrom()(normal(1, 12, 30), normal(1, 12, 3))
    with pytest.raises(DataError, match=r"xyz_vectors has shape \(1, 3, 12\), expected \(1, 12, 3\)"):
        nystrom()(normal(1, 12, 40), normal(1, 3, 12))
    with pytest.raises(DataError, match=r"noise has shape \(1, 23\), expected \(windows, tokens\) = \(1, 24\)"):
        nystrom()(normal(1, 12, 40), normal(1, 12, 3), torch.rand(1, 23))
    for shape in ((1, 1, P, W), (1, 3, P, 199), (1, 3, 440, W), (P, W)):
        with pytest.raises(DataError, match=r"pixel_values has shape .* that leave even margins in 432 x 432"):
            vit()(torch.zeros(shape))


def test_importing_brainlm_leaves_the_published_models_alone() -> None:
    code = "import sys, brainlm; sys.exit(any(name.startswith('brainlm.official') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
