"""What the user says about the classifier: the keys under `[head]`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from partial_fc.margin import AnyMargin, ArcFaceConfig

# bfloat16 holds 8 binary digits: a moment that fades by less than this share of itself stays where it is.
_BF16_LEAST_FADE = 2**-7
# Up to here float32 holds exp(logit), its sum over 2^31 classes, and all that matters beside the largest of a
# row even if that one is at -scale: no maximum has to be taken off first.
FLOAT32_MAX_SCALE = 64.0


class HeadConfig(BaseModel):
    """The margin softmax over all identities, sharded over the ranks, and how its rows are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: AnyMargin = Field(ArcFaceConfig(), description="margin of the target class")
    # Sums of exponentials travel between ranks as float64 without a common maximum: 200 keeps them in range.
    scale: float = Field(64.0, gt=0, le=200, description="factor from cosine to logit")
    sample_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the classes drawn as negatives at each step; the batch's own are always in",
    )
    interclass_filter: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="negatives whose cosine is above it are left out, as likely the same person under "
        "another label; by default none",
    )
    tile: int | None = Field(
        None,
        ge=1,
        description="classes per tile; by default what suits the CPU's cache, 1/64 of the GPU's memory, or, "
        "for kernels, 256 MiB",
    )
    backend: Literal["auto", "kernels", "streaming", "dense"] = Field(
        "auto",
        description="streaming: over tiles of classes; kernels: the same in Triton, for GPUs, float32 rows, "
        "scale <= 64 and margins other than curricularface; dense: all logits, by autograd; auto: kernels "
        "where they can be used, else streaming",
    )
    matrix_inputs: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto",
        description="what unit embeddings, unit rows and probabilities are rounded to before they are "
        "multiplied; rows, moments and sums stay in float32, but a CPU's products of bf16 come out as bf16. "
        "auto: bf16 for kernels (which know tf32 too), fp32 for streaming (which knows all) and dense",
    )
    deterministic: bool = Field(
        False,
        description="kernels in blocks of a fixed size, so that a run repeats bit for bit; by default their "
        "size is tuned by timing, and with it the order of sums",
    )
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="what moves the class rows; rows that a step did not sample stay as they are"
    )
    moments: Literal["fp32", "bf16"] = Field(
        "fp32", description="type in which the optimizer's moments are kept; bf16 takes half the memory"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd; beta1 of adamw")
    beta2: float = Field(
        0.999, ge=0, lt=1, description="beta2 of adamw; at most 0.992 with moments = bf16, which rounds"
    )
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="decay of the class rows: sgd adds this times a row to its gradient, adamw takes this "
        "times the learning rate off the row",
    )

    @model_validator(mode="after")
    def _moments_can_fade(self) -> HeadConfig:
        if self.optimizer == "adamw" and self.moments == "bf16" and 1 - self.beta2 < _BF16_LEAST_FADE:
            raise ValueError(
                f"moments = bf16 with beta2 = {self.beta2:g}: expected beta2 <= {1 - _BF16_LEAST_FADE:.3g}, "
                "as bfloat16 would round smaller changes away; lower beta2, or set moments = fp32"
            )
        return self
