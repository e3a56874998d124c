"""How a stage is spread over ranks. Data parallelism takes the ranks that are left."""

from dataclasses import dataclass
from typing import Literal

from megamoe.recipe.check import Checked, FieldError, PositiveInt
from megamoe.recipe.model import Model
from megamoe.recipe.pipeline import EVEN, check_layers, even_chunks, written_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Checked):
    """Sizes of the axes of the rank grid.

    `ep` and `etp` (expert and expert-tensor parallel) fold over tp x cp x dp; `vpp` is the number
    of model chunks per pipeline rank (interleaved schedule). `pipeline` says what each chunk holds,
    "even" or as megamoe/recipe/pipeline.py has it. With tp > 1 activations between layers are
    sequence parallel. `cp` ranks share each sequence, each with a row of its tokens:
    layers with a window exchange the window's edge; the others do what `cp_scheme` says
    (megamoe/nn/context_parallel.py), "auto" what costs least by estimate.

    `dispatcher` brings tokens to the experts of other ranks, where ep or etp is above 1: each rank
    gathers all tokens, or they go where they are needed, by all-to-all or by a library for GPUs.
    The result is the same. A run that lacks the library uses all-to-all (megamoe/mcore/dispatchers.py).

    `recompute` names what keeps no activations and is computed again in the backward pass, with the
    same result: whole layers, or parts of each (MLPs are the dense and those of experts).
    """

    tp: PositiveInt
    pp: PositiveInt
    vpp: PositiveInt
    pipeline: str
    cp: PositiveInt
    cp_scheme: Literal["auto", "heads", "ring", "gather"]
    ep: PositiveInt
    etp: PositiveInt
    dispatcher: Literal["all_gather", "all_to_all", "deepep", "hybridep"]
    micro_batch: PositiveInt  # sequences per rank and micro-batch
    recompute: tuple[Literal["layer", "mla_up_projection", "mlp"], ...]

    def check(self) -> None:
        """Interleaving needs ranks, a written pipeline its chunks; no part is recomputed twice."""
        if self.vpp > 1 and self.pp == 1:
            raise FieldError("vpp", f"{self.vpp} needs pp above 1; give vpp=1 or a larger pp")
        if self.pipeline != EVEN:
            written_chunks(self.pipeline, self.pp, self.vpp)
        parts = self.recompute
        if len(set(parts)) != len(parts) or ("layer" in parts and len(parts) > 1):
            raise FieldError("recompute", f"{parts} names a part twice; give each once")

    def check_model(self, model: Model) -> None:
        """Check that a model has experts and layers for all ranks, whatever the cluster.

        Raises:
            FieldError: it has not; says which sizes would do.
        """
        num_routed = model.experts.num_routed
        if num_routed % self.ep:
            sizes = [size for size in range(1, num_routed + 1) if num_routed % size == 0]
            nearest = [size for size in sizes if size < self.ep][-1:]
            nearest += [size for size in sizes if size > self.ep][:1]
            would_do = " or ".join(str(size) for size in nearest)
            raise FieldError(
                "ep", f"{self.ep} does not divide num_routed {num_routed}; give {would_do}"
            )
        if self.pipeline == EVEN and self.pp * self.vpp > model.num_layers:
            raise FieldError(
                "pp",
                f"{self.pp} x vpp {self.vpp} exceeds num_layers {model.num_layers}; "
                "give at most that",
            )

    def chunks(self, model: Model) -> tuple[str, ...] | None:
        """Return what each model chunk holds, a letter a layer; None: layers cannot be dealt evenly.

        Raises:
            FieldError: a written pipeline is that of another model.
        """
        num_predictions = model.mtp.num_layers if model.mtp else 0
        if self.pipeline == EVEN:
            return even_chunks(self.pp * self.vpp, model.num_layers, num_predictions)
        chunks = written_chunks(self.pipeline, self.pp, self.vpp)
        check_layers(self.pipeline, chunks, model.num_layers, num_predictions)
        return chunks

    def ranks_with_table(self, model: Model) -> tuple[int, ...]:
        """Return the pipeline ranks with a copy of the embedding, in order: of E, m, and L where tied."""
        letters = set("EmL") if model.tied_embeddings else set("Em")
        chunks = self.chunks(model)
        assert chunks is not None, self
        return tuple(
            sorted({i % self.pp for i, chunk in enumerate(chunks) if letters & set(chunk)})
        )


def one_rank(micro_batch: int) -> Layout:
    """Return the layout of a rank by itself: any number of such ranks is data parallel."""
    return Layout(
        tp=1,
        pp=1,
        vpp=1,
        pipeline=EVEN,
        cp=1,
        cp_scheme="auto",
        ep=1,
        etp=1,
        dispatcher="all_to_all",
        micro_batch=micro_batch,
        recompute=(),
    )
