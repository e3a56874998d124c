"""Recipe, cluster and data become a plan: a pure function of them, but for reading the manifest."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megamoe
from megamoe.errors import DataError
from megamoe.plan.cluster import Cluster
from megamoe.plan.layout import settle_dp
from megamoe.plan.plan import Data, Plan, Segment, Shard, Source
from megamoe.plan.schedule import steps
from megamoe.recipe.check import Checked, NaturalInt, PositiveInt, nearest
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.stage import Stage

_MAX_STEPS_BETWEEN = 1_000  # between two checkpoints or evaluations, where the user says nothing
_PREPARE = "make it with `megamoe data tokenize`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Checked):
    """What a person decides about a run beyond recipe and cluster."""

    seed: NaturalInt = 0
    deterministic: bool = True
    checkpoint_every: PositiveInt | None = None  # steps; None: a fifth of the segment, <= 1,000
    eval_every: PositiveInt | None = None  # steps; None: as checkpoint_every
    eval_tokens: PositiveInt | None = None  # per source; None: as the largest first step
    keep_checkpoints: PositiveInt = 3
    data: str | None = None  # folder with a manifest.json; None: plan without data
    scale: str | None = None  # name of the scale the recipe was derived with


def build_plan(recipe: Recipe, cluster: Cluster, options: Options) -> Plan:
    """Settle every number of a run.

    Raises:
        PlanError: a stage does not fit the cluster.
        DataError: the data folder lacks something the recipe asks for.
    """
    grids = [settle_dp(recipe, stage, cluster) for stage in recipe.stages]
    manifest = None if options.data is None else _read_manifest(Path(options.data))
    data = None if manifest is None else _data(manifest, recipe)
    segments: list[Segment] = []
    for stage, dp in zip(recipe.stages, grids, strict=True):
        place = f"{recipe.name}/{stage.name}"
        sources = () if manifest is None else _sources(place, stage, manifest)
        before = segments[-1] if segments else None
        segments.append(_segment(stage, (cluster, dp), sources, before, options))
    first_steps = [segment.batch_ramp[0][1] * segment.seq_len for segment in segments]
    return Plan(
        format=1,
        megamoe=megamoe.__version__,
        recipe=recipe.name,
        source=recipe.source,
        scale=options.scale,
        assumed=recipe.assumed,
        seed=options.seed,
        deterministic=options.deterministic,
        model=recipe.model,
        optimizer=recipe.optimizer,
        cluster=cluster,
        data=data,
        segments=tuple(segments),
        eval_tokens=options.eval_tokens or max(first_steps),
        keep_checkpoints=options.keep_checkpoints,
    )


def _segment(
    stage: Stage,
    place: tuple[Cluster, int],
    sources: tuple[Source, ...],
    before: Segment | None,
    options: Options,
) -> Segment:
    cluster, dp = place
    num_steps, tokens = steps(stage.batch_ramp, stage.seq_len, stage.tokens)
    checkpoint_every = options.checkpoint_every or min(_MAX_STEPS_BETWEEN, max(1, num_steps // 5))
    return Segment(
        index=before.index + 1 if before else 0,
        stage=stage.name,
        tokens_start=before.tokens_start + before.tokens if before else 0,
        tokens=tokens,
        num_steps=num_steps,
        steps_start=before.steps_start + before.num_steps if before else 0,
        seq_len=stage.seq_len,
        world_size=cluster.world_size,
        dp=dp,
        layout=stage.layout,
        precision=stage.precision,
        lr=stage.lr,
        batch_ramp=stage.batch_ramp,
        sources=sources,
        document_mask=stage.document_mask,
        router=stage.router,
        mtp_loss=stage.mtp_loss,
        rope_interpolation=stage.rope_interpolation,
        checkpoint_every=checkpoint_every,
        eval_every=options.eval_every or checkpoint_every,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    path: Path
    tokenizer: Mapping[str, Any]
    sources: Mapping[str, Any]


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / "manifest.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {_PREPARE}, or give another folder") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {_PREPARE}") from error
    if not isinstance(data, dict) or data.get("format") != 1:
        raise DataError(f"{path}: not a manifest of format 1; {_PREPARE}")
    return _Manifest(
        path=path,
        tokenizer=_get(data, "tokenizer", dict, str(path)),
        sources=_get(data, "sources", dict, str(path)),
    )


def _data(manifest: _Manifest, recipe: Recipe) -> Data:
    place = f"{manifest.path}: tokenizer"
    vocab_size = _get(manifest.tokenizer, "vocab_size", int, place)
    if vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"{place}: vocab_size {vocab_size:,} exceeds model.vocab_size "
            f"{recipe.model.vocab_size:,} of {recipe.name}; train a smaller tokenizer with "
            f"`megamoe data tokenizer train`, or --set model.vocab_size={vocab_size}"
        )
    ids = {name: _get(manifest.tokenizer, name, int, place) for name in ("eod_id", "pad_id")}
    for name, token in ids.items():
        if not 0 <= token < vocab_size:
            raise DataError(f"{place}: {name} {token} is not below vocab_size {vocab_size:,}")
    users = {name: stage for stage in reversed(recipe.stages) for name, _ in stage.mixture}
    heldout = [
        (name, _shard(f"{recipe.name}/{users[name].name}", manifest, name, "heldout"))
        for name in sorted(users)
    ]
    return Data(
        folder=str(manifest.path.parent.resolve()),
        eod_id=ids["eod_id"],
        pad_id=ids["pad_id"],
        vocab_size=vocab_size,
        heldout=tuple(heldout),
    )


def _sources(place: str, stage: Stage, manifest: _Manifest) -> tuple[Source, ...]:
    """Return the stage's sources; each with two entries where part of it is fill-in-the-middle."""
    total = math.fsum(weight for _, weight in stage.mixture)
    forms = (("train", "", 1 - stage.fim_rate), ("fim", ":fim", stage.fim_rate))
    return tuple(
        Source(
            name=name + suffix,
            weight=weight / total * share,
            shard=_shard(place, manifest, name, form),
        )
        for name, weight in stage.mixture
        for form, suffix, share in forms
        if share > 0
    )


def _shard(place: str, manifest: _Manifest, source: str, form: str) -> Shard:
    fim = " --fim" if form == "fim" else ""
    command = (
        f"`megamoe data tokenize --source {source} -o {manifest.path.parent} --heldout 0.03{fim}`"
    )
    if source not in manifest.sources:
        raise DataError(
            f"{place}: source {source!r} is not in {manifest.path}"
            f"{nearest(source, manifest.sources)}; make it with {command}, or --set "
            f"{place.split('/')[-1]}.mixture to sources that are there"
        )
    entry = manifest.sources[source].get(form)
    if entry is None:
        missing = {"train": "text", "fim": "fill-in-the-middle text", "heldout": "held-out text"}
        raise DataError(
            f"{place}: source {source!r} has no {missing[form]} in {manifest.path}; "
            f"make it with {command}"
            + (f", or --set {place.split('/')[-1]}.fim_rate=0" if fim else "")
        )
    where = f"{manifest.path}: sources.{source}.{form}"
    prefix = _get(entry, "prefix", str, where)
    for ending in (".bin", ".idx"):
        if not (file := manifest.path.parent / (prefix + ending)).is_file():
            raise DataError(f"{where}: {file} is missing; {_PREPARE}")
    tokens = _get(entry, "tokens", int, where)
    if tokens < 1:
        raise DataError(f"{where}: holds {tokens} tokens; {_PREPARE}")
    return Shard(prefix=prefix, tokens=tokens, sha256_idx=_get(entry, "sha256_idx", str, where))


def _get(data: Mapping[str, Any], key: str, kind: type, place: str) -> Any:  # noqa: ANN401  (JSON)
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{place}: {key} is {value!r}, not of type {kind.__name__}; {_PREPARE}")
    return value
