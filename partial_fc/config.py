"""Configuration of the classifier: the keys under `[head]`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from partial_fc.margin import AnyMargin, ArcFaceConfig
from partial_fc.optim import AnyRowOptimizer, RowSGDConfig

# Up to this scale float32 represents exp(logit), its sum over 2^31 classes, and every significant term of a
# row even if its largest logit is -scale: no maximum has to be subtracted first.
FLOAT32_MAX_SCALE = 64.0


class HeadConfig(BaseModel):
    """The margin softmax over all identities, sharded over the ranks, and the optimizer of its rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: AnyMargin = Field(ArcFaceConfig(), description="margin of the target class")
    # Ranks exchange sums of exponentials in float64 without a common maximum: 200 keeps them in range.
    scale: float = Field(64.0, gt=0, le=200, description="factor from cosine to logit")
    sample_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the classes that each step samples as negatives; the classes of the batch "
        "always take part",
    )
    interclass_filter: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="negatives whose cosine exceeds it are ignored, as they are probably the same identity "
        "under another label; by default none are",
    )
    tile: int | None = Field(
        None,
        ge=1,
        description="classes per tile; by default as many as fit the CPU's cache, 1/64 of the GPU's memory "
        "or, with kernels, 256 MiB",
    )
    backend: Literal["auto", "kernels", "streaming", "dense"] = Field(
        "auto",
        description="streaming: tiles of classes; kernels: tiles of classes in Triton, for GPUs, float32 "
        "rows, scale <= 64 and margins other than curricularface; dense: all logits, by autograd; auto: "
        "kernels where they are supported, otherwise streaming",
    )
    matrix_inputs: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto",
        description="type to which unit embeddings, unit rows and probabilities are rounded before they are "
        "multiplied; rows, moments and sums stay in float32, but a CPU returns products of bf16 in bf16. "
        "auto: bf16 for kernels, fp32 for streaming and dense. kernels support bf16 and tf32, streaming "
        "supports all, dense only fp32",
    )
    deterministic: bool = Field(
        False,
        description="run kernels in blocks of a fixed size, so that a repeated run is bit-identical; by "
        "default the block size, and with it the order of sums, is tuned by timing",
    )
    optimizer: AnyRowOptimizer = Field(RowSGDConfig(), description="optimizer of the class rows")
