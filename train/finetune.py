"""Fine-tune a checkpoint: to predict phenotypes from recordings, or to forecast.

    python train/finetune.py --config train/configs/finetune_age.yaml [section.key=value ...]
    deepspeed --num_accelerators 2 train/finetune.py --config train/configs/finetune_age.yaml

Writes the best weights, with head and transforms, to ``checkpoints/best-step-N`` of the run's folder, who was trained,
validated and tested on to ``split.parquet``, and what the best weights predict for validation and test subjects to
``predictions.parquet`` and ``scores.json``. A run that was stopped goes on
from its newest snapshot when the same command is given again.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from brainlm.checkpoint import save_checkpoint
from brainlm.config import load_config, parse_entry_args, to_yaml
from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import BrainLMError, ConfigError
from brainlm.loader import WindowLoader
from brainlm.model import BrainLM
from brainlm.predictor import Predictor
from brainlm.predictor_checkpoint import save_predictor
from brainlm.presets import flops_per_window
from brainlm.published import is_published
from brainlm.store import Store
from brainlm.world import World, read_world
from train.cohort import ChosenRecordings, Cohort
from train.combinations import check_combination
from train.finetune_scores import SCORES, write_scores
from train.finetune_settings import FinetuneSettings, check_finetune_settings
from train.first_weights import adopt, load_for_rebuilding
from train.held_out import HeldOut
from train.launcher import Launcher
from train.mix import Mix
from train.objective import Objective, rebuild_hidden
from train.precision import resolve_precision
from train.predictor_parts import (
    columns_of,
    fit_targets,
    load_encoder,
    set_trained,
    set_whitening_text,
    whiten,
    whitening_text,
)
from train.run_files import describe
from train.run_training import Parts, run_training
from train.settings import ValidationSettings, micro_batches, num_steps
from train.start_up import StartUp
from train.subject_split import SubjectSplit, split_subjects, write_split
from train.target_batches import HeldOutTargets, TargetLoader, encode_all
from train.watchdog import EXIT_STATUS, LostRankError

logger = logging.getLogger("finetune")


def main(argv: list[str] | None = None) -> int:
    launcher = Launcher()  # before it can have ended
    args = parse_entry_args(__doc__ or "", argv)
    world = read_world()
    logging.basicConfig(level=logging.INFO if world.is_rank_zero else logging.ERROR, format="finetune: %(message)s")
    for noisy in ("DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        if args.dry_run:
            if world.is_rank_zero:
                print(plan(load_settings(args.config, args.overrides, world)))
            return 0
        start = StartUp(world)
        with start.together():
            settings = load_settings(args.config, args.overrides, world)
            dataset = open_dataset(settings.data.datasets[0])
        run = FineTuning(settings, dataset, world)
        done = run_training(settings, dataset.content_hash, lambda: run.build(start), world, start, launcher)
        if done is not None and world.is_rank_zero and settings.targets:
            run.write_scores(done)
        return 0
    except LostRankError as error:
        logger.error("%s", error)
        return EXIT_STATUS
    except BrainLMError as error:
        logger.error("%s", error)
        return 1


def load_settings(path: str, overrides: list[str], world: World) -> FinetuneSettings:
    """Read and check the settings, which fit each other and the number of ranks."""
    settings = resolve_precision(load_config(FinetuneSettings, path, overrides))
    check_finetune_settings(settings, world.size)
    check_combination(settings.engine)
    return settings


class FineTuning:
    """What one rank does for a fine-tuning run before and after its steps."""

    def __init__(self, settings: FinetuneSettings, dataset: Dataset, world: World) -> None:
        self.settings, self.dataset, self.world = settings, dataset, world

    def build(self, start: StartUp) -> Parts:
        """Build what is trained, what feeds it and what scores it. All ranks take part."""
        if self.settings.targets:
            return self._predictor(start)
        return self._forecaster()

    def _split(self, cohort: Cohort, pretrained_on: Any, window_len: int) -> SubjectSplit:
        split = split_subjects(cohort, self.settings.split, pretrained_on, window_len)
        counts = ", ".join(f"{split.num_subjects(role)} {role}" for role in split.roles)
        logger.info("subjects: %s; %d recordings left out", counts, len(split.left_out))
        for reason in sorted(set(split.left_out.values())):
            logger.info("left out: %d recordings: %s", list(split.left_out.values()).count(reason), reason)
        if self.world.is_rank_zero:
            write_split(Store(self.settings.run.storage or self.settings.run.out), cohort, split)
        return split

    def _predictor(self, start: StartUp) -> Parts:
        settings, world = self.settings, self.world
        encoder, pretrained_on, origin = load_encoder(settings, self.dataset)
        cohort = Cohort(self.dataset)
        split = self._split(cohort, pretrained_on, encoder.contract.window_len)
        readers = {role: ChosenRecordings(cohort, split.roles[role]) for role in ("train", "val")}
        predictor = Predictor(encoder, settings.head, fit_targets(settings, cohort, split))
        predictor.head.init_weights(torch.Generator().manual_seed(settings.run.seed))
        encoder_trained = set_trained(encoder, settings.encoder, decoder=False)
        if world.is_rank_zero:
            whiten(predictor, readers["train"])
        set_whitening_text(predictor, start.from_rank_zero(whitening_text(predictor)))

        seed = settings.run.seed if settings.permute_targets else None
        train_columns = columns_of(predictor.targets, cohort, split.roles["train"], seed)
        wanted, known = encode_all(predictor.targets, train_columns)
        learned = [i for i in range(len(known)) if bool(known[i].any())]
        loader = TargetLoader(
            ChosenRecordings(cohort, [split.roles["train"][i] for i in learned]), encoder.contract,
            _nothing_hidden(), **self._loading(encoder), wanted=wanted[learned], known=known[learned],
        )  # fmt: skip
        val = encode_all(predictor.targets, columns_of(predictor.targets, cohort, split.roles["val"]))
        held_out = HeldOutTargets(readers["val"], *val, max_recordings=settings.validation.max_recordings)
        mix = Mix({self.dataset.name: loader})
        steps = num_steps(settings, mix.steps_per_epoch)
        trained = sum(p.numel() for p in predictor.parameters() if p.requires_grad)
        logger.info(
            "%s of %s parameters are trained; %d recordings to train on, %d to validate on; at most %d steps of %d "
            "windows on %d rank(s)", f"{trained:,}", f"{predictor.num_parameters:,}", len(loader.reader), len(held_out),
            steps, settings.data.batch_size, world.size,
        )  # fmt: skip
        manifest = self._manifest(predictor, mix, steps) | origin
        manifest |= {
            "targets": [asdict(target) for target in predictor.targets],
            "encoder_trained": encoder_trained,
            "untrained": settings.encoder.untrained,
            "permuted": settings.permute_targets,
            "pretraining_subjects": split.num_pretraining_subjects,
            "num_subjects": {role: split.num_subjects(role) for role in split.roles},
        }
        subjects = None
        if pretrained_on is not None:
            subjects = pretrained_on.with_more(member.subject for member in split.roles["train"])

        def save(url: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> str:
            return save_predictor(url, predictor, manifest | facts, subjects, weights)

        flops, tokens = 0.0, encoder.contract.window_len // encoder.contract.patch_len
        if isinstance(encoder, BrainLM):
            forward = flops_per_window(encoder.config, encoder.num_parcels, 0.0)
            flops, tokens = forward * (3 if encoder_trained else 1), encoder.num_rows * encoder.config.num_patches
        objective = Objective(predictor, mix, held_out.score, flops, tokens)
        return Parts(objective, steps, manifest, save, keeps_last=False)

    def _forecaster(self) -> Parts:
        settings, dataset = self.settings, self.dataset
        name = settings.checkpoint
        if is_published(name):
            raise ConfigError("forecast_patches: published models are not fine-tuned to forecast; take one of our own")
        first = adopt(load_for_rebuilding(name), name, dataset)
        model, pretrained_on = first.model, first.earlier
        if settings.encoder.untrained:
            model, pretrained_on = BrainLM.untrained_like(model, settings.run.seed).train(), None
        assert first.earlier is not None
        cohort = Cohort(dataset)
        split = self._split(cohort, pretrained_on or type(first.earlier).of("", []), model.config.window_len)
        masks = settings.masks(model.config.num_patches)
        encoder_trained = set_trained(model, settings.encoder, decoder=True)
        options = self._loading(model)
        reader = ChosenRecordings(cohort, split.roles["train"])
        mix = Mix({dataset.name: WindowLoader(reader, model.contract, masks, **options)})
        checked = ValidationSettings(
            mask_ratio=masks.ratios[0], kind="future", windows_per_recording=4,
            max_recordings=settings.validation.max_recordings or len(cohort.members),
        )  # fmt: skip
        held_out = HeldOut(
            ChosenRecordings(cohort, split.roles["val"]), model.contract, checked, model.config.patch_parcels
        )
        steps = num_steps(settings, mix.steps_per_epoch)
        manifest = self._manifest(model, mix, steps) | first.facts
        manifest |= {
            "forecast_patches": settings.forecast_patches, "encoder_trained": encoder_trained,
            "untrained": settings.encoder.untrained, "pretraining_subjects": split.num_pretraining_subjects,
        }  # fmt: skip
        subjects = [member.subject for member in split.roles["train"]]

        def save(url: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> str:
            return save_checkpoint(url, model, manifest | facts, subjects, weights, pretrained_on)

        return Parts(
            rebuild_hidden(model, mix, masks, {dataset.name: held_out}), steps, manifest, save, keeps_last=False
        )

    def _loading(self, encoder: Any) -> dict[str, Any]:
        settings, world = self.settings, self.world
        return {
            "batch_size": settings.data.batch_size,
            "windows_per_recording": settings.data.windows_per_recording,
            "seed": settings.run.seed,
            "rank": world.rank,
            "world_size": world.size,
            "micro_batches": micro_batches(settings, world.size),
            "patch_parcels": encoder.config.patch_parcels if isinstance(encoder, BrainLM) else 1,
        }

    def _manifest(self, module: torch.nn.Module, mix: Mix, steps: int) -> dict[str, Any]:
        settings = self.settings
        return {
            **describe(settings, module, self.world),
            "dataset": self.dataset.name,
            "data_hash": self.dataset.content_hash,
            "num_steps": steps,
            "peak_lr": settings.optimizer.peak_lr(settings.data.batch_size),
            "num_warmup_steps": settings.optimizer.num_warmup_steps(steps),
        }

    def write_scores(self, done: dict[str, Any]) -> None:
        """Predict and score validation and test subjects with the best weights, unless that was done."""
        store = Store(self.settings.run.storage or self.settings.run.out)
        if store.exists(SCORES):
            return
        predictor = Predictor.from_pretrained(done["checkpoint"])
        _, pretrained_on, _ = load_encoder(self.settings, self.dataset)
        cohort = Cohort(self.dataset)
        split = split_subjects(cohort, self.settings.split, pretrained_on, predictor.contract.window_len)
        names = ("init_from", "untrained", "permuted", "encoder_trained", "git_commit", "dataset", "data_hash", "step")
        facts = {name: predictor.manifest.get(name) for name in names}
        write_scores(store, predictor, cohort, split, {"checkpoint": done["checkpoint"], **facts})


def _nothing_hidden() -> Any:
    from brainlm.loader import MaskSettings

    return MaskSettings()  # TargetLoader hides nothing, whatever is said here


def plan(settings: FinetuneSettings) -> str:
    """Return the resolved settings and what they amount to, as text."""
    dataset = open_dataset(settings.data.datasets[0])
    encoder, pretrained_on, _ = load_encoder(settings, dataset)
    cohort = Cohort(dataset)
    split = split_subjects(cohort, settings.split, pretrained_on, encoder.contract.window_len)
    lines = [to_yaml(settings).rstrip(), ""]
    if settings.targets:
        targets = fit_targets(settings, cohort, split)
        predictor = Predictor(encoder, settings.head, targets)
        set_trained(encoder, settings.encoder, decoder=False)
        module: torch.nn.Module = predictor
        for target in targets:
            what = f"{len(target.classes)} classes: {', '.join(target.classes)}" if target.classes else target.transform
            lines.append(
                f"target                {target.column} ({target.kind}, {what}), {target.num_subjects} subjects"
            )
    else:
        set_trained(encoder, settings.encoder, decoder=True)
        module = encoder
        lines.append(f"target                the last {settings.forecast_patches} patches of each window")
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    per_epoch = len(split.roles["train"]) * settings.data.windows_per_recording // settings.data.batch_size
    lines += [
        f"parameters            {sum(n for n, _ in counts):,}, of which {sum(n for n, t in counts if t):,} are trained",
        f"steps                 at most {num_steps(settings, per_epoch):,} of {settings.data.batch_size} windows",
        *(
            f"{role:<21} {split.num_subjects(role)} subjects, {len(split.roles[role])} recordings"
            for role in split.roles
        ),
        f"left out              {len(split.left_out)} recordings",
        f"data set              {dataset.name}, content {dataset.content_hash[:12]}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
