"""What `train/finetune.py --dry-run` says of a run: settings, targets, subjects, parameters."""

from __future__ import annotations

from torch import nn

from brainlm.config import to_yaml
from brainlm.dataset import open_dataset
from brainlm.predictor import Predictor
from train.finetune_settings import FinetuneSettings
from train.phenotypes import read_members
from train.predictor_parts import fit_targets, load_encoder, set_trained
from train.settings import num_steps
from train.subject_split import split_subjects


def plan(settings: FinetuneSettings) -> str:
    """Return the resolved settings and what they amount to, as text."""
    dataset = open_dataset(settings.data.datasets[0])
    origin = load_encoder(settings, dataset)
    encoder, source = origin.encoder, read_members(dataset)
    split = split_subjects(source, settings.split, origin.pretrained_on, encoder.contract)
    lines = [to_yaml(settings).rstrip(), ""]
    if settings.targets:
        targets = fit_targets(settings, source, split)
        predictor = Predictor(encoder, settings.head, targets)
        set_trained(encoder, settings.encoder, decoder=False)
        module: nn.Module = predictor
        for target in targets:
            what = f"{len(target.classes)} classes: {', '.join(target.classes)}" if target.classes else target.transform
            lines.append(
                f"target                {target.column} ({target.kind}, {what}), {target.num_subjects} subjects"
            )
    else:
        settings.masks(encoder.contract.window_len // encoder.contract.patch_len)
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
