"""A published model under our interface sees what our masks show it, says nothing else, and carries what it is fed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainlm.contract_distance import read_recordings
from brainlm.errors import CheckpointError, ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.masking import make_mask
from brainlm.official import load_official, main
from brainlm.official_contract import Gain, published_contract, read_contract
from brainlm.published import PublishedModel, is_published
from brainlm.recording import Recording
from brainlm.testing import synthetic_atlas, write_synthetic_dataset
from brainlm.windows import Windows, cut_windows, pad_windows
from tests.brainlm.published_models import P, W, fine_tuned, normal, nystrom, vit, write


def contract_of(num_parcels: int, **changes: Any) -> InputContract:
    rng = np.random.default_rng(3)
    fields: dict[str, Any] = {
        "atlas": synthetic_atlas(num_parcels),
        "covered": np.ones(num_parcels, dtype=bool),
        "median": rng.normal(0, 1, num_parcels).astype(np.float32),
        "iqr": rng.uniform(1, 5, num_parcels).astype(np.float32),
        "tr_s": 0.735,
        "window_len": 200,
        "patch_len": 20,
    }
    return InputContract(**fields | changes)


def published(network: Any, gain: float = 1.0, **changes: Any) -> PublishedModel:
    config = network.config
    contract = contract_of(getattr(config, "num_brain_voxels", P), **changes)
    fed = published_contract(contract, config, Gain(value=gain), "the test")
    return PublishedModel(network, fed).eval()


def vit14(**changes: Any) -> Any:
    return vit(patch_size=14, image_size=434, **changes)


def future(num_patches: int, windows: int = 2, num_parcels: int = P, patches: int = 10) -> torch.Tensor:
    mask = torch.zeros(windows, num_parcels, patches, dtype=torch.bool)
    mask[:, :, patches - num_patches :] = True
    return mask.flatten(1)


def own_mask(model: PublishedModel, ratio: float = 0.6, windows: int = 2) -> torch.Tensor:
    return torch.rand(windows, model.num_tokens, generator=torch.Generator().manual_seed(4)) < ratio


# ---------------------------------------------------------------------- 13M: any mask of ours


def test_13m_reconstruction_is_the_published_one_with_tokens_in_atlas_order() -> None:
    """The mask ratio of the configuration is that of the mask here, so the published path can say the same."""
    network = nystrom(mask_ratio=0.25)
    model = published(network)
    x = normal(2, 12, 40)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, [1, 5, 6, 11, 20, 23]] = True
    mask[1, :6] = True
    noise = torch.arange(24.0) / 100 + mask
    expected = network(x, model.coords_mm.expand(2, -1, -1), noise)
    found = model.reconstruct(x, mask)
    hidden = mask.view(2, 12, 2).repeat_interleave(20, dim=2)
    assert torch.equal(torch.isfinite(found), hidden)
    torch.testing.assert_close(found[hidden], expected.logits.flatten(2)[hidden])
    assert torch.equal(model.hidden_values(mask), hidden)


def test_13m_windows_that_hide_unequal_numbers_answer_as_alone() -> None:
    model = published(nystrom())
    x = normal(3, 12, 40)
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[0, :3], mask[1, 5:20], mask[2, 21:] = True, True, True
    together = model.reconstruct(x, mask)
    for i in range(3):
        alone = model.reconstruct(x[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, equal_nan=True)


def test_13m_never_looks_at_hidden_or_missing_values() -> None:
    model = published(nystrom())
    x, present = normal(2, 12, 40), torch.ones(2, 12, dtype=torch.bool)
    present[0, 3] = False
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, ::5] = True
    found = model.reconstruct(x, mask, present)
    spoilt = x.masked_fill(mask.view(2, 12, 2).repeat_interleave(20, 2), float("nan"))
    spoilt[0, 3] = float("nan")
    assert torch.equal(model.reconstruct(spoilt, mask, present).nan_to_num(9), found.nan_to_num(9))
    assert found[0, 3].isnan().all()
    seen = x.clone()
    seen[1, 11, 39] += 1  # visible
    assert not torch.equal(model.reconstruct(seen, mask, present)[1].nan_to_num(9), found[1].nan_to_num(9))
    # missing is not the same as 0: the token is not there at all
    zero = x.clone()
    zero[0, 3] = 0
    assert not torch.allclose(model.reconstruct(zero, mask)[0].nan_to_num(9)[:3], found[0].nan_to_num(9)[:3])


def test_the_order_of_tokens_matters_in_the_13m_family_and_is_kept() -> None:
    network = nystrom(mask_ratio=0.0)
    model, x = published(network), normal(2, 12, 40)
    embedding = model.embed_windows(x)
    xyz = model.coords_mm.expand(2, -1, -1)
    shuffled = network(x, xyz, torch.rand(2, 24, generator=torch.Generator().manual_seed(1))).latent
    assert not torch.allclose(embedding.cls, shuffled[:, 0], atol=1e-3)
    ordered = network(x, xyz, torch.arange(24.0).expand(2, -1)).latent
    torch.testing.assert_close(embedding.cls, ordered[:, 0])
    torch.testing.assert_close(embedding.pooled, ordered[:, 1:].mean(dim=1))


# ---------------------------------------------------------------------- ViT-MAE: its own tokens, and the end


def image_of(x: torch.Tensor, model: PublishedModel) -> torch.Tensor:
    rows = sorted(range(P), key=lambda i: float(model.contract.atlas.coords_mm[i, 1]))
    return x[:, rows][:, None].expand(-1, 3, -1, -1)


def parcels_of(rows: torch.Tensor, model: PublishedModel) -> torch.Tensor:
    order = sorted(range(P), key=lambda i: float(model.contract.atlas.coords_mm[i, 1]))
    out = torch.empty_like(rows)
    out[:, order] = rows
    return out


@pytest.mark.parametrize("make", [vit, vit14])
@pytest.mark.parametrize(("num_patches", "ratio"), [(1, 0.1), (3, 0.3)])
def test_the_end_of_a_window_is_hidden_as_the_published_mode_hides_it(
    make: Callable[..., Any], num_patches: int, ratio: float
) -> None:
    network = make(train_mode="predict_last_pixel", mask_ratio=ratio + 1e-6)
    model, x = published(network), normal(2, P, W)
    expected = network(image_of(x, model))
    found = model.reconstruct(x, future(num_patches))
    hidden = parcels_of(expected.mask, model).bool()
    assert torch.equal(torch.isfinite(found), hidden)
    assert hidden.sum() == 2 * P * 20 * num_patches
    torch.testing.assert_close(found[hidden], parcels_of(expected.logits, model)[hidden])


@pytest.mark.parametrize("make", [vit, vit14])
def test_models_of_random_masks_hide_whole_patches_at_the_end(make: Callable[..., Any]) -> None:
    """Their visible patches have no trained output, so none is read."""
    last = make(train_mode="predict_last", mask_ratio=0.2)
    model, x = published(make()), normal(1, P, W)
    expected = parcels_of(last(image_of(x, model)).logits, model)
    found = model.reconstruct(x, future(2, windows=1))
    assert torch.equal(torch.isfinite(found), torch.arange(W).expand(1, P, W) >= 160)
    torch.testing.assert_close(found[..., 160:], expected[..., 160:])
    pixels = model.reconstruct(x, future(2, windows=1), end="pixels")
    assert torch.equal(torch.isfinite(pixels), torch.isfinite(found))
    assert not torch.allclose(pixels[..., 160:], found[..., 160:])


@pytest.mark.parametrize("make", [vit, vit14])
def test_every_value_lies_in_the_token_whose_mask_hides_it(make: Callable[..., Any]) -> None:
    network = make()
    model = published(network)
    token = model.token_of_value()
    assert token.shape == (P, W)
    g, p = network.config.grid, network.config.patch_size
    assert int(token.min()) >= 0
    assert int(token.max()) < g * g == model.num_tokens
    mask = torch.zeros(1, g * g, dtype=torch.bool)
    mask[0, int(token[100, 90])] = True
    order = [1.0] * (g * g)
    order[int(token[100, 90])] = 2.0
    hidden_one = replace(network.config, mask_ratio=0.5 / (g * g))
    network.config = hidden_one
    published_mask = parcels_of(network(image_of(normal(1, P, W), model), torch.tensor([order])).mask, model)
    assert torch.equal(published_mask[0].bool(), token == token[100, 90])
    assert int(published_mask.sum()) == p * p  # a token of the middle has no margin in it
    assert torch.equal(model.hidden_values(mask), published_mask.bool())


@pytest.mark.parametrize("make", [vit, vit14])
def test_masks_over_own_tokens_give_the_published_predictions(make: Callable[..., Any]) -> None:
    network = make()
    model, x = published(network), normal(1, P, W)
    num_tokens = model.num_tokens
    noise = torch.rand(1, num_tokens, generator=torch.Generator().manual_seed(2))
    expected = network(image_of(x, model), noise)
    mask = noise.argsort().argsort() >= int(num_tokens * 0.25)
    found = model.reconstruct(x, mask)
    hidden = parcels_of(expected.mask, model).bool()
    assert torch.equal(torch.isfinite(found), hidden)
    torch.testing.assert_close(found[hidden], parcels_of(expected.logits, model)[hidden], atol=1e-5, rtol=1e-4)
    spoilt = x.masked_fill(hidden, float("nan"))
    torch.testing.assert_close(model.reconstruct(spoilt, mask), found, equal_nan=True, atol=0, rtol=0)


def test_unequal_masks_and_missing_parcels_of_vit_models() -> None:
    model, x = published(vit()), normal(2, P, W)
    present = torch.ones(2, P, dtype=torch.bool)
    present[1, 7] = False
    mask = own_mask(model)
    assert mask.sum(1).unique().numel() == 2
    found = model.reconstruct(x, mask, present)
    zero = x.clone()
    zero[1, 7] = 0
    torch.testing.assert_close(found[0:1], model.reconstruct(x[:1], mask[:1]), equal_nan=True)
    again = model.reconstruct(zero[1:], mask[1:]).index_fill(1, torch.tensor([7]), float("nan"))
    torch.testing.assert_close(found[1:], again, equal_nan=True)
    spoilt = x.clone()
    spoilt[1, 7] = float("nan")
    torch.testing.assert_close(model.reconstruct(spoilt, mask, present), found, equal_nan=True, atol=0, rtol=0)
    ends = torch.cat([future(1, 1), future(2, 1)])
    both = model.reconstruct(x, ends, present)
    assert both[0, 0].isfinite().sum() == 20
    assert both[1, 0].isfinite().sum() == 40
    ends = (ends.view(2, P, 10) | ~present[:, :, None]).flatten(1)  # make_mask hides missing parcels besides
    torch.testing.assert_close(model.reconstruct(x, ends, present), both, equal_nan=True)


def test_masks_that_cannot_be_honoured_are_refused_with_the_reason() -> None:
    model, x = published(vit()), normal(1, P, W)
    why = r"cannot be honoured: a token of this model is 16 parcels .* x 16 timepoints"
    for kind in ("random", "parcels", "time_blocks"):
        assert "mask kind future" in model.why_not(kind)
        mask = make_mask(kind, P, 10, 0.3, torch.Generator().manual_seed(1))[None]
        with pytest.raises(DataError, match=why):
            model.reconstruct(x, mask)
    assert model.why_not("future") == "" == published(nystrom()).why_not("random")
    with pytest.raises(DataError, match="hides nothing, or all"):
        model.reconstruct(x, future(10, windows=1))
    with pytest.raises(DataError, match="no patch column of the window would be visible"):
        published(vit(), patch_len=1).reconstruct(x, future(195, windows=1, patches=200))
    with pytest.raises(DataError, match=r"mask of shape \(1, 700\), expected \(windows, 4240\), or \(windows, 729\)"):
        model.reconstruct(x, torch.zeros(1, 700, dtype=torch.bool))
    with pytest.raises(DataError, match="no visible token"):
        model.reconstruct(x, torch.ones(1, 729, dtype=torch.bool))
    with pytest.raises(DataError, match="windows of 424 parcels x 199 timepoints, a published model takes 424 x 200"):
        model.embed_windows(x[:, :, 1:])
    moved = Windows(
        values=x,
        present=torch.ones(1, P, dtype=torch.bool),
        kept=torch.ones(1, W, dtype=torch.bool),
        coords_mm=model.coords_mm + 3,
    )
    with pytest.raises(DataError, match=r"parcels lie up to 5\.2 mm from those of the contract"):
        model.embed_windows(moved)


@pytest.mark.parametrize("mode", ["auto_encode", "predict_last", "predict_last_pixel"])
def test_masks_as_in_training_can_be_drawn_and_honoured(mode: str) -> None:
    model = published(vit(train_mode=mode, mask_ratio=0.2))
    mask = model.draw_mask(torch.Generator().manual_seed(1))
    expected = 729 - int(729 * 0.8) if mode == "auto_encode" else 27 * (2 if mode == "predict_last_pixel" else 3)
    assert int(mask.sum()) == expected
    assert model.reconstruct(normal(1, P, W), mask[None]).isfinite().any()
    tokens = published(nystrom()).draw_mask(torch.Generator().manual_seed(1))
    assert tokens.shape == (24,)
    assert int(tokens.sum()) == 18


# ---------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("make", [nystrom, vit, fine_tuned])
def test_embeddings_are_deterministic_and_pass_gradients(make: Callable[..., Any]) -> None:
    model = published(make())
    x = normal(2, model.num_parcels, model.window_len)
    first, second = model.embed_windows(x), model.embed_windows(x)
    assert torch.equal(first.cls, second.cls)
    assert torch.equal(first.pooled, second.pooled)
    assert first.pooled.shape == (2, 8)
    model.train()
    model.embed_windows(x).pooled.square().sum().backward()
    assert all(
        value.grad is not None and bool(value.grad.abs().sum() > 0)
        for name, value in model.network.vit.named_parameters()
        if value.requires_grad and "layernorm.bias" not in name and "key.bias" not in name
    )


@pytest.mark.parametrize("make", [nystrom, vit])
def test_embeddings_take_missing_parcels_as_zero(make: Callable[..., Any]) -> None:
    model = published(make())
    x = normal(1, model.num_parcels, model.window_len)
    present = torch.ones(1, model.num_parcels, dtype=torch.bool)
    present[0, 5] = False
    zero, spoilt = x.clone(), x.clone()
    zero[0, 5], spoilt[0, 5] = 0, float("nan")
    expected = model.embed_windows(zero)
    assert torch.equal(model.embed_windows(Windows.of(spoilt, present)).pooled, expected.pooled)
    assert not torch.equal(model.embed_windows(x).pooled, expected.pooled)


@pytest.mark.parametrize("make", [nystrom, vit])
def test_what_was_not_measured_is_not_looked_at(make: Callable[..., Any]) -> None:
    """The last patches of a short recording are padding: any value there, the same answers, and no token of them."""
    model = published(make())
    x = normal(2, model.num_parcels, model.window_len)
    kept = torch.ones(2, model.window_len, dtype=torch.bool)
    kept[1, model.window_len // 2 :] = False
    spoilt = x.clone()
    spoilt[1, :, model.window_len // 2 :] = float("nan")
    found = model.embed_windows(Windows.of(spoilt, None, kept))
    assert bool(found.pooled.isfinite().all())
    torch.testing.assert_close(found.pooled[:1], model.embed_windows(x[:1]).pooled)
    assert not torch.allclose(found.pooled[1:], model.embed_windows(x[1:]).pooled)
    mask = future(1, 2, model.num_parcels, model.config.num_patches)
    if make is nystrom:  # half of its two patches is not measured: the rest must be visible
        mask = torch.zeros_like(mask)
        mask[:, 0] = True
    one = model.reconstruct(Windows.of(spoilt, None, kept), mask)
    two = model.reconstruct(Windows.of(spoilt.nan_to_num(5.0), None, kept), mask)
    torch.testing.assert_close(one, two, equal_nan=True, atol=0, rtol=0)


def test_a_fine_tuned_model_predicts_and_does_not_reconstruct() -> None:
    network = fine_tuned()
    model, x = published(network), normal(2, P, W)
    assert model.predict(x).shape == (2,)
    torch.testing.assert_close(model.predict(x), network.predict(image_of(x, model))[:, 0])
    assert torch.equal(model.predict(x), model.predict(x))
    with pytest.raises(ConfigError, match="no decoder"):
        model.reconstruct(x, future(1))
    with pytest.raises(ConfigError, match="no prediction head"):
        published(vit()).predict(x)


# ---------------------------------------------------------------------- contract, folders, command line


def test_contract_units_are_the_models_input() -> None:
    contract = contract_of(12)
    fed = published_contract(contract, nystrom().config, Gain(value=0.25, source="given"), "x")
    np.testing.assert_allclose(fed.iqr, contract.iqr * 4, rtol=1e-6)
    np.testing.assert_array_equal(fed.median, contract.median)
    assert (fed.window_len, fed.patch_len) == (40, 20)
    assert "scale is not documented (signal / 5.6430855" in fed.units
    assert "gain 0.25 (given)" in fed.flags[-2]
    assert "UK Biobank" in fed.flags[-1]
    assert any("units" in line for line in fed.adaptable_differences(contract))
    assert published_contract(contract_of(P, patch_len=50), vit().config, Gain(), "x").patch_len == 50
    assert published_contract(contract_of(P, window_len=60, patch_len=15), vit().config, Gain(), "x").patch_len == 20
    with pytest.raises(CheckpointError, match="x has the 12 parcels of synthetic, the published model has 424"):
        published_contract(contract, vit().config, Gain(), "x")
    with pytest.raises(
        CheckpointError, match="windows of 200 timepoints in patches of 20, the published model takes 40"
    ):
        PublishedModel(nystrom(), contract)
    with pytest.raises(ConfigError, match="gain: expected a finite number above 0"):
        Gain(value=0.0)


@pytest.mark.parametrize("make", [nystrom, vit, fine_tuned])
def test_command_line_writes_a_folder_that_loads(
    tmp_path: Path, make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    network = make()
    source, target = write(tmp_path / "src", network, pickled=True), tmp_path / "dst"
    contract = contract_of(12 if make is nystrom else P)
    (tmp_path / "input_contract.json").write_text(contract.dumps())
    given = str(tmp_path / "input_contract.json")
    assert main([str(source), str(target), "--contract", given, "--gain", "0.2"]) == 0
    assert "gain 0.2 (given)" in capsys.readouterr().out
    model = PublishedModel.from_pretrained(str(target))
    assert not model.training
    assert is_published(str(target))
    np.testing.assert_allclose(model.contract.iqr, contract.iqr * 5, rtol=1e-6)
    assert model.manifest["gain_source"] == "given"
    assert model.manifest["source"] == str(source)
    assert len(model.manifest["source_sha256"]) == len(model.weights_sha256) == 64
    assert model.num_parameters == sum(p.numel() for p in network.parameters())
    assert model.num_parcels == contract.atlas.num_parcels
    x = normal(1, model.num_parcels, model.window_len)
    torch.testing.assert_close(model.embed_windows(x).cls, PublishedModel(network, model.contract).embed_windows(x).cls)
    load_official(str(target))  # still a published folder
    assert main([str(target), str(tmp_path / "again")]) == 0
    with pytest.raises(CheckpointError, match=r"not a published checkpoint with an input contract: write one with"):
        PublishedModel.from_pretrained(str(tmp_path / "again"))
    (target / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        PublishedModel.from_pretrained(str(target))


def test_a_folder_converted_without_contract_keeps_none_of_an_earlier_one(tmp_path: Path) -> None:
    source, target = write(tmp_path / "src", nystrom()), tmp_path / "dst"
    (tmp_path / "input_contract.json").write_text(contract_of(12).dumps())
    assert main([str(source), str(target), "--contract", str(tmp_path)]) == 0
    assert "not estimated" in json.loads((target / "input_contract.json").read_text())["flags"][0]
    assert main([str(source), str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gain", "2"], "give --contract, too"),
        (["--contract", "{0}", "--data", "{0}"], "give --gain estimate, too"),
        (["--contract", "{0}", "--gain", "loud"], "expected a number above 0 or 'estimate', found 'loud'"),
        (["--contract", "{0}", "--gain", "-1"], "expected a number above 0"),
        (["--contract", "{0}/nothing"], "expected a prepared data set or an input_contract.json"),
    ],
)
def test_arguments_that_contradict_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "src", nystrom())
    (tmp_path / "input_contract.json").write_text(contract_of(12).dumps())
    given = [argument.format(tmp_path) for argument in arguments]
    assert main([str(source), str(tmp_path / "dst"), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_a_gain_that_is_no_optimum_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights predict nothing at any scale."""
    write_synthetic_dataset(str(tmp_path / "data"), num_parcels=12, num_subjects={"train": 3, "val": 1, "test": 1})
    source = write(tmp_path / "src", nystrom())
    arguments = [str(source), str(tmp_path / "dst"), "--contract", str(tmp_path / "data"), "--gain", "estimate"]
    assert main(arguments) == 1
    assert "the best gain in the train split of synthetic is" in capsys.readouterr().err
    assert read_contract(str(tmp_path / "data")).atlas.num_parcels == 12


@pytest.mark.parametrize("make", [nystrom, vit, fine_tuned])
def test_untrained_twin_has_other_weights_and_the_same_positions(make: Callable[..., Any]) -> None:
    model = published(make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = PublishedModel.untrained_like(model, seed=1)
    again = PublishedModel.untrained_like(model, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in twin.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name])
        assert torch.equal(value, before[name]) == (not value.requires_grad), name
    x = normal(1, model.num_parcels, model.window_len)
    assert bool(twin.embed_windows(x).pooled.isfinite().all())


def test_the_gain_of_weights_that_were_trained_is_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of the 13M family are trained on a quarter of contract units; the estimate finds about a quarter."""
    dataset = write_synthetic_dataset(
        str(tmp_path / "data"), num_parcels=12, num_networks=1, gain_sd=0.0, noise=0.05, patch_len=20, num_timepoints=80
    )
    network = nystrom(hidden_size=16, decoder_hidden_size=16, mask_ratio=0.5, conv_kernel_size=3)
    network.vit.embeddings.pos_embedding.pe.zero_()
    network.decoder.pos_embedding.pe.copy_(network.decoder.pos_embedding.pe.clamp(-1, 1))
    model = PublishedModel.untrained_like(PublishedModel(network, dataset.contract), seed=0)
    network = model.network
    with torch.no_grad():  # coordinates are mm, some 50 of them
        network.vit.embeddings.xyz_embedding_projection.weight.mul_(0.02)
        network.decoder.decoder_xyz_projection.weight.mul_(0.02)
    cut = pad_windows([cut_windows(r, dataset.contract) for r in read_recordings(dataset)], dataset.contract)
    x, xyz = 0.25 * cut.values, model.coords_mm
    generator = torch.Generator().manual_seed(1)
    for step in range(150):
        rows = torch.randperm(len(x), generator=generator)[:12]
        network.zero_grad()
        network(x[rows], xyz.expand(len(rows), -1, -1), generator=generator).loss.backward()
        with torch.no_grad():
            for value in network.parameters():
                if value.grad is not None:
                    value -= 5e-3 * (1 - step / 150) * value.grad.sign()
    source, data = write(tmp_path / "src", network), str(tmp_path / "data")
    assert main([str(source), str(tmp_path / "dst"), "--contract", data, "--gain", "estimate", "--data", data]) == 0
    assert "estimated; R2 0." in capsys.readouterr().out
    found = PublishedModel.from_pretrained(str(tmp_path / "dst"))
    assert 0.25 / 1.6 < found.manifest["gain"] < 0.25 * 1.6
    np.testing.assert_allclose(found.contract.iqr, dataset.contract.iqr / found.manifest["gain"], rtol=1e-5)
    assert "estimated; R2" in found.contract.flags[0]


@pytest.mark.parametrize("make", [nystrom, vit])
def test_recordings_are_embedded_and_forecast_as_by_models_of_our_own(make: Callable[..., Any]) -> None:
    model = published(make())
    num_parcels = model.num_parcels
    bold = np.random.default_rng(0).normal(100, 4, (model.window_len + 60, num_parcels)).astype(np.float32)
    found = model.embed(bold, tr_s=model.contract.tr_s)
    recording = Recording(recording_id="rest", subject="", bold=bold, tr_s=model.contract.tr_s)
    windows = cut_windows(recording, model.contract)
    with torch.no_grad():
        expected = model.embed_windows(windows)
    np.testing.assert_allclose(found.pooled, expected.pooled.numpy(), rtol=1e-4, atol=1e-5)
    forecast = model.forecast(bold, model.patch_len * model.contract.tr_s, tr_s=model.contract.tr_s)
    assert forecast.bold.shape == (model.patch_len, num_parcels)
    assert np.isfinite(forecast.bold).all()
