"""What stands in for the functions below the attention of packages, which steps of a ring call.

Plain torch behind the parameters of the real functions, which refuses what those refuse: flash-attn 2.8.4
(`flash_attn/flash_attn_interface.py`, `csrc/flash_attn/flash_api.cpp`), flash-attn 3 (`hopper/`), of 2.8.3 and of
August 2026, and Transformer Engine 2.14 and 2.18 (`pytorch/cpp_extensions/fused_attn.py`). What they allocate is
NaN until it is written (conftest.py).
"""

from inspect import Parameter, Signature
from types import ModuleType

import torch
from torch import Tensor

from tests.numerics.torch_flash import _attend, _gradients

WINDOWS = {False: (-1, -1), True: (-1, 0)}  # by whether it is causal
FLASH_ATTN_2 = (
    "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
)
FLASH_ATTN_3_LENGTHS = "cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k"
FLASH_ATTN_3 = (
    "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k "
    "max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin "
    "seqlens_rotary q_descale k_descale v_descale softmax_scale causal"
)
LENGTHS = "max_seqlen_q max_seqlen_kv cu_seqlens_q cu_seqlens_kv"


def takes(required, optional=""):
    """Give a function of its arguments by name the parameters of a real one."""
    names = {**dict.fromkeys(required.split(), Parameter.empty), **dict.fromkeys(optional.split())}
    kind = Parameter.POSITIONAL_OR_KEYWORD
    signature = Signature([Parameter(name, kind, default=each) for name, each in names.items()])

    def wrap(function):
        def called(*args, **options):
            return function(signature.bind(*args, **options).arguments)

        called.__signature__ = signature
        return called

    return wrap


def attend(q, k, v, given, causal) -> tuple[Tensor, Tensor]:
    """Return [B, S, N, V] and the logarithm of the sum [B, N, S]."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in {torch.float16, torch.bfloat16}, "only supports fp16 and bf16"
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[1] == k.shape[1] or not causal, "aligned at the first or last key, by version"
    return _attend(q, k, v, WINDOWS[causal], scale_of(given))


def gradients(tensors, given, causal) -> tuple[Tensor, ...]:
    """Return them in float32."""
    grad, q, k, v, out, log_sum = tensors
    assert grad.dtype == out.dtype == q.dtype == k.dtype == v.dtype
    assert grad.shape == out.shape == (*q.shape[:3], v.shape[-1])
    assert log_sum.dtype is torch.float32
    assert log_sum.is_contiguous()  # read without its strides
    assert log_sum.shape == (q.shape[0], q.shape[2], q.shape[1])
    return _gradients(*tensors, WINDOWS[causal], scale_of(given))


def scale_of(given) -> float:
    return given["attn_scale" if "attn_scale" in given else "softmax_scale"]


def flash_gradients(given, causal) -> None:
    """Write gradients where the caller wants them."""
    names = ("dout", "q", "k", "v", "out", "softmax_lse")
    found = gradients([given[name] for name in names], given, causal)
    for tensor, value in zip((given["dq"], given["dk"], given["dv"]), found, strict=True):
        assert tensor.shape == value.shape
        assert tensor.stride(-1) == 1
        tensor.copy_(value)


def with_room(x, dim, room) -> Tensor:
    """Return a tensor with NaN after its rows."""
    shape = list(x.shape)
    shape[dim] = room - shape[dim]
    return torch.cat((x, x.new_full(shape, torch.nan)), dim=dim)


class FlashAttn2(ModuleType):
    """`flash_attn.flash_attn_interface`."""

    def __init__(self) -> None:
        super().__init__("flash_attn.flash_attn_interface")
        self.deterministic: list[bool] = []

        @takes(f"q k v {FLASH_ATTN_2} return_softmax")
        def forward(given):
            assert not given["return_softmax"]
            self.check(given)
            attended = attend(*(given[x] for x in "qkv"), given, given["causal"])
            return *attended, torch.empty(0), torch.zeros(2, dtype=torch.int64)

        @takes(f"dout q k v out softmax_lse dq dk dv {FLASH_ATTN_2} deterministic", "rng_state")
        def backward(given):
            self.check(given)
            self.deterministic.append(given["deterministic"])
            flash_gradients(given, given["causal"])
            return torch.empty(0)  # the sum of output times gradient

        self._flash_attn_forward, self._flash_attn_backward = forward, backward

    def check(self, given) -> None:
        kept_off = ("dropout_p", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
        assert [given[name] for name in kept_off] == [0.0, -1, -1, 0.0, None]
        [width] = {given[x].shape[-1] for x in "qkv"}
        assert width % 8 == 0
        assert width <= 256


class FlashAttn3(ModuleType):
    """`flash_attn_interface` of 2.8.3, where what is not there must be said."""

    causal = "causal"  # as the backward pass names it

    def __init__(self) -> None:
        super().__init__("flash_attn_interface")
        self.deterministic: list[bool] = []
        before = f"dout q k v out softmax_lse {FLASH_ATTN_3_LENGTHS} dq dk dv softmax_scale"
        forward, backward = self.parameters(FLASH_ATTN_3, f"{before} {self.causal}")

        @takes(*forward)
        def attended(given):
            self.check(given, {"q", "k", "v", "softmax_scale", "causal"})
            return *attend(*(given[x] for x in "qkv"), given, given["causal"]), None, None

        @takes(*backward)
        def differentiated(given):
            called_with = {"dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"}
            self.check(given, called_with | {"softmax_scale", self.causal, "deterministic"})
            self.deterministic.append(given["deterministic"])
            flash_gradients(given, given[self.causal])

        self._flash_attn_forward, self._flash_attn_backward = attended, differentiated

    def parameters(self, forward, backward):
        return (forward, "window_size num_splits"), (backward, "window_size deterministic")

    def check(self, given, known) -> None:
        assert {name for name, value in given.items() if value is not None} == known
        q, k, v = (given[x] for x in "qkv")
        width, value_width = q.shape[-1], v.shape[-1]
        assert width == k.shape[-1] <= 256
        assert width % 8 == value_width % 8 == 0
        assert width == value_width or (128 < width <= 192 and 96 < value_width <= 128)


class FlashAttn3Of2026(FlashAttn3):
    """The same after 2.8.3: some other names, and what is not there may be left out."""

    causal = "is_causal"

    def parameters(self, forward, backward):
        required, optional = forward.replace(" out ", " out_ ").split(" k_new")
        window = "window_size_left window_size_right"
        return (required, f"k_new{optional} {window} num_splits"), (
            "dout q k v out softmax_lse",
            backward.split("softmax_lse ")[1] + f" {window} softcap deterministic",
        )


class FusedAttn(ModuleType):
    """`transformer_engine.pytorch.cpp_extensions.fused_attn` of 2.18."""

    of_gradients = ("fake_dtype", "qkv_layout o_format do_format dqkv_layout")

    def __init__(self) -> None:
        super().__init__("transformer_engine.pytorch.cpp_extensions.fused_attn")
        self.FusedAttnBackend = {"F16_arbitrary_seqlen": "cuDNN"}
        self.deterministic: list[bool] = []
        self.lengths: set[int] = set()  # for each of which cuDNN has a plan
        optional = "attn_scale qkv_layout attn_mask_type window_size"
        required, layouts = self.of_gradients

        @takes(f"is_training {LENGTHS} q k v fake_dtype fused_attention_backend", optional)
        def forward(given):
            assert given["is_training"]
            q, k, v = self.rows(given, "q", "k", "v")
            output, log_sum = attend(q, k, v, given, self.is_causal(given))
            state = torch.zeros(2, dtype=torch.int64)
            log_sum = with_room(log_sum, 2, given["max_seqlen_q"])
            return self.returned(given, output, "q"), [log_sum[..., None], state]

        @takes(
            f"{LENGTHS} q k v o d_o {required} aux_ctx_tensors fused_attention_backend",
            f"{optional} {layouts} deterministic",
        )
        def backward(given):
            self.check_layouts(given)
            self.deterministic.append(given["deterministic"])
            assert given["max_seqlen_q"] > 1 or given["max_seqlen_kv"] > 1, "not supported by cuDNN"
            stats, state = given["aux_ctx_tensors"]
            assert state.dtype is torch.int64
            rows = self.rows(given, "d_o", "q", "k", "v", "o")
            assert stats.shape[2:] == (given["max_seqlen_q"], 1)
            log_sum = stats[:, :, : self.filled(given, "q"), 0].contiguous()
            found = gradients((*rows, log_sum), given, self.is_causal(given))
            of = zip(found, ("q", "kv", "kv"), strict=True)
            return *(self.returned(given, x, length) for x, length in of), None, None

        self.fused_attn_fwd, self.fused_attn_bwd = forward, backward

    def check_layouts(self, given) -> None:
        assert given["dqkv_layout"] == given["qkv_layout"]
        assert "o_format" not in given, "sequence first by default"

    def is_causal(self, given) -> bool:
        mask = given["attn_mask_type"]
        assert mask in {"causal", "no_mask", "padding_causal", "padding"}
        is_causal = mask.endswith("causal")
        assert given["window_size"] == WINDOWS[is_causal]
        return is_causal

    def filled(self, given, of) -> int:
        """Return how many rows of each of the batch there are; without "padding" all."""
        ends, room = given[f"cu_seqlens_{of}"], given[f"max_seqlen_{of}"]
        assert ends.dtype is torch.int32
        length = int(ends[1])
        assert ends.tolist() == [i * length for i in range(len(ends))]
        if not given["attn_mask_type"].startswith("padding"):
            assert length == room
        self.lengths.add(room)
        return length

    def rows(self, given, *names) -> list[Tensor]:
        """Return the rows of tensors that there are, with the batch first."""
        tensors = [given[name] for name in names]
        assert {x.dtype for x in tensors} == {given["fake_dtype"]}
        assert all(x.is_contiguous() for x in tensors), "strides are taken from the layout"
        assert given["fused_attention_backend"] == "cuDNN"
        assert given["qkv_layout"] == "sbhd_sbhd_sbhd"
        found = []
        for name, x in zip(names, tensors, strict=True):
            of = "kv" if name in "kv" else "q"
            assert len(x) == given[f"max_seqlen_{of}"]
            assert x.shape[1] + 1 == len(given[f"cu_seqlens_{of}"])
            found.append(x[: self.filled(given, of)].transpose(0, 1))
        return found

    def returned(self, given, x, of) -> Tensor:
        """Return sequence first and the rest of the room, which is not written."""
        return with_room(x, 1, given[f"max_seqlen_{of}"]).transpose(0, 1)


class FusedAttnBefore215(FusedAttn):
    """Of 2.14, which wants the dtype of gradients, as its own C++ has it."""

    of_gradients = ("fake_dtype dqkv_dtype", "")

    def check_layouts(self, given) -> None:
        assert given["dqkv_dtype"] == "kBFloat16"


def modules(name: str) -> dict[str, ModuleType]:
    """Return a package of PACKAGES, the module that is called last."""
    standin = PACKAGES[name]()
    found = {}
    if isinstance(standin, FusedAttn):
        constants = ModuleType("transformer_engine.pytorch.constants")
        constants.TE_DType = {torch.bfloat16: "kBFloat16"}
        found[constants.__name__] = constants
    *parents, _ = standin.__name__.split(".")
    for i in range(1, len(parents) + 1):
        parent = ".".join(parents[:i])
        found[parent] = ModuleType(parent)
    return found | {standin.__name__: standin}


PACKAGES = {
    "flash_attn_3 2.8.3": FlashAttn3,
    "flash_attn_3 of 2026": FlashAttn3Of2026,
    "flash_attn_2": FlashAttn2,
    "transformer_engine 2.14": FusedAttnBefore215,
    "transformer_engine 2.18": FusedAttn,
}
