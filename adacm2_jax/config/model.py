"""The three networks and the whole model, and two presets."""

import dataclasses
import typing

from adacm2_jax.config.checks import check_numbers, divides, one_of
from adacm2_jax.config.memory import MemoryConfig
from adacm2_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: Ways to keep a quantised matrix → the dtype of its values.
QUANTIZED = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """EVA-CLIP ViT-g/14 as LAVIS cuts it: 39 blocks, no final norm, every token returned."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    num_heads: int = 16
    mlp_width: int = 6144
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        check_numbers("vision", self)
        divides("vision.patch_size", self.patch_size, "vision.image_size", self.image_size)
        divides("vision.num_heads", self.num_heads, "vision.width", self.width)

    @property
    def tokens_per_frame(self) -> int:
        """P: the patches of one frame and its CLS token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """InstructBLIP's Q-Former: BERT-base with cross-attention in every second layer."""

    vocab_size: int = 30523
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    cross_attention_every: int = 2
    num_queries: int = 32
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self):
        check_numbers("qformer", self, dropout=0, num_queries=0)
        divides("qformer.num_heads", self.num_heads, "qformer.width", self.width)
        divides(
            "qformer.cross_attention_every", self.cross_attention_every, "qformer.depth", self.depth
        )
        if self.dropout >= 1:
            raise UserError(f"qformer.dropout must be in [0, 1), not {self.dropout}")

    @property
    def num_cross_layers(self) -> int:
        """L: the layers that read the video, each with a memory of its own."""
        return self.depth // self.cross_attention_every


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A LLaMA decoder; the defaults are Vicuna-7B v1.1 with LAVIS's added ``[PAD]`` row.

    Attributes:
      quantize: how the matrices of its layers are kept: one of :data:`QUANTIZED`; empty: as they
        are. See ``models/quantized.py``.
    """

    vocab_size: int = 32001
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    mlp_width: int = 11008
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048
    tie_embeddings: bool = False
    quantize: str = ""

    def __post_init__(self):
        check_numbers("llm", self)
        one_of("llm.quantize", self.quantize, ("", *QUANTIZED))
        divides("llm.num_heads", self.num_heads, "llm.width", self.width)
        divides("llm.num_kv_heads", self.num_kv_heads, "llm.num_heads", self.num_heads)
        if self.head_dim % 2:
            raise UserError(f"llm.width / llm.num_heads must be even for RoPE, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class AdaCM2Config:
    """The whole model.

    Attributes:
      ln_vision_eps: 1e-6 for weights in Hugging Face's form, 1e-5 for LAVIS's and MA-LMM's.
      temporal_positions: rows of the temporal embedding table. A longer video of known length is
        spread over the table by linear interpolation; an open-ended stream uses row t for frame t
        and the last row from there on.
      max_text_len: tokens of a question, for both tokenizers; a longer one is an error.
      max_answer_len: tokens of a training answer, its end token included.
      dtype: of matrix products in the ViT and the LLM, and of their weights where they are frozen:
        ``float32``, ``bfloat16`` or ``float16``. The ViT's residual stream is always float32, as
        are norms, softmax and scores everywhere. ``float64`` (under ``jax_enable_x64``) is for
        proofs: then all of these are float64.
      qformer_dtype: the same of the Q-Former, what surrounds it (ln_vision, temporal embedding,
        language projection) and the memory; empty: ``dtype``. LAVIS and MA-LMM evaluate with
        ``float16`` and ``float32``.
      remat: compute a layer's activations again in the backward pass instead of keeping them.
      fused_vision: the ViT's attention by cuDNN, and fewer kernels beside it in a model that is
        asked, where an NVIDIA GPU computes in half precision.
      fused_epilogues: the ViT's biases and GELU, by tanh, within its products, where an NVIDIA GPU
        computes in half precision; see ``layers.fused_gelu``.
      fused_memory: a frame's step of the memory by three kernels of ours, where a GPU reads without
        a gradient and tokens are ranked by attention; see memory/fused.py.
    """

    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    llm: LlamaConfig = LlamaConfig()
    memory: MemoryConfig = dataclasses.field(default=MemoryConfig())
    ln_vision_eps: float = 1e-6
    temporal_positions: int = 120
    max_text_len: int = 128
    max_answer_len: int = 256
    dtype: str = "float32"
    qformer_dtype: str = ""
    remat: bool = True
    fused_vision: bool = True
    fused_epilogues: bool = False
    fused_memory: bool = False

    def __post_init__(self):
        one_of("dtype", self.dtype, DTYPES)
        one_of("qformer_dtype", self.qformer_dtype, ("", *DTYPES))
        check_numbers("", self)
        if self.max_text_len > self.qformer.max_positions:
            raise UserError(
                f"max_text_len is {self.max_text_len}, but the Q-Former has only "
                f"{self.qformer.max_positions} text positions (qformer.max_positions)"
            )
        needed = self.qformer.num_queries + self.max_text_len + self.max_answer_len
        if needed > self.llm.max_positions:
            raise UserError(
                f"queries + max_text_len + max_answer_len = {needed} exceed llm.max_positions = "
                f"{self.llm.max_positions}; lower max_text_len or max_answer_len"
            )

    @property
    def memory_dtype(self) -> str:
        """Of keys, values and query rows, and so of all that the Q-Former computes."""
        return self.qformer_dtype or self.dtype

    @property
    def feature_dtype(self) -> str:
        """Of what the ViT hands on: its residual stream, rounded to bfloat16 where the Q-Former
        reads bfloat16. A cache of features stores just that."""
        return self.memory_dtype if self.memory_dtype in ("bfloat16", "float64") else "float32"


def instructblip_vicuna_7b(**overrides) -> AdaCM2Config:
    """EVA ViT-g/14, InstructBLIP's Q-Former and Vicuna-7B v1.1: 7.91 billion parameters."""
    return AdaCM2Config(**overrides)


def tiny(**overrides) -> AdaCM2Config:
    """The same model at the size of a laptop: 56-pixel frames of 17 tokens, 1 M parameters."""
    sizes: dict[str, typing.Any] = dict(
        vision=VisionConfig(image_size=56, width=96, depth=3, num_heads=4, mlp_width=192),
        qformer=QFormerConfig(
            vocab_size=512,
            width=96,
            depth=4,
            num_heads=4,
            mlp_width=192,
            num_queries=4,
            max_positions=64,
            dropout=0.0,
        ),
        llm=LlamaConfig(
            vocab_size=512,
            width=96,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_width=256,
            max_positions=128,
        ),
        max_text_len=24,
        max_answer_len=8,
    )
    return AdaCM2Config(**(sizes | overrides))
