"""What each model chunk of a pipeline holds, as text: 'Et|tt|tmL'.

The notation of Megatron-core's `pipeline_model_parallel_layout` (0.16.1 and 0.19.2,
transformer/pipeline_parallel_layer_layout.py): E is the embedding, t a decoder layer, m a layer of
multi-token prediction, L the output layer and the loss; | stands between chunks, t*3 is ttt, (tt|)*3
is tt|tt|tt|, and commas are there for the eye. Chunks are in the order of the model: of pp ranks
with vpp chunks each, rank r holds chunks r, pp + r, 2 pp + r and so on.
"""

import re

from megamoe.recipe.check import FieldError

EVEN = "even"  # the same number of decoder layers each; the last chunk has fewer where it must
_LAYER = re.compile(r"([EtmL|])\*([1-9][0-9]{0,2})(?![0-9*])")
_GROUP = re.compile(r"\(([^()]*)\)\*([1-9][0-9]{0,2})(?![0-9*])")
_ORDER = re.compile(r"Et*m*L")
_NAMES = {"E": "the embedding", "L": "the output layer"}


def even_chunks(num_chunks: int, num_layers: int, num_predictions: int) -> tuple[str, ...] | None:
    """Return chunks of ceil(num_layers / num_chunks) layers, the last of what is left.

    The last one also has the output layer and the multi-token prediction, which cost most. None:
    nothing would be left for it.
    """
    each = -(-num_layers // num_chunks)
    last = num_layers - each * (num_chunks - 1)
    if last < 1:
        return None
    chunks = ["t" * each] * (num_chunks - 1) + ["t" * last + "m" * num_predictions + "L"]
    chunks[0] = "E" + chunks[0]
    return tuple(chunks)


def written_chunks(text: str, pp: int, vpp: int) -> tuple[str, ...]:
    """Return the chunks of a written pipeline, every layer a letter: ('Et', 'tt', 'tmL').

    Args:
        text: the pipeline.
        pp: its ranks.
        vpp: the chunks of each.

    Raises:
        FieldError: the text cannot be read, has another number of chunks, an order that no model
            has, or multi-token prediction where Megatron-core cannot have it.
    """
    num_chunks = pp * vpp
    plain = _GROUP.sub(_repeated, _LAYER.sub(_repeated, text.replace(",", "")))
    if wrong := re.search(r"[^EtmL|]", plain):
        raise FieldError(
            "pipeline",
            f"{text!r} has a {wrong[0]!r} that cannot be read; give 'even', or E, t, m, L with | "
            "between chunks, repeated as t*3 or (tt|)*3, such as 'Et*3|(tt|)*4tmL'",
        )
    chunks = tuple(plain.split("|"))
    if len(chunks) != num_chunks:
        raise FieldError(
            "pipeline",
            f"{text!r} has {len(chunks)} chunks, and pp x vpp is {num_chunks}; put "
            f"{num_chunks - 1} | into it, or give pp x vpp = {len(chunks)}",
        )
    for index, chunk in enumerate(chunks):
        if not chunk:
            raise FieldError(
                "pipeline",
                f"{text!r} leaves chunk {index + 1} of {num_chunks} empty; give it a layer",
            )
    _check_order(text, chunks)
    _check_predictions(text, chunks, pp)
    return chunks


def check_layers(text: str, chunks: tuple[str, ...], num_layers: int, num_predictions: int) -> None:
    """Check that chunks are those of a model.

    Raises:
        FieldError: the model has another number of decoder or prediction layers.
    """
    for letter, name, wanted in (
        ("t", "model.num_layers", num_layers),
        ("m", "model.mtp.num_layers", num_predictions),
    ):
        found = "".join(chunks).count(letter)
        if found != wanted:
            has = f"{name} is {wanted}" if wanted else "model.mtp is None"
            raise FieldError(
                "pipeline",
                f"{text!r} has {found} {letter}, and {has}; write {wanted or 'no'} {letter}",
            )


def _repeated(match: re.Match[str]) -> str:
    return match[1] * int(match[2])


def _check_order(text: str, chunks: tuple[str, ...]) -> None:
    whole = "".join(chunks)
    for letter, name in _NAMES.items():
        if whole.count(letter) != 1:
            raise FieldError(
                "pipeline",
                f"{text!r} has {whole.count(letter)} {letter}, {name}; write it once",
            )
    if not _ORDER.fullmatch(whole):
        raise FieldError(
            "pipeline",
            f"{text!r} is not in the order of the model; write E first, then t, then m, and L last",
        )


def _check_predictions(text: str, chunks: tuple[str, ...], pp: int) -> None:
    """Check that multi-token prediction is whole, and gives no rank a second copy of the embedding."""
    places = [index for index, chunk in enumerate(chunks) if "m" in chunk]
    if len(places) > 1:
        raise FieldError(
            "pipeline",
            f"{text!r} has m on {len(places)} chunks, and each is computed from the one before; "
            "write them side by side",
        )
    if places and places[0] and places[0] % pp == 0:
        # Megatron-Core 0.16.1 and 0.19.2 distributed/finalize_model_grads.py:233 adds up the gradients
        # of one table of a rank, so the copy in the second chunk would go its own way.
        raise FieldError(
            "pipeline",
            f"{text!r} has m on the rank that has E, in another chunk: two copies of the embedding; "
            "write m with L, or give pp above 2",
        )
